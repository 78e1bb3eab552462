//! Training runs that are interrupted and resumed. Their steps are held against references in `parity.rs`.

#[path = "support/corpus.rs"]
mod corpus;
#[path = "support/quiet.rs"]
mod quiet;
mod support;

use std::path::Path;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Device, Tensor},
    train::Interrupter,
};
use deepburn_model::{checkpoint, layer::FeedForward, transformer::Transformer};
use deepburn_train::{
    config::TrainConfig,
    data::prepare,
    metrics::{self, Record},
    report::StepReport,
    run::{RunOptions, RunSummary, TrainError, run},
    state::{AVERAGE, StateError},
};
use support::fixture;

/// A corpus and a configuration in `dir`.
fn small_run(dir: &Path, set: &[&str]) -> TrainConfig {
    let corpus = dir.join("corpus");
    if !corpus.exists() {
        corpus::write(&corpus);
        std::fs::copy(
            fixture("tiny-mtp").join("config.json"),
            dir.join("model.json"),
        )
        .unwrap();
        let text = format!(
            r#"
            [run]
            directory = "{dir}/run"
            steps = 12
            seed = 3
            [model]
            config = "model.json"
            [data]
            sources = [{{ path = "{dir}/corpus" }}]
            tokenizer = {{ vocab_size = 300, max_train_bytes = 100000 }}
            validation_fraction = 0.2
            fim_rate = 0.1
            cache_dir = "{dir}/cache"
            [batch]
            sequences = 2
            sequence_length = 32
            accumulation = 2
            [schedule]
            peak = 1e-3
            warmup_steps = 3
            [validation]
            interval = 5
            windows = 4
            [checkpoint]
            interval = 4
            "#,
            dir = dir.display()
        );
        std::fs::write(dir.join("train.toml"), text).unwrap();
    }
    let set: Vec<String> = set.iter().map(|text| text.to_string()).collect();
    TrainConfig::read(&dir.join("train.toml"), &set).unwrap()
}

fn start(
    config: &TrainConfig,
    resume: bool,
    interrupter: Interrupter,
) -> Result<RunSummary, TrainError> {
    start_on(Device::flex(), config, resume, interrupter)
}

fn start_on(
    device: Device,
    config: &TrainConfig,
    resume: bool,
    interrupter: Interrupter,
) -> Result<RunSummary, TrainError> {
    let data = prepare(&config.data, config.run.seed, &mut |_| {}).unwrap();
    let renderer = Some(Box::new(quiet::Quiet) as _);
    run(
        config,
        data,
        RunOptions {
            device,
            resume,
            renderer,
            interrupter,
        },
    )
}

/// All that must not depend on time.
fn lasting(run: &Path) -> Vec<Record> {
    let records = metrics::read(&run.join("metrics.jsonl")).unwrap();
    records.into_iter().map(Record::lasting).collect()
}

#[test]
fn a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let whole = small_run(dir.path(), &[]);
    let summary = start(&whole, false, Interrupter::new()).unwrap();
    assert_eq!((summary.steps, summary.interrupted), (12, false));
    let expected = lasting(&whole.run.directory);
    assert_eq!(expected.len(), 12 + 3, "a line per step and validation");

    // Killed at some step: what is left is the newest checkpoint, a log that went further, and half a checkpoint.
    let killed = small_run(
        dir.path(),
        &[&format!("run.directory={}/killed", dir.path().display())],
    );
    start(&killed, false, Interrupter::new()).unwrap();
    let checkpoints = killed.run.directory.join("checkpoints");
    std::fs::remove_dir_all(checkpoints.join("step-00000012")).unwrap();
    std::fs::create_dir(checkpoints.join(".step-00000012.tmp")).unwrap();
    let summary = start(&killed, true, Interrupter::new()).unwrap();
    assert_eq!(summary.steps, 12);
    assert_eq!(lasting(&killed.run.directory), expected);

    // Asked to stop: saves after the step under way.
    let stopped = small_run(
        dir.path(),
        &[&format!("run.directory={}/stopped", dir.path().display())],
    );
    let interrupter = Interrupter::new();
    interrupter.stop(Some("test"));
    let summary = start(&stopped, false, interrupter).unwrap();
    assert_eq!((summary.steps, summary.interrupted), (1, true));
    start(&stopped, true, Interrupter::new()).unwrap();
    assert_eq!(lasting(&stopped.run.directory), expected);

    // The final weights are the same too, and the bias has moved.
    let weights = |config: &TrainConfig| {
        std::fs::read(
            config
                .run
                .directory
                .join("checkpoints/latest/model.safetensors"),
        )
        .unwrap()
    };
    assert_eq!(weights(&whole), weights(&killed));
    assert_eq!(weights(&whole), weights(&stopped));
    let (_, model) = checkpoint::load(
        &whole.run.directory.join("checkpoints/latest"),
        &Device::flex(),
    )
    .unwrap();
    let FeedForward::Moe(moe) = &model.layers[1].mlp else {
        panic!("dense")
    };
    let bias = moe.gate.e_score_correction_bias.val().into_data();
    assert!(bias.iter::<f32>().any(|bias| bias != 0.0));
}

