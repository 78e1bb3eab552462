//! Deepburn's command line: train, inspect and run models of the DeepSeek-V3 architecture.
//!
//! One file per subcommand, each of them thin: parse, call a crate, render.

mod allocator;
mod bench;
mod chat;
mod convert;
mod counting;
mod device;
mod eval;
mod generate;
mod generate_many;
mod inspect;
mod model_dir;
mod model_service;
mod pipeline;
mod plan;
mod progress;
mod ranks;
mod serve;
mod signals;
mod step_lines;
mod train;
mod verify;

use std::{
    io::{self, ErrorKind, Write},
    ops::ControlFlow,
    process::ExitCode,
};

use clap::{Parser, Subcommand};

const EXIT_CODES: &str = "Exit codes:
  0    success
  1    failure
  2    wrong usage
  101  a bug in deepburn
  130  interrupted";

/// What a shell reports of a process that was interrupted: 128 plus the signal's number.
const INTERRUPTED: u8 = 130;

/// Train, inspect and run models of the DeepSeek-V3 architecture.
#[derive(Debug, Parser)]
#[command(name = "deepburn", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a model, or go on with a run
    #[command(after_help = EXIT_CODES)]
    Train(train::Args),
    #[command(after_help = EXIT_CODES)]
    Generate(generate::Args),
    #[command(after_help = EXIT_CODES)]
    Eval(eval::Args),
    #[command(after_help = EXIT_CODES)]
    Bench(bench::Args),
    #[command(after_help = EXIT_CODES)]
    Chat(chat::Args),
    #[command(after_help = EXIT_CODES)]
    Serve(serve::Args),
    #[command(after_help = EXIT_CODES)]
    Inspect(inspect::Args),
    #[command(after_help = verify::EXIT_CODES)]
    Verify(verify::Args),
    #[command(after_help = EXIT_CODES)]
    Convert(convert::Args),
    #[command(after_help = EXIT_CODES)]
    Pipeline(pipeline::Args),
    #[command(after_help = EXIT_CODES)]
    Plan(plan::Args),
}

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    report_bugs();
    let command = Cli::parse().command;
    let result = match command {
        Command::Train(args) => among_the_threads(|| train::run(args)),
        Command::Generate(args) => among_the_threads(|| generate::run(args)),
        Command::Eval(args) => among_the_threads(|| eval::run(args)),
        Command::Bench(args) => among_the_threads(|| bench::run(args)),
        // These wait for others, and a thread of the service computes.
        Command::Chat(args) => chat::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Inspect(args) => among_the_threads(|| inspect::run(args)),
        Command::Verify(args) => among_the_threads(|| verify::run(args)),
        Command::Convert(args) => among_the_threads(|| convert::run(args)),
        Command::Pipeline(args) => among_the_threads(|| pipeline::run(args)),
        Command::Plan(args) => among_the_threads(|| plan::run(args)),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {}", with_causes(&error));
        ExitCode::FAILURE
    })
}

/// Runs the command as one of the threads that compute, of which it would otherwise be one more than there are
/// processors, and wait for a wake-up at every operation. A single one stays free for others that wait for it.
fn among_the_threads<R: Send>(command: impl FnOnce() -> R + Send) -> R {
    if rayon::current_num_threads() == 1 {
        return command();
    }
    rayon::scope(|_| command())
}

/// The message of an error and those of its causes that it does not already quote.
fn with_causes(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text += "\n  because: ";
            text += &cause;
        }
    }
    text
}

/// A panic is a bug of ours: one line that asks for a report, unless a developer asked for the whole story.
fn report_bugs() {
    if std::env::var_os("RUST_BACKTRACE").is_none_or(|value| value == "0") {
        std::panic::set_hook(Box::new(|info| {
            let place = info.location().map(ToString::to_string);
            let message = info.payload_as_str().unwrap_or("no message");
            eprintln!(
                "{}",
                bug_report(message, place.as_deref().unwrap_or("an unknown place"))
            );
        }));
    }
}

fn bug_report(message: &str, place: &str) -> String {
    format!(
        "error: a bug in deepburn {}, please report it at {}/issues: {} (at {place}; RUST_BACKTRACE=1 shows more)",
        env!("CARGO_PKG_VERSION"),
        env!("CARGO_PKG_REPOSITORY"),
        message.split_whitespace().collect::<Vec<_>>().join(" "),
    )
}

/// Writes to standard output at once. `Break` if nobody reads it any more, as in `deepburn ... | head`, which is no
/// error: `println!` would panic.
fn print_now(text: &str) -> io::Result<ControlFlow<()>> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_bug_is_reported_on_one_line() {
        let report = bug_report("index 3\n  of 2", "a.rs:7:1");
        assert!(report.starts_with("error: a bug in deepburn "), "{report}");
        let end = "/issues: index 3 of 2 (at a.rs:7:1; RUST_BACKTRACE=1 shows more)";
        assert!(report.ends_with(end), "{report}");
    }

    #[test]
    fn causes_are_told_once() {
        let inner = || Err::<(), _>(anyhow::anyhow!("no space left"));
        let quoted = inner().context("a/b: no space left").unwrap_err();
        assert_eq!(with_causes(&quoted), "a/b: no space left");
        let told = inner().context("cannot save").unwrap_err();
        assert_eq!(with_causes(&told), "cannot save\n  because: no space left");
    }
}
