//! `deepburn verify`: the reference cases pass, and what is wrong with weights or references is found.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::{Command, Output},
};

use safetensors::{
    Dtype, SafeTensors,
    tensor::{TensorView, serialize},
};
use serde_json::Value;
use support::fixture;
use tempfile::TempDir;

fn verify(dir: &Path, more: &[&str]) -> Output {
    let binary = env!("CARGO_BIN_EXE_deepburn");
    let output = Command::new(binary)
        .arg("verify")
        .arg(dir)
        .args(more)
        .output();
    output.expect("the binary starts")
}

/// What a run that ends with `code` prints, to standard output and standard error.
#[track_caller]
fn ends(code: i32, dir: &Path, more: &[&str]) -> (String, String) {
    let output = verify(dir, more);
    let (out, error) = (output.stdout, output.stderr);
    let (out, error) = (
        String::from_utf8(out).unwrap(),
        String::from_utf8(error).unwrap(),
    );
    assert_eq!(output.status.code(), Some(code), "{out}{error}");
    (out, error)
}

/// A copy of a case that may be changed.
fn copy(case: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(case)).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// Type, shape and bytes by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of a safetensors file.
fn tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = parsed.iter().map(|(name, view)| {
        let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        (name.to_owned(), tensor)
    });
    tensors.collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// (file, name, passes) of each row.
fn rows(json: &Value) -> Vec<(String, String, bool)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let rows = json["rows"].as_array().unwrap().iter();
    rows.map(|row| {
        (
            text(&row["file"]),
            text(&row["name"]),
            row["pass"].as_bool().unwrap(),
        )
    })
    .collect()
}

