//! Lines from a terminal with editing and history, or from a pipe as they are.

use std::io::{self, BufRead, IsTerminal};

use anyhow::Context;
use rustyline::{DefaultEditor, error::ReadlineError};

/// Where lines come from.
pub(super) enum Input {
    Terminal(Box<DefaultEditor>),
    Pipe,
}

/// What came.
pub(super) enum Read {
    Line(String),
    /// Ctrl-C on a line throws it away.
    Nothing,
    End,
}

impl Input {
    pub(super) fn new() -> anyhow::Result<Self> {
        if !io::stdin().is_terminal() {
            return Ok(Self::Pipe);
        }
        let editor = DefaultEditor::new().context("cannot use the terminal")?;
        Ok(Self::Terminal(Box::new(editor)))
    }

    pub(super) fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    pub(super) fn read(&mut self) -> anyhow::Result<Read> {
        match self {
            Self::Terminal(editor) => match editor.readline("> ") {
                Ok(line) => {
                    editor
                        .add_history_entry(&line)
                        .context("cannot keep the history")?;
                    Ok(Read::Line(line))
                }
                Err(ReadlineError::Interrupted) => Ok(Read::Nothing),
                Err(ReadlineError::Eof) => Ok(Read::End),
                Err(error) => Err(error).context("cannot read from the terminal"),
            },
            Self::Pipe => {
                let mut line = String::new();
                let read = io::stdin().lock().read_line(&mut line);
                match read.context("cannot read from standard input")? {
                    0 => Ok(Read::End),
                    _ => Ok(Read::Line(line.trim_end_matches(['\n', '\r']).to_owned())),
                }
            }
        }
    }
}
