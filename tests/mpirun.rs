//! Runs of several processes under `mpirun`, against runs of one.
//!
//! Skips, and says so, where there is no `mpirun`.

#[path = "support/small_run.rs"]
mod small_run;

use std::{
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use burn::tensor::Device;
use deepburn_model::checkpoint;
use deepburn_train::config::TrainConfig;
use small_run::{assert_close, assert_same_losses, config, latest, prepared, records, tensors};

const DEEPBURN: &str = env!("CARGO_BIN_EXE_deepburn");

fn mpirun() -> Option<Command> {
    let mut command = Command::new("mpirun");
    if command.arg("--version").output().is_err() {
        println!("skipped: there is no mpirun");
        return None;
    }
    let mut command = Command::new("mpirun");
    command
        // As --oversubscribe for Open MPI 4 and 5. Other implementations need no leave.
        .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
        .env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
        // Open MPI asks for these where tests run as root.
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("RAYON_NUM_THREADS", "1");
    Some(command)
}

fn training(command: &mut Command, config: &TrainConfig, set: &[&str]) {
    let directory = &config.run.directory;
    let file = directory
        .parent()
        .expect("a folder of the test")
        .join("train.toml");
    command.arg(DEEPBURN).arg("train").arg(file);
    let directory = format!("run.directory={}", directory.display());
    for set in set.iter().copied().chain([directory.as_str()]) {
        command.args(["--set", set]);
    }
}

/// One process, which is what the others are compared with.
fn alone(dir: &Path) -> TrainConfig {
    let config = config(dir, "alone", &[]);
    let mut command = Command::new("env");
    training(&mut command, &config, &[]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    config
}

#[test]
fn processes_train_as_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let Some(_) = mpirun() else { return };
    let alone = alone(dir);
    for (name, set) in [
        (
            "dualpipe",
            &["parallel.pipeline=4", "parallel.schedule=dualpipe"][..],
        ),
        (
            "dualpipe-v",
            &["parallel.pipeline=4", "parallel.schedule=dualpipe-v"],
        ),
        ("experts", &["parallel.expert=4"]),
        (
            "layers-and-experts",
            &[
                "parallel.pipeline=2",
                "parallel.expert=2",
                "parallel.schedule=dualpipe-v",
            ],
        ),
        ("replicas", &["parallel.data=2"]),
    ] {
        let config = config(dir, name, set);
        let ranks = config.parallel.mesh().ranks();
        let mut command = mpirun().expect("found before");
        command.args(["-n", &ranks.to_string()]);
        training(&mut command, &config, set);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{name}: {output:?}");
        // One of them speaks.
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(said.matches("checkpoint: ").count(), 1, "{name}: {said}");
        assert_same_losses(&records(&config), &records(&alone));
        assert_close(&tensors(&latest(&config)), &tensors(&latest(&alone)));
    }
}

#[test]
fn processes_that_differ_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let Some(mut command) = mpirun() else { return };
    let set = ["parallel.data=2"];
    let config = config(dir, "run", &set);
    command.args(["-n", "1"]);
    training(&mut command, &config, &set);
    command.args([":", "-n", "1"]);
    training(
        &mut command,
        &config,
        &["parallel.data=2", "schedule.peak=2e-3"],
    );
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    let told = said.matches("rank 1 differs from rank 0 in [schedule]");
    assert_eq!(told.count(), 1, "{said}");
}

#[test]
fn the_number_of_processes_has_to_fit() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let Some(mut command) = mpirun() else { return };
    let config = config(dir, "run", &["parallel.data=2"]);
    command.args(["-n", "3"]);
    training(&mut command, &config, &["parallel.data=2"]);
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    let rule = "[parallel] ranks = 3: data 2 x pipeline 1 x expert 1 needs as many";
    assert!(said.contains(rule), "{said}");
}

