//! `deepburn convert` through the binary: what is in the files that it writes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use burn::tensor::{Device, bf16};
use deepburn_kernels::fp8::tiles::{self, ScaleFormat, Tile};
use deepburn_model::checkpoint::{self, hf_names};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;

fn fixture(case: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/fixtures").join(case)
}

fn convert(from: &Path, to: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_deepburn"))
        .arg("convert")
        .args([from, to])
        .args(more)
        .stdin(Stdio::null())
        .output()
        .expect("the binary starts")
}

/// The summary of a conversion that succeeds.
#[track_caller]
fn converts(from: &Path, to: &Path, more: &[&str]) -> String {
    let output = convert(from, to, more);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert_eq!(errors, "");
    let summary = String::from_utf8(output.stdout).unwrap();
    assert_eq!(summary.lines().count(), 1, "{summary}");
    assert!(summary.starts_with(to.to_str().unwrap()), "{summary}");
    checkpoint::load(to, &Device::flex()).unwrap();
    summary
}

/// The error of a conversion that fails and prints nothing else.
#[track_caller]
fn fails(code: i32, from: &Path, to: &Path, more: &[&str]) -> String {
    let output = convert(from, to, more);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert_eq!(output.stdout, b"");
    errors
}

fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("model.safetensors")).unwrap()
}

