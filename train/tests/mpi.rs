//! Processes as ranks: what holds for every communicator, and how failures end.
//!
//! Started by a test runner, this program starts itself under `mpirun`, once per case. Where there is no `mpirun` it says
//! that it skips.

#[path = "parallel/suite.rs"]
mod suite;

use std::{
    env,
    process::{Command, ExitCode, Output},
    time::{Duration, Instant},
};

use deepburn_train::parallel::{
    CommError, Communicator, Transfer,
    mpi::{MpiOptions, start},
};

const CASE: &str = "DEEPBURN_MPI_CASE";

/// Name, number of processes, and what has to hold.
type Case = (&'static str, usize, fn(&Output));

const CASES: [Case; 5] = [
    ("suite", 4, |output| succeeded(output)),
    ("suite-on-nodes", 4, |output| succeeded(output)),
    ("abort", 3, |output| {
        says(output, "rank 1 gave up: the disk is full", 2)
    }),
    ("hang", 2, |output| {
        says(output, "waits in PointToPoint to receive from", 2)
    }),
    ("death", 3, |output| {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!text.contains("went on"), "{output:?}");
    }),
];

fn main() -> ExitCode {
    if let Ok(case) = env::var(CASE) {
        return rank(&case);
    }
    if env::args().any(|argument| argument == "--list") {
        if !env::args().any(|argument| argument == "--ignored") {
            println!("mpi: test");
        }
        return ExitCode::SUCCESS;
    }
    if Command::new("mpirun").arg("--version").output().is_err() {
        println!("skipped: there is no mpirun");
        return ExitCode::SUCCESS;
    }
    for (case, ranks, holds) in CASES {
        let started = Instant::now();
        let output = Command::new("mpirun")
            .args(["-n", &ranks.to_string()])
            .arg(env::current_exe().expect("a running program"))
            .env(CASE, case)
            // As --oversubscribe for Open MPI 4 and 5. Other implementations need no leave.
            .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
            .env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
            // Open MPI asks for these where tests run as root.
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .output()
            .expect("mpirun starts");
        let took = started.elapsed();
        assert!(
            took < Duration::from_secs(60),
            "{case} took {took:?}: {output:?}"
        );
        assert_eq!(
            output.status.success(),
            case.starts_with("suite"),
            "{case}: {output:?}"
        );
        holds(&output);
        println!("{case}: {ranks} processes, {took:.1?}");
    }
    ExitCode::SUCCESS
}

fn succeeded(output: &Output) {
    says(output, "all hold", 4);
}

fn says(output: &Output, what: &str, times: usize) {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.matches(what).count() >= times, "{what}: {output:?}");
}

fn rank(case: &str) -> ExitCode {
    let options = MpiOptions {
        deadline: Duration::from_secs(if case == "hang" { 1 } else { 30 }),
        nodes: (case == "suite-on-nodes").then(|| vec![0, 0, 1, 1]),
    };
    match on_each_rank(case, options) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn on_each_rank(case: &str, options: MpiOptions) -> Result<&'static str, CommError> {
    let (_session, world) = start(options)?;
    let other = (world.rank() + 1) % world.size();
    let receive = || {
        let (from, into) = (other, &mut [0][..]);
        world.batch_p2p(&mut [Transfer::Receive { from, into }])
    };
    match (case, world.rank()) {
        ("suite", _) => {
            assert!(world.nodes().iter().all(|&node| node == 0), "one machine");
            suite::all(&world)?;
            Ok("all hold")
        }
        ("suite-on-nodes", _) => {
            assert_eq!(world.nodes(), [0, 0, 1, 1]);
            suite::all(&world)?;
            Ok("all hold")
        }
        ("abort", 1) => {
            world.abort("the disk is full");
            world.barrier()?;
            Ok("went on")
        }
        ("death", 1) => std::process::abort(),
        _ => {
            // Nobody sends.
            receive()?;
            Ok("went on")
        }
    }
}
