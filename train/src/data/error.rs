//! Everything that can go wrong between a folder of text and a window of tokens.

use std::{io, path::PathBuf};

use super::corpus::Problem;

/// An error of the data pipeline, naming the place and what was expected there.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A value in the `[data]` section breaks a rule.
    #[error("data.{key} = {value}: {rule}")]
    Config {
        /// The key below `data`.
        key: String,
        /// The value found.
        value: String,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// The operating system refused something.
    #[error("{}: {action}: {source}", path.display())]
    Io {
        /// The file or folder concerned.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// A source that selects nothing.
    #[error("data.sources: {source_name} matches no file")]
    NoMatch {
        /// The source as the configuration wrote it.
        source_name: String,
    },
    /// Input that cannot be used, with `on_bad_input = "refuse"`.
    #[error("{0} (data.on_bad_input = \"refuse\")")]
    BadInput(Problem),
    /// A split without documents.
    #[error("no document fell into the {split} split: {documents} documents in all; {hint}")]
    EmptySplit {
        /// `training` or `validation`.
        split: &'static str,
        /// Documents in both splits together.
        documents: u64,
        /// What to change.
        hint: &'static str,
    },
    /// The tokenizer could not be loaded, built or used.
    #[error("tokenizer {}: {what}", path.display())]
    Tokenizer {
        /// The tokenizer's file.
        path: PathBuf,
        /// What failed.
        what: String,
    },
    /// A token which a tokenizer must have is absent.
    #[error("tokenizer {}: no {role} token; looked for {looked_for}", path.display())]
    MissingToken {
        /// The tokenizer's file.
        path: PathBuf,
        /// What the token is for.
        role: &'static str,
        /// The spellings that would have been accepted.
        looked_for: String,
    },
    /// A shard that is not what its format says.
    #[error("{}: {field} is {found}, expected {expected}", path.display())]
    Shard {
        /// The `.idx` or `.bin` file.
        path: PathBuf,
        /// The field of the format.
        field: String,
        /// Its value.
        found: String,
        /// The value or rule expected.
        expected: String,
    },
    /// A split too short to fill one window.
    #[error(
        "{}: {tokens} tokens, and one window of sequence length {sequence_length} needs {}",
        path.display(), sequence_length + 1
    )]
    TooShort {
        /// The split.
        path: PathBuf,
        /// Tokens it holds.
        tokens: u64,
        /// Sequence length asked for.
        sequence_length: usize,
    },
    /// A window beyond the end of an epoch.
    #[error("window {index} asked for, and an epoch has {len}")]
    NoSuchWindow {
        /// Index asked for.
        index: u64,
        /// Windows per epoch.
        len: u64,
    },
    /// A prepared folder that is damaged.
    #[error("{}: {what}; delete the folder to prepare the data again", path.display())]
    Cache {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

impl DataError {
    /// An adapter for `map_err` on file operations.
    pub(crate) fn io(
        path: impl Into<PathBuf>,
        action: &'static str,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            path,
            action,
            source,
        }
    }
}