#[test]
fn nccl_needs_gpus() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let Some(mut command) = mpirun() else { return };
    let set = ["parallel.data=2", "parallel.communicator=nccl"];
    let config = config(dir, "run", &set);
    command.args(["-n", "2"]);
    training(&mut command, &config, &set);
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    let rule = "parallel.communicator = \"nccl\": needs --device cuda, found cpu";
    assert!(said.contains(rule), "{said}");
}

/// The processes of a job, found by what they were started with.
fn processes_of(config: &TrainConfig) -> Vec<u32> {
    let directory = config.run.directory.display().to_string();
    let mut found: Vec<u32> = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|id: &u32| {
            let words = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words);
            words.starts_with(DEEPBURN) && words.contains(&directory)
        })
        .collect();
    found.sort_unstable();
    found
}

fn signal(process: u32, name: &str) {
    let status = Command::new("kill")
        .args([name, &process.to_string()])
        .status();
    assert!(status.unwrap().success());
}

fn wait_for(child: &mut Child, what: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !what() && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "no progress");
        thread::sleep(Duration::from_millis(3));
    }
}

fn lines_of_metrics(config: &TrainConfig) -> usize {
    let text = std::fs::read_to_string(config.run.directory.join("metrics.jsonl"));
    text.map_or(0, |text| text.lines().count())
}

fn ended(mut child: Child, within: Duration) -> Output {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < within, "still running");
        thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

/// One of four, killed at 20 moments: the others end, and what is there can be gone on from.
#[test]
fn a_killed_rank_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let Some(_) = mpirun() else { return };
    let set = [
        "run.steps=60",
        "parallel.pipeline=2",
        "parallel.expert=2",
        "checkpoint.interval=2",
        "checkpoint.keep=2",
    ];
    let run = |config: &TrainConfig, resume: bool| {
        let mut command = mpirun().expect("found before");
        command.args(["-n", "4"]);
        training(&mut command, config, &set);
        if resume {
            command.arg("--resume");
        }
        command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let whole = config(dir, "whole", &set);
    assert!(run(&whole, false).wait().unwrap().success());
    let killed = config(dir, "killed", &set);
    let saved = || killed.run.directory.join("checkpoints/latest").exists();
    for round in 0..20u64 {
        let before = lines_of_metrics(&killed);
        if !saved() {
            let _ = std::fs::remove_dir_all(&killed.run.directory);
        }
        let mut child = run(&killed, saved());
        let advanced = || lines_of_metrics(&killed) > before.max(1) + 1;
        wait_for(&mut child, advanced);
        if !advanced() {
            let output = child.wait_with_output().unwrap();
            panic!("{}", String::from_utf8_lossy(&output.stderr));
        }
        thread::sleep(Duration::from_millis(11 * round % 40));
        let processes = processes_of(&killed);
        if let Some(&process) = processes.get(round as usize % 4) {
            signal(process, "-KILL");
        }
        ended(child, Duration::from_secs(10));
        assert!(processes_of(&killed).is_empty(), "a rank goes on");
        if saved() {
            checkpoint::load(&latest(&killed), &Device::flex()).unwrap();
        }
    }
    let last = run(&killed, saved()).wait_with_output().unwrap();
    assert!(last.status.success(), "{last:?}");
    assert_eq!(records(&killed), records(&whole));
}

/// A rank that stands still is noticed, and it is said who waits for it.
#[test]
fn a_hang_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let Some(mut command) = mpirun() else { return };
    let set = [
        "run.steps=100000",
        "parallel.pipeline=2",
        "parallel.deadline=2",
    ];
    let config = config(dir, "run", &set);
    command.args(["-n", "2"]);
    training(&mut command, &config, &set);
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for(&mut child, || lines_of_metrics(&config) > 3);
    let processes = processes_of(&config);
    signal(processes[1], "-STOP");
    let output = ended(child, Duration::from_secs(30));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    let (_, told) = said
        .split_once("no progress for 2s: rank 0 waits in ")
        .unwrap_or_default();
    assert!(
        told.lines()
            .next()
            .is_some_and(|line| line.ends_with(" [1]")),
        "{said}"
    );
}