#[test]
fn a_changed_weight_fails_the_rows_that_it_reaches() {
    let dir = copy("tiny-dense-moe");
    let path = dir.path().join("model.safetensors");
    let mut changed = tensors(&path);
    let (_, _, bytes) = changed
        .get_mut("model.layers.2.self_attn.o_proj.weight")
        .unwrap();
    let (words, _) = bytes.as_chunks_mut::<4>();
    words[7] = (f32::from_le_bytes(words[7]) + 0.05).to_le_bytes();
    write(&path, &changed);

    let (json, _) = ends(1, dir.path(), &["--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let failed: BTreeSet<String> = rows(&json)
        .into_iter()
        .filter_map(|(_, name, passes)| (!passes).then_some(name))
        .collect();
    for name in [
        "layer.2.attn_output",
        "hidden_states.3",
        "logits",
        "step_logits",
    ] {
        assert!(failed.contains(name), "{name} is not in {failed:?}");
    }
    for name in [
        "hidden_states.2",
        "layer.2.attn_probs",
        "layer.1.router_logits",
    ] {
        assert!(!failed.contains(name), "{name}");
    }
    let (text, _) = ends(1, dir.path(), &[]);
    let logits = text.lines().find(|line| line.trim().starts_with("logits "));
    assert!(logits.unwrap().ends_with("FAIL"), "{text}");
}

/// A changed number in any file of references is found, with the file and name of the tensor.
#[test]
fn changed_references_fail_by_name() {
    for (case, file, tensor, row) in [
        (
            "tiny-dense-moe",
            "reference",
            "layer.0.attn_probs",
            "layer.0.attn_probs",
        ),
        (
            "tiny-dense-moe",
            "reference",
            "layer.1.topk_indices",
            "layer.1.topk_indices",
        ),
        (
            "tiny-dense-moe",
            "reference_generate",
            "output_ids",
            "output_ids",
        ),
        ("tiny-mtp", "reference", "loss_total", "loss_total"),
        (
            "tiny-mtp",
            "reference_mtp_grads",
            "model.layers.3.eh_proj.weight",
            "model.layers.3.eh_proj.weight",
        ),
        (
            "tiny-train",
            "reference_grads",
            "lm_head.weight",
            "lm_head.weight",
        ),
        (
            "tiny-train",
            "reference_train",
            "expert_load",
            "expert_load",
        ),
        (
            "tiny-train",
            "reference_train",
            "balance_loss.paper",
            "balance_loss.paper",
        ),
        (
            "tiny-train",
            "final_params",
            "model.norm.weight",
            "model.norm.weight",
        ),
    ] {
        let dir = copy(case);
        let path = dir.path().join(format!("{file}.safetensors"));
        let mut changed = tensors(&path);
        let (dtype, _, bytes) = changed.get_mut(tensor).unwrap();
        if *dtype == Dtype::I64 {
            // The last one: the first tokens of generation are the prompt.
            let last = bytes.len() - 8;
            bytes[last] ^= 1;
        } else {
            let (words, _) = bytes.as_chunks_mut::<4>();
            words[0] = (f32::from_le_bytes(words[0]) + 0.1).to_le_bytes();
        }
        write(&path, &changed);
        let (json, _) = ends(1, dir.path(), &["--json"]);
        let rows = rows(&serde_json::from_str(&json).unwrap());
        let failed: Vec<_> = rows.into_iter().filter(|(_, _, passes)| !passes).collect();
        let expected = (format!("{file}.safetensors"), row.to_owned(), false);
        assert!(failed.contains(&expected), "{failed:?}");
        assert!(failed.len() <= 2, "{failed:?}");
    }
}

#[test]
fn changed_tokenizer_cases_fail_by_name() {
    let dir = copy("tiny-yarn");
    for file in ["reference.safetensors", "reference_generate.safetensors"] {
        fs::remove_file(dir.path().join(file)).unwrap();
    }
    let path = dir.path().join("tokenizer_cases.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut cases: Value = serde_json::from_str(&text).unwrap();
    cases["cases"][1]["ids"][0] = 3.into();
    cases["more"] = 1.into();
    fs::write(&path, cases.to_string()).unwrap();
    let (text, _) = ends(1, dir.path(), &[]);
    let failed: Vec<&str> = text.lines().filter(|line| line.ends_with("FAIL")).collect();
    assert!(
        failed[0].contains("cases.1.ids") && failed[0].contains("1 differ"),
        "{text}"
    );
    assert!(
        text.contains("tokenizer_cases.json: 1 not verified, not known: more"),
        "{text}"
    );
    fs::write(&path, "{").unwrap();
    let (_, error) = ends(1, dir.path(), &[]);
    assert!(error.contains("tokenizer_cases.json"), "{error}");
}

#[test]
fn changed_references_in_fp8_fail_by_name() {
    let dir = copy("tiny-fp8");
    // These need no checkpoint.
    fs::remove_file(dir.path().join("reference.safetensors")).unwrap();
    fs::remove_file(dir.path().join("config.json")).unwrap();
    let path = dir.path().join("fp8_linear.safetensors");
    let mut changed = tensors(&path);
    // The lowest bit of a code; for floats one of the mantissa, of 2^-3 of the number.
    let names = [
        "aligned.x_q",
        "tail.w_dequant",
        "tail.x_scale",
        "tail.y_w8a8",
    ];
    for (name, (at, bit)) in names.into_iter().zip([(0, 1), (2, 16), (2, 16), (2, 16)]) {
        changed.get_mut(name).unwrap().2[at] ^= bit;
    }
    write(&path, &changed);
    let (json, _) = ends(1, dir.path(), &["--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let rows = rows(&json).into_iter();
    let failed: Vec<String> = rows
        .filter_map(|(_, name, passes)| (!passes).then_some(name))
        .collect();
    assert_eq!(failed, names);

    for (shape, problem) in [
        (vec![200 * 384], "expected a matrix with elements, found"),
        (
            vec![384, 200],
            "aligned.w_scale_inv: expected F32 [3, 2], found F32 [2, 3]",
        ),
    ] {
        changed.get_mut("aligned.w").unwrap().1 = shape;
        write(&path, &changed);
        let (_, error) = ends(1, dir.path(), &[]);
        assert!(error.contains(problem), "{error}");
    }
}

#[test]
fn nothing_to_verify_is_told_with_its_own_code() {
    let dir = tempfile::tempdir().unwrap();
    let (_, error) = ends(2, dir.path(), &[]);
    assert!(error.contains("nothing to verify"), "{error}");
    // What is there but not known is listed.
    fs::write(dir.path().join("pipe_pp4_m8.json"), "{}").unwrap();
    let mut linear = BTreeMap::new();
    linear.insert("w".to_owned(), (Dtype::F8_E4M3, vec![2], vec![1, 2]));
    linear.insert("x".to_owned(), (Dtype::U8, vec![1], vec![1]));
    write(&dir.path().join("linear.safetensors"), &linear);
    let (text, _) = ends(2, dir.path(), &[]);
    assert!(
        text.contains("linear.safetensors: 2 not verified, "),
        "{text}"
    );
    assert!(
        text.contains("pipe_pp4_m8.json: 1 not verified, "),
        "{text}"
    );

    let (_, error) = ends(1, &dir.path().join("gone"), &[]);
    assert!(error.contains("gone: there is no such folder"), "{error}");
}

#[test]
fn malformed_references_are_errors_that_name_file_and_tensor() {
    let dir = copy("tiny-dense-moe");
    let path = dir.path().join("reference.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [0, 4, 100, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let (out, error) = ends(1, dir.path(), &[]);
        assert_eq!(out, "");
        assert!(error.contains("reference.safetensors"), "{error}");
        assert!(!error.contains("a bug in deepburn"), "{error}");
    }
    fs::write(&path, &whole).unwrap();
    let good = tensors(&path);
    let shorter = |dtype, shape: &[usize], bytes: usize| (dtype, shape.to_vec(), vec![0; bytes]);
    for (tensor, replacement, message) in [
        ("input_ids", None, "input_ids: missing"),
        (
            "logits",
            Some(shorter(Dtype::F32, &[2, 24, 255], 2 * 24 * 255 * 4)),
            "logits: expected F32 [2, 24, 256], found F32 [2, 24, 255]",
        ),
        (
            "softmax_scale",
            Some(shorter(Dtype::I64, &[], 8)),
            "softmax_scale: expected F32 [], found I64 []",
        ),
        (
            "input_ids",
            Some(shorter(Dtype::F32, &[2, 24], 2 * 24 * 4)),
            "input_ids: expected I64 [2, 24], found F32 [2, 24]",
        ),
        (
            "input_ids",
            Some((Dtype::I64, vec![1, 1], 256i64.to_le_bytes().to_vec())),
            "input_ids: token 256 is not below vocab_size = 256",
        ),
    ] {
        let mut changed = good.clone();
        changed.remove(tensor);
        changed.extend(replacement.map(|replacement| (tensor.to_owned(), replacement)));
        write(&path, &changed);
        let (out, error) = ends(1, dir.path(), &[]);
        assert_eq!(out, "");
        let message = format!("reference.safetensors: {message}");
        assert!(error.contains(&message), "{error}");
    }

    // Parameters after training cannot be compared without the batches.
    let dir = copy("tiny-train");
    fs::remove_file(dir.path().join("reference_train.safetensors")).unwrap();
    let (_, error) = ends(1, dir.path(), &[]);
    assert!(error.contains("reference_train.safetensors"), "{error}");
}

#[test]
fn a_dump_has_the_names_and_shapes_of_the_references() {
    let inputs = |name: &str| {
        ["reference.input_ids", "reference_generate.prompt_ids"].contains(&name)
            || name.starts_with("reference_train.input_ids.")
            || name == "fp8_linear_codec.encode.input"
            || name.starts_with("fp8_linear.")
                && [".w", ".w_scale_inv", ".x"]
                    .iter()
                    .any(|end| name.ends_with(end))
    };
    for case in ["tiny-dense-moe", "tiny-train", "tiny-fp8"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.safetensors");
        ends(0, &fixture(case), &["--dump", path.to_str().unwrap()]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let found = tensors(&path);
        let mut expected = BTreeMap::new();
        for entry in fs::read_dir(fixture(case)).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if stem != "model" && path.extension().is_some_and(|end| end == "safetensors") {
                let named = |(name, tensor)| (format!("{stem}.{name}"), tensor);
                expected.extend(tensors(&path).into_iter().map(named));
            }
        }
        expected.retain(|name, _| !inputs(name));
        assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
        for (name, (dtype, shape, bytes)) in &found {
            let (expected_dtype, expected_shape, expected_bytes) = &expected[name];
            assert_eq!((dtype, shape), (expected_dtype, expected_shape), "{name}");
            if matches!(dtype, Dtype::I64 | Dtype::U8 | Dtype::F8_E4M3) {
                assert_eq!(bytes, expected_bytes, "{name}");
            }
        }
    }
}
