//! Pipeline schedules: equal to the reference, valid at every size, as long as the report says; and the commands that
//! show and verify them.

mod broken;
mod command;
mod reference;
mod sizes;
mod verify;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use deepburn_train::pipeline::schedule::{Schedule, Timeline};

/// Ranks and micro-batches that `schedule` is made for, with up to 16 ranks.
fn sizes(schedule: Schedule) -> impl Iterator<Item = (usize, usize)> {
    (1..=16).flat_map(move |ranks| {
        let micro_batches: Vec<usize> = match schedule {
            Schedule::OneFOneB | Schedule::ZeroBubble => {
                (1..=2 * ranks + 3).chain([5 * ranks]).collect()
            }
            Schedule::DualPipe => (ranks..ranks + 5).map(|half| 2 * half).collect(),
            Schedule::DualPipeV => (2 * ranks..2 * ranks + 5).chain([5 * ranks]).collect(),
        };
        let fits = schedule != Schedule::DualPipe || ranks % 2 == 0;
        let sizes = move |micro_batches| (ranks, micro_batches);
        micro_batches.into_iter().filter(move |_| fits).map(sizes)
    })
}

#[track_caller]
fn timeline(schedule: Schedule, ranks: usize, micro_batches: usize) -> Timeline {
    let timeline = schedule.timeline(ranks, micro_batches);
    timeline.unwrap_or_else(|refused| panic!("{schedule:?} {ranks} {micro_batches}: {refused}"))
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/dualpipe")
}

fn deepburn(args: &[&str]) -> Output {
    let binary = env!("CARGO_BIN_EXE_deepburn");
    let output = Command::new(binary)
        .args(args)
        .stdin(Stdio::null())
        .output();
    output.expect("the binary starts")
}

/// What a run that ends with `code` prints, to standard output and standard error.
#[track_caller]
fn ends(code: i32, args: &[&str]) -> (String, String) {
    let output = deepburn(args);
    let (out, error) = (output.stdout, output.stderr);
    let (out, error) = (
        String::from_utf8(out).unwrap(),
        String::from_utf8(error).unwrap(),
    );
    assert_eq!(output.status.code(), Some(code), "{args:?}: {out}{error}");
    (out, error)
}