fn tensors(bytes: &[u8]) -> Vec<(String, TensorView<'_>)> {
    let mut tensors = SafeTensors::deserialize(bytes).unwrap().tensors();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

fn floats(view: &TensorView<'_>) -> Vec<f32> {
    assert_eq!(view.dtype(), Dtype::F32);
    let words = view.data().chunks_exact(4);
    words
        .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
        .collect()
}

#[test]
fn bf16_is_every_weight_rounded() {
    let (from, dir) = (fixture("tiny-mtp"), tempfile::tempdir().unwrap());
    let (short, long) = (dir.path().join("bf16"), dir.path().join("f32"));
    let summary = converts(&from, &short, &["--dtype", "bf16"]);
    assert!(summary.contains(" in 1 file, "), "{summary}");
    converts(&short, &long, &["--dtype", "f32"]);

    let (original, short, long) = (weights(&from), weights(&short), weights(&long));
    let (short, long) = (
        SafeTensors::deserialize(&short).unwrap(),
        SafeTensors::deserialize(&long).unwrap(),
    );
    for (name, view) in tensors(&original) {
        let exact = name.ends_with(".e_score_correction_bias");
        let rounded: Vec<f32> = floats(&view)
            .into_iter()
            .map(|v| if exact { v } else { bf16::from_f32(v).to_f32() })
            .collect();
        assert_eq!(floats(&long.tensor(&name).unwrap()), rounded, "{name}");
        let dtype = if exact { Dtype::F32 } else { Dtype::BF16 };
        assert_eq!(short.tensor(&name).unwrap().dtype(), dtype, "{name}");
    }
}

#[test]
fn fp8_holds_codes_and_scales_and_loads_as_their_products() {
    let (from, dir) = (fixture("tiny-mtp"), tempfile::tempdir().unwrap());
    let [first, second, read] = ["first", "second", "read"].map(|name| dir.path().join(name));
    converts(&from, &first, &["--dtype", "fp8"]);
    converts(&first, &second, &["--dtype", "fp8"]);
    converts(&first, &read, &["--dtype", "f32"]);

    let config = fs::read_to_string(first.join("config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["quantization_config"]["quant_method"], "fp8");

    let (original, first, second, read) = (
        weights(&from),
        weights(&first),
        weights(&second),
        weights(&read),
    );
    let (first, second, read) = (
        SafeTensors::deserialize(&first).unwrap(),
        SafeTensors::deserialize(&second).unwrap(),
        SafeTensors::deserialize(&read).unwrap(),
    );
    let mut quantized = 0;
    for (name, view) in tensors(&original) {
        let stored = first.tensor(&name).unwrap();
        assert_eq!(
            second.tensor(&name).unwrap().data(),
            stored.data(),
            "{name}"
        );
        if !hf_names::is_quantized(&name) {
            continue;
        }
        quantized += 1;
        assert_eq!(stored.dtype(), Dtype::F8_E4M3, "{name}");
        assert_eq!(stored.shape(), view.shape(), "{name}");
        let (values, columns) = (floats(&view), view.shape()[1]);
        let scales = floats(&first.tensor(&hf_names::scales_of(&name)).unwrap());
        assert_eq!(
            scales,
            tiles::scales(&values, columns, Tile::Block, ScaleFormat::Float32),
            "{name}"
        );
        assert_eq!(
            stored.data(),
            tiles::quantize(&values, columns, Tile::Block, &scales),
            "{name}"
        );
        let products = tiles::dequantize(stored.data(), columns, Tile::Block, &scales);
        assert_eq!(floats(&read.tensor(&name).unwrap()), products, "{name}");
    }
    assert!(quantized > 50, "{quantized}");
}

#[test]
fn published_fp8_keeps_its_codes() {
    let (from, dir) = (fixture("tiny-fp8"), tempfile::tempdir().unwrap());
    let to = dir.path().join("out");
    converts(&from, &to, &["--dtype", "fp8"]);
    let (published, written) = (weights(&from), weights(&to));
    let (published, written) = (tensors(&published), tensors(&written));
    assert_eq!(published.len(), written.len());
    for ((name, expected), (found_name, found)) in published.iter().zip(&written) {
        assert_eq!(name, found_name);
        assert_eq!(found.dtype(), expected.dtype(), "{name}");
        assert_eq!(found.shape(), expected.shape(), "{name}");
        if name.ends_with("_scale_inv") {
            // 448 times the scale is rounded once when it is read.
            for (found, expected) in floats(found).iter().zip(floats(expected)) {
                assert!(
                    (found - expected).abs() <= expected * f32::EPSILON,
                    "{name}"
                );
            }
        } else {
            assert_eq!(found.data(), expected.data(), "{name}");
        }
    }
}

#[test]
fn shards_and_companions_are_written() {
    let (from, dir) = (fixture("tiny-yarn"), tempfile::tempdir().unwrap());
    let run = dir.path().join("run");
    let latest = run.join("checkpoints/latest");
    fs::create_dir_all(&latest).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(from.join(name), latest.join(name)).unwrap();
    }
    let to = dir.path().join("deep/er/out");
    let more = ["--dtype", "f32", "--max-shard-size", "300KB"];
    let summary = converts(&run, &to, &more);
    assert!(summary.contains(" files, "), "{summary}");
    assert!(to.join("model.safetensors.index.json").exists());
    let tokenizer = |dir: &Path| fs::read(dir.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer(&to), tokenizer(&from));
    assert!(!to.join("tokenizer_config.json").exists());

    // Back in one file, they are the weights that they were.
    let whole = dir.path().join("whole");
    converts(&to, &whole, &["--dtype", "f32"]);
    let (expected, found) = (weights(&from), weights(&whole));
    for ((name, expected), (found_name, found)) in tensors(&expected).iter().zip(tensors(&found)) {
        assert_eq!(*name, found_name);
        assert_eq!(found.data(), expected.data(), "{name}");
    }
}

#[test]
fn nothing_is_overwritten_and_nothing_is_left_of_a_failure() {
    let (from, dir) = (fixture("tiny-yarn"), tempfile::tempdir().unwrap());
    let to = dir.path().join("out");
    fs::create_dir(&to).unwrap();
    let message = fails(1, &from, &to, &["--dtype", "bf16"]);
    assert!(message.starts_with("error: "), "{message}");
    assert!(message.contains("out: is already there"), "{message}");
    assert_eq!(fs::read_dir(&to).unwrap().count(), 0);

    let broken = dir.path().join("broken");
    fs::create_dir(&broken).unwrap();
    fs::copy(from.join("config.json"), broken.join("config.json")).unwrap();
    fs::write(broken.join("model.safetensors"), [0; 8]).unwrap();
    let gone = dir.path().join("gone");
    let message = fails(1, &broken, &gone, &["--dtype", "bf16"]);
    assert!(message.contains("model.safetensors: "), "{message}");
    assert!(!gone.exists());

    for wrong in [
        &["--dtype", "int4"][..],
        &[],
        &["--dtype", "f32", "--max-shard-size", "0"],
    ] {
        fails(2, &from, &gone, wrong);
    }
}