/// The program itself, killed at moments that differ from run to run.
#[test]
fn a_killed_process_goes_on_where_its_last_checkpoint_was() {
    let dir = tempfile::tempdir().unwrap();
    let long = ["run.steps=40", "checkpoint.interval=3"];
    let whole = small_run(dir.path(), &long);
    start(&whole, false, Interrupter::new()).unwrap();
    let expected = lasting(&whole.run.directory);

    let directory = dir.path().join("killed");
    let log = directory.join("metrics.jsonl");
    let train = |resume: bool| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_deepburn"));
        command.arg("train").arg(dir.path().join("train.toml"));
        for set in long {
            command.args(["--set", set]);
        }
        command
            .arg("--set")
            .arg(format!("run.directory={}", directory.display()));
        if resume {
            command.arg("--resume");
        }
        command.stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let lines = || std::fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    for round in 0..3 {
        let resume = directory.join("checkpoints/latest").exists();
        if !resume {
            // Killed before the first checkpoint: there is nothing to lose yet.
            let _ = std::fs::remove_dir_all(&directory);
        }
        let before = lines();
        let mut child = train(resume);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while lines() < before.max(1) + 7 * round && child.try_wait().unwrap().is_none() {
            assert!(std::time::Instant::now() < deadline, "no progress");
            std::thread::sleep(std::time::Duration::from_millis(3));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let resume = directory.join("checkpoints/latest").exists();
    assert!(train(resume).wait().unwrap().success());
    assert_eq!(lasting(&directory), expected);
}

#[test]
fn steps_of_a_resumed_run_are_told_by_their_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let run = small_run(dir.path(), &["run.steps=5", "validation.interval=2"]);
    start(&run, false, Interrupter::new()).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_deepburn"))
        .arg("train")
        .arg(dir.path().join("train.toml"))
        .args(["--set", "run.steps=7", "--set", "validation.interval=2"])
        .arg("--set")
        .arg(format!("run.directory={}", run.run.directory.display()))
        .arg("--resume")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    let steps: Vec<&str> = said
        .lines()
        .filter_map(|line| line.strip_prefix("step ")?.split(' ').next())
        .collect();
    assert_eq!(steps, ["6/7", "7/7"], "{said}");
}

#[test]
fn runs_are_not_overwritten_and_not_resumed_differently() {
    let dir = tempfile::tempdir().unwrap();
    let config = small_run(dir.path(), &["run.steps=2"]);
    let error = start(&config, true, Interrupter::new()).unwrap_err();
    assert!(
        matches!(error, TrainError::State(StateError::None { .. })),
        "{error}"
    );
    start(&config, false, Interrupter::new()).unwrap();
    let error = start(&config, false, Interrupter::new()).unwrap_err();
    assert!(matches!(error, TrainError::Exists { .. }), "{error}");
    let other = small_run(dir.path(), &["run.steps=4", "batch.sequences=3"]);
    let error = start(&other, true, Interrupter::new())
        .unwrap_err()
        .to_string();
    assert!(error.contains("batch was"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_update() {
    let dir = tempfile::tempdir().unwrap();
    let config = small_run(dir.path(), &["loss.sequence_balance_loss_weight=1e300"]);
    let error = start(&config, false, Interrupter::new()).unwrap_err();
    assert!(matches!(error, TrainError::NotFinite { .. }), "{error}");
}

#[test]
fn gradients_that_are_not_finite_halt_or_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    // Weights so large after the first step that products overflow in the backward pass alone.
    let steep = ["schedule.peak=1e30", "schedule.warmup_steps=0"];
    let config = small_run(dir.path(), &steep);
    let error = start(&config, false, Interrupter::new()).unwrap_err();
    let named = "step 2: the gradients of embed_tokens.weight, ";
    assert!(error.to_string().starts_with(named), "{error}");

    let folder = format!("run.directory={}/skipping", dir.path().display());
    let skipping = [&steep[..], &["optimizer.non_finite=skip", &folder]].concat();
    let config = small_run(dir.path(), &skipping);
    let summary = start(&config, false, Interrupter::new()).unwrap();
    assert_eq!(summary.steps, 12);
    let records = lasting(&config.run.directory).into_iter();
    let steps: Vec<StepReport> = records
        .filter_map(|record| match record {
            Record::Train(report) => Some(report),
            Record::Validation(_) => None,
        })
        .collect();
    let skipped: Vec<_> = steps.iter().map(|step| step.skipped_steps).collect();
    assert_eq!(skipped[0], None);
    assert!(
        skipped[1..]
            .iter()
            .eq((1..12).map(Some).collect::<Vec<_>>().iter()),
        "{skipped:?}"
    );
    assert!(steps[2].gradient_norm.is_none());
}

/// In every precision a resumed run repeats the other; moments are kept in the type that the table says.
#[test]
fn lower_precisions_resume_bit_for_bit_with_smaller_moments() {
    let dir = tempfile::tempdir().unwrap();
    let mut sizes = Vec::new();
    for precision in ["fp32", "bf16", "fp8"] {
        let set = |name: &str| format!("run.directory={}/{precision}-{name}", dir.path().display());
        let precision = format!("precision={precision}");
        let (whole, parts) = (set("whole"), set("parts"));
        let whole = small_run(dir.path(), &[&precision, &whole]);
        start(&whole, false, Interrupter::new()).unwrap();
        let killed = small_run(dir.path(), &[&precision, &parts]);
        start(&killed, false, Interrupter::new()).unwrap();
        let last = killed.run.directory.join("checkpoints/step-00000012");
        std::fs::remove_dir_all(last).unwrap();
        start(&killed, true, Interrupter::new()).unwrap();
        assert_eq!(
            lasting(&killed.run.directory),
            lasting(&whole.run.directory)
        );
        let again = ["memory.recompute=true", &precision, &set("again")];
        let again = small_run(dir.path(), &again);
        start(&again, false, Interrupter::new()).unwrap();
        assert_eq!(lasting(&again.run.directory), lasting(&whole.run.directory));
        let file = |name: &str| whole.run.directory.join("checkpoints/latest").join(name);
        let weights = std::fs::metadata(file("model.safetensors")).unwrap().len() as f64;
        let moments = std::fs::metadata(file("training/optimizer.bpk"))
            .unwrap()
            .len() as f64;
        // Weights are in four bytes each; names and shapes take little.
        sizes.push((4.0 * moments / weights, lasting(&whole.run.directory)));

        let other = if precision == "precision=fp8" {
            "bf16"
        } else {
            "fp8"
        };
        let other = format!("precision={other}");
        let changed = small_run(dir.path(), &[&other, &parts, "run.steps=13"]);
        let error = start(&changed, true, Interrupter::new())
            .unwrap_err()
            .to_string();
        assert!(error.contains("precision was"), "{error}");
    }
    for ((bytes, _), expected) in sizes.iter().zip([8.0, 4.0, 4.0]) {
        assert!(
            (bytes / expected - 1.0).abs() < 0.2,
            "{bytes} bytes per parameter, expected {expected}"
        );
    }
    assert!(
        sizes[0].1 != sizes[1].1 && sizes[1].1 != sizes[2].1,
        "all precisions do the same"
    );
}

/// That devices compute a precision alike is shown in tests/precision.rs: here, that a run does, resumed after its second
/// step.
#[cfg(feature = "wgpu")]
#[test]
fn three_steps_on_wgpu_are_those_on_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let losses = |name: &str, precision: &str, device: Device| {
        let directory = format!("run.directory={}/{name}-{precision}", dir.path().display());
        let precision = format!("precision={precision}");
        let set = [
            "run.steps=3",
            "checkpoint.interval=2",
            &precision,
            &directory,
        ];
        let config = small_run(dir.path(), &set);
        start_on(device.clone(), &config, false, Interrupter::new()).unwrap();
        std::fs::remove_dir_all(config.run.directory.join("checkpoints/step-00000003")).unwrap();
        start_on(device, &config, true, Interrupter::new()).unwrap();
        let records = lasting(&config.run.directory).into_iter();
        let losses = records.filter_map(|record| match record {
            Record::Train(report) => Some(report.main),
            Record::Validation(_) => None,
        });
        losses.collect::<Vec<_>>()
    };
    let wgpu = || Device::wgpu(burn::tensor::DeviceKind::DefaultDevice);
    for precision in ["fp32", "bf16", "fp8"] {
        let cpu = losses("cpu", precision, Device::flex());
        let found = losses("wgpu", precision, wgpu());
        let close = |(one, other): (&f64, &f64)| (one / other - 1.0).abs() < 1e-4;
        assert!(
            found.len() == 3 && found.iter().zip(&cpu).all(close),
            "{precision}: {found:?} on wgpu, {cpu:?} on the CPU"
        );
    }
}

/// A run that is resumed from its second checkpoint does what it had done without, and what it writes there is the same.
fn repeats(config: &TrainConfig) -> Vec<Record> {
    start(config, false, Interrupter::new()).unwrap();
    let last = config.run.directory.join("checkpoints/step-00000012");
    let state = last.join("training/state.json");
    let left = |path: &Path| (lasting(&config.run.directory), std::fs::read(path).unwrap());
    let expected = left(&state);
    std::fs::remove_dir_all(last).unwrap();
    start(config, true, Interrupter::new()).unwrap();
    assert!(left(&state) == expected, "another run after it was resumed");
    expected.0
}

#[test]
fn spikes_are_counted_or_skipped_and_a_resumed_run_knows_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let run = |action: &str| {
        // So that every loss above the median is one.
        let set = [
            "optimizer.spike.window=8",
            "optimizer.spike.deviations=1e-9",
            "schedule.peak=0.1",
            "schedule.warmup_steps=0",
            &format!("optimizer.spike.action={action}"),
            &format!("run.directory={}/{action}", dir.path().display()),
        ];
        repeats(&small_run(dir.path(), &set))
    };
    let reports = |action: &str| -> Vec<StepReport> {
        let train = |record| match record {
            Record::Train(report) => Some(report),
            Record::Validation(_) => None,
        };
        run(action).into_iter().filter_map(train).collect()
    };
    let [off, warn, skip] = ["off", "warn", "skip"].map(reports);
    let spikes = |reports: &[StepReport]| reports[11].spikes;
    assert!(spikes(&off).is_none() && spikes(&warn) > Some(0) && spikes(&skip) > Some(0));
    let losses = |reports: &[StepReport]| reports.iter().map(|r| r.loss).collect::<Vec<_>>();
    assert_eq!(losses(&off), losses(&warn));
    // What a spike leaves out is seen at the next step.
    let first = warn
        .iter()
        .position(|report| report.spikes.is_some())
        .unwrap();
    assert_eq!(losses(&warn)[..=first], losses(&skip)[..=first]);
    assert!(first < 11 && losses(&warn)[first + 1] != losses(&skip)[first + 1]);
}

#[test]
fn the_average_of_the_weights_is_kept_resumed_and_written_on_demand() {
    let dir = tempfile::tempdir().unwrap();
    let often = [
        "ema.decay=0.75",
        "checkpoint.interval=1",
        "checkpoint.keep=12",
    ];
    let config = small_run(dir.path(), &often);
    start(&config, false, Interrupter::new()).unwrap();
    let checkpoints = config.run.directory.join("checkpoints");
    let step = |step: usize| checkpoints.join(format!("step-{step:08}"));
    let weights = |dir: &Path| {
        let (_, model) = checkpoint::load(dir, &Device::flex()).unwrap();
        parameters(&model)
    };

    let shape = checkpoint::read_config(&step(1)).unwrap();
    let mut expected = parameters(&Transformer::new(&shape, config.run.seed, &Device::flex()));
    for at in 1..=12 {
        for (average, weight) in expected.iter_mut().zip(weights(&step(at))) {
            *average = *average * 0.75 + weight * 0.25;
        }
        assert!(weights(&step(at).join(AVERAGE)) == expected, "step {at}");
    }
    std::fs::remove_dir_all(step(12)).unwrap();
    start(&config, true, Interrupter::new()).unwrap();
    assert!(weights(&step(12).join(AVERAGE)) == expected);

    let written = dir.path().join("average");
    let convert = |run: &Path| {
        std::process::Command::new(env!("CARGO_BIN_EXE_deepburn"))
            .args(["convert", "--ema", "--dtype", "f32"])
            .args([run, &written])
            .output()
            .unwrap()
    };
    let output = convert(&config.run.directory);
    assert!(output.status.success(), "{output:?}");
    assert!(weights(&written) == expected);
    assert!(written.join("tokenizer.json").exists());

    // Not that of another run, nor one that is not there.
    let other = small_run(dir.path(), &["ema.decay=0.5", "run.steps=13"]);
    let error = start(&other, true, Interrupter::new()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("ema.decay was 0.75 and is now 0.5"),
        "{error}"
    );
    std::fs::remove_dir_all(&written).unwrap();
    std::fs::remove_dir_all(step(12).join(AVERAGE)).unwrap();
    let output = convert(&config.run.directory);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && error.contains("ema.decay"),
        "{error}"
    );
}

