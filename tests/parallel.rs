//! Runs of several ranks, as threads of a process, against runs on one device.

#[path = "support/quiet.rs"]
mod quiet;
#[path = "support/small_run.rs"]
mod small_run;

use std::{
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use burn::{tensor::Device, train::Interrupter};
use deepburn_model::{checkpoint, layer::FeedForward};
use deepburn_train::{
    config::TrainConfig,
    data::prepare,
    run::{RunOptions, RunSummary, TrainError, run},
    state::AVERAGE,
};
use small_run::{assert_close, assert_same_losses, config, latest, prepared, records, tensors};

const SCHEDULES: [&str; 4] = ["1f1b", "zb1p", "dualpipe", "dualpipe-v"];

fn start(config: &TrainConfig, resume: bool) -> Result<RunSummary, TrainError> {
    let data = prepare(&config.data, config.run.seed, &mut |_| {}).unwrap();
    let options = RunOptions {
        device: Device::flex(),
        resume,
        renderer: Some(Box::new(quiet::Quiet)),
        interrupter: Interrupter::new(),
    };
    run(config, data, options)
}

#[test]
fn every_schedule_trains_as_one_device_does() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let alone = config(dir, "alone", &[]);
    start(&alone, false).unwrap();
    let (expected, weights) = (records(&alone), tensors(&latest(&alone)));
    for ranks in [2, 4] {
        for schedule in SCHEDULES {
            let name = format!("{schedule}-{ranks}");
            let schedule = format!("parallel.schedule={schedule}");
            let pipeline = format!("parallel.pipeline={ranks}");
            let config = config(dir, &name, &[&schedule, &pipeline]);
            let summary = start(&config, false).unwrap();
            assert_eq!((summary.steps, summary.interrupted), (20, false));
            assert_same_losses(&records(&config), &expected);
            assert_close(&tensors(&latest(&config)), &weights);
            // What was written by several ranks is a model to everybody else.
            let (_, model) = checkpoint::load(&latest(&config), &Device::flex()).unwrap();
            let FeedForward::Moe(moe) = &model.layers[5].mlp else {
                panic!("dense")
            };
            let bias = moe.gate.e_score_correction_bias.val().into_data();
            assert!(bias.iter::<f32>().any(|bias| bias != 0.0));
        }
    }
}

/// Experts, layers and micro-batches divided among ranks, one by one and together.
#[test]
fn ranks_share_experts_and_micro_batches() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let alone = config(dir, "alone", &[]);
    start(&alone, false).unwrap();
    for (name, set) in [
        ("replicas", &["parallel.data=2"][..]),
        ("experts", &["parallel.expert=4"]),
        (
            "layers-and-micro-batches",
            &[
                "parallel.data=2",
                "parallel.pipeline=2",
                "parallel.schedule=dualpipe-v",
            ],
        ),
        (
            "layers-and-experts",
            &[
                "parallel.expert=2",
                "parallel.pipeline=2",
                "parallel.schedule=dualpipe-v",
            ],
        ),
        (
            "all",
            &[
                "parallel.data=2",
                "parallel.expert=2",
                "parallel.pipeline=2",
                "parallel.schedule=zb1p",
            ],
        ),
    ] {
        let config = config(dir, name, set);
        start(&config, false).unwrap();
        assert_same_losses(&records(&config), &records(&alone));
        assert_close(&tensors(&latest(&config)), &tensors(&latest(&alone)));
    }
}

