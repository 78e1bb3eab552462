//! `deepburn verify` on files of schedules: without a model, row by row, and whatever is in them.

use std::{collections::BTreeSet, fs, path::Path};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{ends, fixture};

const FILE: &str = "dualpipe_pp4_m8.json";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder with one file, which may be changed first.
fn folder(change: impl FnOnce(&mut Value)) -> TempDir {
    let text = fs::read_to_string(fixture().join(FILE)).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    change(&mut value);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FILE), value.to_string()).unwrap();
    dir
}

/// The rows that fail after a change.
#[track_caller]
fn failing(change: impl FnOnce(&mut Value)) -> Vec<String> {
    let dir = folder(change);
    let (out, _) = ends(1, &["verify", text(dir.path()), "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    let rows = report["rows"].as_array().unwrap().iter();
    assert_eq!(rows.len(), 16);
    let failed = rows.filter(|row| row["pass"] == false);
    failed
        .map(|row| row["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn every_reference_passes_without_a_model() {
    let (out, _) = ends(0, &["verify", text(&fixture()), "--json"]);
    let report: Value = serde_json::from_str(&out).unwrap();
    let rows = report["rows"].as_array().unwrap();
    // Three for each rank and four for each file.
    assert_eq!(rows.len(), 3 * (4 + 4 + 8) * 2 + 4 * 6);
    assert!(rows.iter().all(|row| row["pass"] == true));
    assert_eq!(report["not_verified"], json!([]));
    let files: BTreeSet<&str> = rows
        .iter()
        .map(|row| row["file"].as_str().unwrap())
        .collect();
    assert_eq!(files.len(), 6);

    let (out, _) = ends(0, &["verify", text(&fixture())]);
    assert!(out.contains("\n120 verified: 120 passed, 0 failed; 0 not verified\n"));
    let row = out.lines().find(|line| line.contains(" waits.rank3 "));
    assert!(row.unwrap().ends_with("exact           PASS"), "{out}");
}

#[test]
fn every_change_fails_in_its_row() {
    assert_eq!(
        failing(|file| {
            let order = file["order"][2].as_array_mut().unwrap();
            order.swap(3, 4);
        }),
        ["order.rank2"]
    );
    assert_eq!(
        failing(|file| file["ranks"][1]["ops"][11]["op"] = json!("B")),
        ["ops.rank1"]
    );
    assert_eq!(
        failing(|file| file["ranks"][3]["ops"][7]["f"]["mb"] = json!(7)),
        ["ops.rank3"]
    );
    // Another order of issue, another peer, and a wait at the end that is not there.
    assert_eq!(
        failing(|file| {
            let wait = file["ranks"][1]["ops"][7]["wait"].as_array_mut().unwrap();
            wait.reverse();
        }),
        ["waits.rank1"]
    );
    assert_eq!(
        failing(|file| file["ranks"][0]["ops"][1]["wait"][0]["peer"] = json!(2)),
        ["waits.rank0"]
    );
    assert_eq!(
        failing(|file| {
            let send = file["ranks"][0]["ops"][1]["wait"][0].clone();
            file["ranks"][0]["final_wait"] = json!([send]);
        }),
        ["waits.rank0"]
    );
    assert_eq!(
        failing(|file| file["ranks"][2]["ops"][5]["start"] = json!(6.01)),
        ["start"]
    );
    assert_eq!(
        failing(|file| file["ranks"][2]["ops"][5]["end"] = json!(7.99)),
        ["end"]
    );
    assert_eq!(failing(|file| file["makespan"] = json!(27)), ["makespan"]);
    assert_eq!(
        failing(|file| file["bubble_per_rank"][3] = json!(3)),
        ["bubble_per_rank"]
    );
    // One action less, the very last, which leaves the times before it as they are.
    assert_eq!(
        failing(|file| drop(file["ranks"][3]["ops"].as_array_mut().unwrap().pop())),
        ["ops.rank3", "waits.rank3", "start", "end"]
    );
    // Other costs move every time.
    assert_eq!(
        failing(|file| file["costs"]["FB"] = json!(2.5)),
        ["start", "end", "makespan", "bubble_per_rank"]
    );
}

#[test]
fn unknown_entries_are_told_and_malformed_files_are_errors() {
    let dir = folder(|file| {
        file["note"] = json!("x");
        file["ranks"][0]["ops"][1]["wait"][0]["bytes"] = json!(1);
    });
    let (out, _) = ends(0, &["verify", text(dir.path())]);
    let told = format!("{FILE}: 2 not verified, not known: note, ranks.0.ops.1.wait.0.bytes");
    assert!(out.contains(&told), "{out}");

    let wrong = |change: fn(&mut Value), expected: &str| {
        let dir = folder(change);
        let (out, error) = ends(1, &["verify", text(dir.path())]);
        assert_eq!(out, "");
        assert!(error.contains(&format!("{FILE}: {expected}")), "{error}");
        assert!(!error.contains("a bug in deepburn"), "{error}");
    };
    wrong(
        |file| file["pp"] = json!("4"),
        "pp: expected a whole number from 0, found \"4\"",
    );
    wrong(
        |file| file["num_chunks"] = json!(9),
        "num_chunks = 9: DualPipe needs an even number, at least 8 for 4 ranks",
    );
    wrong(
        |file| file["num_chunks"] = json!(u64::MAX),
        "num_chunks = 18446744073709551615: ranks x micro_batches must be at most",
    );
    wrong(
        |file| {
            for key in ["order", "ranks", "bubble_per_rank"] {
                file[key].as_array_mut().unwrap().truncate(3);
            }
            file["pp"] = json!(3);
        },
        "pp = 3: DualPipe needs a positive even number",
    );
    wrong(
        |file| file["costs"]["W"] = json!(-1),
        "costs.W = -1: must be a number from 0 to 1e9",
    );
    wrong(
        |file| file["ranks"][0]["ops"][0] = json!([]),
        "ranks.0.ops.0: expected an object, found an array",
    );
    wrong(|file| *file = json!(1), "expected an object, found 1");

    let path = dir.path().join(FILE);
    let whole = fs::read(&path).unwrap();
    for length in [0, 1, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let (out, error) = ends(1, &["verify", text(dir.path())]);
        assert_eq!(out, "");
        assert!(error.contains(FILE), "{error}");
        assert!(!error.contains("a bug in deepburn"), "{error}");
    }
}

#[test]
fn a_dump_holds_the_times() {
    let dir = folder(|_| ());
    let dump = dir.path().join("dump.safetensors");
    ends(0, &["verify", text(dir.path()), "--dump", text(&dump)]);
    let bytes = fs::read(&dump).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = tensors.names();
    names.sort();
    let stem = FILE.strip_suffix(".json").unwrap();
    let expected = ["bubble_per_rank", "end", "makespan", "start"];
    assert_eq!(names, expected.map(|name| format!("{stem}.{name}")));
    let floats = |name: &str, shape: &[usize]| -> Vec<f32> {
        let view = tensors.tensor(&format!("{stem}.{name}")).unwrap();
        assert_eq!((view.dtype(), view.shape()), (Dtype::F32, shape));
        let (words, _) = view.data().as_chunks::<4>();
        words.iter().map(|word| f32::from_le_bytes(*word)).collect()
    };
    assert_eq!(floats("makespan", &[]), [26.0]);
    assert_eq!(floats("bubble_per_rank", &[4]), [2.0; 4]);
    // Ranks one after another; the second has 15 actions after the 16 of the first.
    let start = floats("start", &[62]);
    assert_eq!(start[..4], [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(start[15..18], [25.0, 1.0, 2.0]);
    assert_eq!(floats("end", &[62])[61], 26.0);
}

/// What `deepburn pipeline` prints as JSON is such a file, with a comparison in addition.
#[test]
fn what_pipeline_prints_can_be_verified() {
    let dir = tempfile::tempdir().unwrap();
    for (schedule, costs) in [("dualpipe", "1,2,1,3"), ("dualpipe-v", "1.1,2.3,0.9,2.8")] {
        let sizes = ["--ranks", "6", "--micro-batches", "14"];
        let options = ["--costs", costs, "--communication", "0.3", "--json"];
        let args = [&["pipeline", "--schedule", schedule][..], &sizes, &options].concat();
        let (out, _) = ends(0, &args);
        fs::write(dir.path().join(format!("dualpipe-{schedule}.json")), out).unwrap();
    }
    let (out, _) = ends(0, &["verify", text(dir.path())]);
    assert!(
        out.contains("44 verified: 44 passed, 0 failed; 4 not verified"),
        "{out}"
    );
}