/// All parameters, one after another.
fn parameters(model: &Transformer) -> Vec<f32> {
    struct Values(Vec<f32>);
    impl ModuleVisitor for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.extend(param.val().into_data().iter::<f32>());
        }
    }
    let mut values = Values(Vec::new());
    model.visit(&mut values);
    values.0
}

/// Each ablation is another run than the recipe's, with the same weights to begin with, and stays what it is.
#[test]
fn ablations_change_the_run_and_are_kept_when_it_is_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, set: &[&str]| {
        let directory = format!("run.directory={}/{name}", dir.path().display());
        let set = [&["precision=fp8", "run.steps=3", &directory], set].concat();
        let config = small_run(dir.path(), &set);
        start(&config, false, Interrupter::new()).unwrap();
        let Record::Train(report) = &lasting(&config.run.directory)[2] else {
            panic!("a validation")
        };
        report.main
    };
    let recipe = run("recipe", &[]);
    let mut losses = vec![recipe];
    for ablation in ["per-tensor", "e5m2-weights", "no-promotion"] {
        let loss = run(ablation, &[&format!("ablation.fp8={ablation}")]);
        assert!(
            (loss / recipe - 1.0).abs() < 1e-2,
            "{ablation}: {loss} for {recipe}"
        );
        assert!(!losses.contains(&loss), "{ablation} changes nothing");
        losses.push(loss);
    }
    let directory = format!("run.directory={}/per-tensor", dir.path().display());
    let other = ["precision=fp8", "run.steps=4", &directory];
    let error = start(&small_run(dir.path(), &other), true, Interrupter::new()).unwrap_err();
    let expected = "ablation.fp8 was \"per-tensor\" and is now null";
    assert!(error.to_string().contains(expected), "{error}");
}