/// A resumed run is the uninterrupted one, bit for bit in the same arrangement, and to rounding in any other; so is the
/// average of its weights.
#[test]
fn runs_go_on_in_any_arrangement() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let arrangements: [&[&str]; 5] = [
        &[],
        &["parallel.pipeline=2", "parallel.expert=2"],
        &["parallel.pipeline=2", "parallel.schedule=dualpipe"],
        &["parallel.pipeline=4", "parallel.schedule=1f1b"],
        &[
            "parallel.data=2",
            "parallel.pipeline=2",
            "parallel.schedule=dualpipe-v",
        ],
    ];
    let steps = [
        "run.steps=8",
        "checkpoint.interval=4",
        "validation.interval=4",
        "ema.decay=0.75",
    ];
    let config = |dir: &Path, name: &str, set: &[&str]| config(dir, name, &[set, &steps].concat());
    let weights = |config: &TrainConfig| {
        let mut all = tensors(&latest(config));
        let averages = tensors(&latest(config).join(AVERAGE)).into_iter();
        all.extend(averages.map(|(name, values)| (format!("average of {name}"), values)));
        all
    };
    let whole: Vec<_> = arrangements
        .iter()
        .zip(["a", "b", "c", "d", "e"])
        .map(|(set, name)| {
            let config = config(dir, name, set);
            start(&config, false).unwrap();
            (records(&config), weights(&config))
        })
        .collect();
    for (number, first) in arrangements.iter().enumerate() {
        let next = (number + 1) % arrangements.len();
        for (then, same) in [(number, true), (next, false)] {
            let name = format!("from-{number}-to-{then}");
            start(&config(dir, &name, first), false).unwrap();
            let resumed = config(dir, &name, arrangements[then]);
            let last = resumed.run.directory.join("checkpoints/step-00000008");
            std::fs::remove_dir_all(last).unwrap();
            start(&resumed, true).unwrap();
            let (expected, of_whole) = &whole[number];
            if same {
                assert_eq!(&records(&resumed), expected);
                assert_eq!(&weights(&resumed), of_whole);
            } else {
                assert_same_losses(&records(&resumed), expected);
                assert_close(&weights(&resumed), of_whole);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let refused = |set: &[&str]| {
        let mut set: Vec<String> = set.iter().map(|text| text.to_string()).collect();
        set.push(format!("run.directory={}", dir.join("refused").display()));
        match TrainConfig::read(&dir.join("train.toml"), &set) {
            Err(error) => error.to_string(),
            Ok(config) => start(&config, false).unwrap_err().to_string(),
        }
    };
    assert_eq!(
        refused(&["parallel.pipeline=3", "parallel.schedule=dualpipe"]),
        "parallel.pipeline = 3: DualPipe needs a positive even number"
    );
    assert_eq!(
        refused(&["parallel.data=3"]),
        "batch.accumulation = 8: must be parallel.data x parallel.expert 3 times a whole number"
    );
    assert_eq!(
        refused(&["parallel.pipeline=2", "parallel.layers=[8]"]),
        "[parallel] layers = [8]: there are 2 stages"
    );
    assert_eq!(
        refused(&["parallel.expert=16", "batch.accumulation=16"]),
        "[parallel] expert = 16: must divide n_routed_experts 8"
    );
    let mut started = Command::new(env!("CARGO_BIN_EXE_deepburn"));
    let started = started.arg("train").arg(dir.join("train.toml"));
    let output = started.env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.starts_with("error: started as one of 2 processes"),
        "{said}"
    );
    assert!(refused(&["parallel.schedule=gpipe"]).contains("unknown variant `gpipe`"));
}

/// A rank that cannot write ends all of them, and the checkpoint before is still there.
#[test]
fn an_error_on_one_rank_ends_all_and_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let steep = [
        "parallel.pipeline=2",
        "loss.sequence_balance_loss_weight=1e300",
    ];
    let config = config(dir, "failing", &steep);
    let started = Instant::now();
    let error = start(&config, false).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(30));
}

/// The program, killed at moments that differ: what is there can be gone on from.
#[test]
fn a_killed_job_leaves_whole_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let set = [
        "parallel.pipeline=2",
        "parallel.schedule=dualpipe-v",
        "checkpoint.interval=2",
    ];
    let whole = config(dir, "whole", &set);
    start(&whole, false).unwrap();
    let killed = config(dir, "killed", &set);
    let directory = &killed.run.directory;
    let train = |resume: bool| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_deepburn"));
        command.arg("train").arg(dir.join("train.toml"));
        for set in set {
            command.args(["--set", set]);
        }
        let directory = format!("run.directory={}", directory.display());
        command.arg("--set").arg(directory);
        if resume {
            command.arg("--resume");
        }
        command.stdout(Stdio::null()).spawn().unwrap()
    };
    let lines = || {
        let text = std::fs::read_to_string(directory.join("metrics.jsonl"));
        text.map_or(0, |text| text.lines().count())
    };
    for round in 0..3 {
        let resume = directory.join("checkpoints/latest").exists();
        if !resume {
            let _ = std::fs::remove_dir_all(directory);
        }
        let before = lines();
        let mut child = train(resume);
        let deadline = Instant::now() + Duration::from_secs(60);
        while lines() < before.max(1) + 4 * round && child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "no progress");
            std::thread::sleep(Duration::from_millis(3));
        }
        std::thread::sleep(Duration::from_millis(7 * round as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        if directory.join("checkpoints/latest").exists() {
            checkpoint::load(&latest(&killed), &Device::flex()).unwrap();
        }
    }
    let resume = directory.join("checkpoints/latest").exists();
    assert!(train(resume).wait().unwrap().success());
    assert_eq!(records(&killed), records(&whole));
}
