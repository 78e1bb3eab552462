//! Runs of several ranks, as threads of a process, against runs on one device.

#[path = "support/quiet.rs"]
mod quiet;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use burn::{tensor::Device, train::Interrupter};
use deepburn_model::{checkpoint, config::ModelConfig, layer::FeedForward};
use deepburn_train::{
    config::TrainConfig,
    data::prepare,
    metrics::{self, Record},
    report::StepReport,
    run::{RunOptions, RunSummary, TrainError, run},
};
use safetensors::SafeTensors;

const SCHEDULES: [&str; 4] = ["1f1b", "zb1p", "dualpipe", "dualpipe-v"];

/// A corpus, a model of eight layers and a configuration in `dir`.
fn prepared(dir: &Path) {
    let corpus = dir.join("corpus");
    std::fs::create_dir(&corpus).unwrap();
    for file in 0..40 {
        let lines = (0..60).map(|line| {
            let number = (file * 7919 + line * 104_729) % 9973;
            format!(
                "fn item_{}(x: u32) -> u32 {{ x * {number} + {line} }}\n",
                number % 13
            )
        });
        std::fs::write(corpus.join(format!("{file}.rs")), lines.collect::<String>()).unwrap();
    }
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/tiny.json");
    let shape = ModelConfig {
        hidden_size: 32,
        intermediate_size: 48,
        moe_intermediate_size: 16,
        num_hidden_layers: 8,
        ..checkpoint::read_config(&tiny).unwrap()
    };
    let text = checkpoint::hf_config::render(&shape, checkpoint::StoredType::F32);
    std::fs::write(dir.join("model.json"), text).unwrap();
    let text = format!(
        r#"
        [run]
        directory = "{dir}/run"
        steps = 20
        seed = 3
        [model]
        config = "model.json"
        [data]
        sources = [{{ path = "{dir}/corpus" }}]
        tokenizer = {{ vocab_size = 300, max_train_bytes = 100000 }}
        validation_fraction = 0.2
        fim_rate = 0.1
        document_mask = true
        cache_dir = "{dir}/cache"
        [batch]
        sequences = 1
        sequence_length = 16
        accumulation = 8
        [schedule]
        peak = 1e-3
        warmup_steps = 3
        [validation]
        interval = 10
        windows = 4
        [checkpoint]
        interval = 10
        "#,
        dir = dir.display()
    );
    std::fs::write(dir.join("train.toml"), text).unwrap();
}

fn config(dir: &Path, name: &str, set: &[&str]) -> TrainConfig {
    let mut set: Vec<String> = set.iter().map(|text| text.to_string()).collect();
    set.push(format!("run.directory={}", dir.join(name).display()));
    TrainConfig::read(&dir.join("train.toml"), &set).unwrap()
}

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

fn records(config: &TrainConfig) -> Vec<Record> {
    let timeless = |report| StepReport {
        tokens_per_second: None,
        memory_bytes: None,
        ..report
    };
    let records = metrics::read(&config.run.directory.join("metrics.jsonl")).unwrap();
    let records = records.into_iter().map(|record| match record {
        Record::Train(report) => Record::Train(timeless(report)),
        Record::Validation(report) => Record::Validation(timeless(report)),
    });
    records.collect()
}

/// Losses to 1e-5; expert loads, which the violations are made of, exactly.
fn assert_same_losses(found: &[Record], expected: &[Record]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let ((Record::Train(found), Record::Train(expected))
        | (Record::Validation(found), Record::Validation(expected))) = (found, expected)
        else {
            panic!("a step where a validation is expected")
        };
        let losses = |report: &StepReport| {
            let mut losses = vec![report.loss, report.main, report.balance];
            losses.extend(&report.mtp);
            losses.extend(report.gradient_norm);
            losses
        };
        for (a, b) in losses(found).into_iter().zip(losses(expected)) {
            assert!(
                (a - b).abs() <= 1e-5 * b.abs().max(1.0),
                "step {}: {a}, expected {b}",
                found.step
            );
        }
        assert_eq!(found.max_violation, expected.max_violation);
        assert_eq!(
            (found.step, found.predicted_tokens, found.learning_rate),
            (
                expected.step,
                expected.predicted_tokens,
                expected.learning_rate
            )
        );
    }
}

fn latest(config: &TrainConfig) -> PathBuf {
    config.run.directory.join("checkpoints/latest")
}

/// Every stored tensor of a checkpoint, in one file or several.
fn tensors(folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let files = std::fs::read_dir(folder).unwrap();
    let files = files.map(|file| file.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    let mut all = BTreeMap::new();
    for path in files {
        let bytes = std::fs::read(path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let values = view.data().chunks_exact(4);
            let values = values.map(|v| f32::from_le_bytes(v.try_into().unwrap()));
            all.insert(name, values.collect());
        }
    }
    all
}

fn assert_close(found: &BTreeMap<String, Vec<f32>>, expected: &BTreeMap<String, Vec<f32>>) {
    assert!(found.keys().eq(expected.keys()));
    for (name, values) in expected {
        let is_bias = name.ends_with(".e_score_correction_bias");
        for (a, b) in found[name].iter().zip(values) {
            let bound = if is_bias { 0.0 } else { 1e-5 };
            assert!((a - b).abs() <= bound, "{name}: {a}, expected {b}");
        }
    }
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

#[test]
fn replicas_share_the_micro_batches() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let alone = config(dir, "alone", &[]);
    start(&alone, false).unwrap();
    for (name, set) in [
        ("replicas", &["parallel.data=2"][..]),
        (
            "both",
            &[
                "parallel.data=2",
                "parallel.pipeline=2",
                "parallel.schedule=dualpipe-v",
            ],
        ),
    ] {
        let config = config(dir, name, set);
        start(&config, false).unwrap();
        assert_same_losses(&records(&config), &records(&alone));
        assert_close(&tensors(&latest(&config)), &tensors(&latest(&alone)));
    }
}

/// A resumed run is the uninterrupted one, bit for bit in the same arrangement, and to rounding in any other.
#[test]
fn runs_go_on_in_any_arrangement() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    prepared(dir);
    let arrangements: [&[&str]; 4] = [
        &[],
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
    ];
    let config = |dir: &Path, name: &str, set: &[&str]| config(dir, name, &[set, &steps].concat());
    let whole: Vec<_> = arrangements
        .iter()
        .zip(["a", "b", "c", "d"])
        .map(|(set, name)| {
            let config = config(dir, name, set);
            start(&config, false).unwrap();
            (records(&config), tensors(&latest(&config)))
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
            let (expected, weights) = &whole[number];
            if same {
                assert_eq!(&records(&resumed), expected);
                assert_eq!(&tensors(&latest(&resumed)), weights);
            } else {
                assert_same_losses(&records(&resumed), expected);
                assert_close(&tensors(&latest(&resumed)), weights);
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
        refused(&["parallel.expert=2"]),
        "[parallel] expert = 2: must be 1, every rank has all experts of its layers"
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
