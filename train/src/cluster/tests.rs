//! Ranks that do not agree, and ranks that die.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use burn::train::renderer::MetricsRenderer;

use super::*;
use crate::{
    data::prepare,
    metrics::{self, Record},
    parallel::Link,
    state::Checkpoints,
};

#[test]
fn ranks_that_differ_are_told_in_what() {
    let nodes = [0; 3];
    let errors = local::run(&nodes, LocalOptions::default(), |rank| {
        let batch = if rank.rank() == 2 { "3" } else { "2" };
        let facts = [("[batch]", batch), ("the tokenizer", "abc")];
        let facts = facts.map(|(name, value)| (name.to_owned(), value.to_owned()));
        agree(&rank, &facts.into()).unwrap_err().to_string()
    });
    let expected = "rank 2 differs from rank 0 in [batch]";
    assert!(errors.iter().all(|error| error == expected), "{errors:?}");
}

fn config(dir: &Path, name: &str) -> TrainConfig {
    let text = format!(
        r#"
        [run]
        directory = "{dir}/{name}"
        steps = 6
        [model]
        config = "model.json"
        [data]
        sources = [{{ path = "{dir}/corpus" }}]
        tokenizer = {{ vocab_size = 300, max_train_bytes = 100000 }}
        validation_fraction = 0.2
        cache_dir = "{dir}/cache"
        [batch]
        sequences = 1
        sequence_length = 16
        [schedule]
        peak = 1e-3
        warmup_steps = 3
        [validation]
        interval = 3
        windows = 2
        [checkpoint]
        interval = 1
        [parallel]
        pipeline = 2
        schedule = "dualpipe"
        micro_batches = 4
        "#,
        dir = dir.display()
    );
    let path = dir.join("train.toml");
    std::fs::write(&path, text).unwrap();
    TrainConfig::read(&path, &[]).unwrap()
}

/// Ends the rank that takes the message of this number.
struct Bomb(AtomicUsize);

impl Link for Bomb {
    fn carry(&self, _: usize, _: usize, _: usize) {
        if self.0.fetch_sub(1, Ordering::Relaxed) == 1 {
            panic!("this rank dies");
        }
    }
}

fn attempt(
    config: &TrainConfig,
    resume: bool,
    bomb: usize,
) -> Result<Result<RunSummary, TrainError>, ()> {
    let data = prepare(&config.data, config.run.seed, &mut |_| {}).unwrap();
    let shape = run::shape_for(config, &data).unwrap();
    let options = RunOptions {
        device: Device::flex(),
        resume,
        renderer: Some(Box::new(quiet::Quiet) as Box<dyn MetricsRenderer>),
        interrupter: Interrupter::new(),
    };
    let local = LocalOptions {
        link: (bomb > 0).then(|| Arc::new(Bomb(AtomicUsize::new(bomb))) as Arc<dyn Link>),
        ..LocalOptions::default()
    };
    let world = local::world(&[0, 1], local);
    let job = Job::of(config, &shape, &data, &options);
    let run = AssertUnwindSafe(|| together(world, &job, options));
    catch_unwind(run).map_err(|_| ())
}

fn records(config: &TrainConfig) -> Vec<Record> {
    let records = metrics::read(&config.run.directory.join("metrics.jsonl")).unwrap();
    records.into_iter().map(Record::lasting).collect()
}

/// A rank dies at some message or other: the run ends at once, what was saved is whole, and a resumed run repeats the
/// uninterrupted one.
#[test]
fn a_rank_that_dies_ends_the_run_and_spoils_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("corpus")).unwrap();
    for file in 0..20 {
        let lines = (0..40).map(|line| format!("let x{file} = {line} * {file};\n"));
        let path = dir.join(format!("corpus/{file}.rs"));
        std::fs::write(path, lines.collect::<String>()).unwrap();
    }
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/model/tiny.json");
    std::fs::copy(tiny, dir.join("model.json")).unwrap();
    let whole = config(dir, "whole");
    attempt(&whole, false, 0).unwrap().unwrap();
    for bomb in [1, 30, 77, 131, 190, 260] {
        let config = config(dir, &format!("dying-{bomb}"));
        let started = Instant::now();
        let ended = attempt(&config, false, bomb);
        assert!(started.elapsed() < Duration::from_secs(20));
        if let Ok(ended) = ended {
            let error = ended.unwrap_err().to_string();
            // What it says itself, or what is heard of it.
            let told = ["rank 1: ", "rank 0 gave up: rank 1 is gone"];
            assert!(told.iter().any(|told| error.starts_with(told)), "{error}");
        }
        let checkpoints = Checkpoints::new(&config.run.directory, 1);
        let resume = checkpoints.latest().is_some();
        attempt(&config, resume, 0).unwrap().unwrap();
        assert_eq!(records(&config), records(&whole));
    }
}

#[path = "../../../tests/support/quiet.rs"]
mod quiet;
