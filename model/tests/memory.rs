//! How much memory loading takes.
#![cfg(target_os = "linux")]

#[path = "../../tests/support/process.rs"]
mod process;

use std::{env, path::Path, process::Command};

use burn::{module::Module, tensor::Device};
use deepburn_model::{
    checkpoint::{self, SaveOptions, StoredType},
    config::ModelConfig,
    transformer::Transformer,
};
use process::status;

/// What loading the checkpoint in `DIR` takes at its peak; a process of its own for each, which [`measured`] starts.
#[test]
fn load_once() {
    if let Ok(dir) = env::var(DIR) {
        let before = status("VmRSS:");
        let model = checkpoint::load(Path::new(&dir), &Device::flex())
            .unwrap()
            .1;
        eprintln!("peak {}", status("VmHWM:") - before);
        drop(model);
    }
}

const DIR: &str = "DEEPBURN_TEST_LOAD";

fn measured(dir: &Path) -> u64 {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "load_once", "--nocapture"])
        .env(DIR, dir)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("peak "));
    line.unwrap_or_else(|| panic!("{text}")).parse().unwrap()
}

#[test]
fn loading_takes_little_more_than_the_model() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let config = ModelConfig {
        hidden_size: 512,
        intermediate_size: 1536,
        moe_intermediate_size: 384,
        n_routed_experts: 32,
        ..checkpoint::read_config(&fixtures.join("tiny-mtp")).unwrap()
    };
    let model = Transformer::new(&config, 1, &Device::flex());
    let weights = 4 * model.num_params() as u64;
    assert!(weights > 100_000_000, "{weights}");
    for dtype in [StoredType::F32, StoredType::Bf16, StoredType::Fp8] {
        let dir = tempfile::tempdir().unwrap();
        let options = SaveOptions {
            dtype,
            max_shard_bytes: 50_000_000,
        };
        checkpoint::save(&model, &config, dir.path(), &options).unwrap();
        let ratio = measured(dir.path()) as f64 / weights as f64;
        assert!(
            (0.9..=1.15).contains(&ratio),
            "{dtype:?}: {ratio:.3} of the weights"
        );
    }
}
