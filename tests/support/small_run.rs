//! A run of a small model, and what two such runs have to have in common.

mod corpus;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use deepburn_model::{checkpoint, config::ModelConfig};
use deepburn_train::{
    config::TrainConfig,
    metrics::{self, Record},
    report::StepReport,
};
use safetensors::SafeTensors;

/// A corpus, a model of eight layers and a configuration in `dir`.
pub(crate) fn prepared(dir: &Path) {
    corpus::write(&dir.join("corpus"));
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/model/tiny.json");
    let shape = ModelConfig {
        hidden_size: 32,
        intermediate_size: 48,
        moe_intermediate_size: 16,
        num_hidden_layers: 8,
        // Scores of experts are far apart: sums of another order do not choose other experts.
        initializer_range: 0.1,
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
        windows = 7
        [checkpoint]
        interval = 10
        "#,
        dir = dir.display()
    );
    std::fs::write(dir.join("train.toml"), text).unwrap();
}

pub(crate) fn config(dir: &Path, name: &str, set: &[&str]) -> TrainConfig {
    let mut set: Vec<String> = set.iter().map(|text| text.to_string()).collect();
    set.push(format!("run.directory={}", dir.join(name).display()));
    TrainConfig::read(&dir.join("train.toml"), &set).unwrap()
}

pub(crate) fn records(config: &TrainConfig) -> Vec<Record> {
    let records = metrics::read(&config.run.directory.join("metrics.jsonl")).unwrap();
    records.into_iter().map(Record::lasting).collect()
}

/// Losses to 1e-5; expert loads, which the violations are made of, exactly.
pub(crate) fn assert_same_losses(found: &[Record], expected: &[Record]) {
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

pub(crate) fn latest(config: &TrainConfig) -> PathBuf {
    config.run.directory.join("checkpoints/latest")
}

/// Every stored tensor of a checkpoint, in one file or several.
pub(crate) fn tensors(folder: &Path) -> BTreeMap<String, Vec<f32>> {
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

pub(crate) fn assert_close(
    found: &BTreeMap<String, Vec<f32>>,
    expected: &BTreeMap<String, Vec<f32>>,
) {
    assert!(found.keys().eq(expected.keys()));
    for (name, values) in expected {
        let is_bias = name.ends_with(".e_score_correction_bias");
        for (a, b) in found[name].iter().zip(values) {
            let bound = if is_bias { 0.0 } else { 1e-5 };
            assert!((a - b).abs() <= bound, "{name}: {a}, expected {b}");
        }
    }
}
