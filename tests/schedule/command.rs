//! `deepburn pipeline`: what it prints and draws.

use std::fs;

use serde_json::{Value, json};

use crate::{ends, fixture};

#[track_caller]
fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

/// Rank 0 of figure 5 as one reads it there, with letters for the colours.
#[test]
fn the_figure_of_the_report_in_letters() {
    let args = "pipeline --schedule dualpipe --ranks 8 --micro-batches 20";
    let (out, _) = ends(0, &args.split(' ').collect::<Vec<_>>());
    contains(
        &out,
        &[
            "DualPipe, 8 ranks, 20 micro-batches; a stage takes F 1, B 2, Bi 1, W 1, F&B 3; communication 0\n",
            "\nrank 0  F0F1F2F3F4F5F6f0i0w0f1i1w1f2i2w2f3F7&b3-......f4&B0-F8&b4-f5&B1-F9&b5-f6&B2-b6--..f7&B3-b7--..\
             f8&B4-b8--..f9&B5-b9--I6W6I7W7I8W8I9W9\n",
            "\nrank 3  ......F0f0F1f1F2f2F3f3F4b0--f4&B0-",
            "\nrank 7  f0f1f2f3f4f5f6F0I0W0",
            "Capital letters: micro-batches that enter at rank 0; small letters: micro-batches that enter at rank 7.",
            "\n1F1B         x 1         1/8          81          21          21          8/8       8/8\n",
            "\nZB1P         x 1         1/8          67           7           7          8/8       8/8\n",
            "\nDualPipe     x 1         2/8          66           6           6          9/8       9/8\n",
            "\nDualPipeV  x 0.5        2/16          67           7           7        17/16     17/16\n",
        ],
    );
    let rows: Vec<usize> = out
        .lines()
        .filter(|line| line.starts_with("rank ") && line[5..].starts_with(char::is_numeric))
        .map(str::len)
        .collect();
    assert_eq!(rows, [8 + 2 * 66; 8]);
}

#[test]
fn what_does_not_fit_is_told() {
    // Seven ranks are too odd for DualPipe, but not for the schedule that was asked for.
    let args = "pipeline --ranks 7 --micro-batches 14";
    let (out, _) = ends(0, &args.split(' ').collect::<Vec<_>>());
    contains(
        &out,
        &[
            "DualPipeV, 7 ranks, 14 micro-batches",
            "\nDualPipe     x 2         2/7    ranks = 7: DualPipe needs a positive even number\n",
            "stages 0 to 6, from rank 0 to rank 6; small letters: stages 7 to 13, from rank 6 to rank 0.",
        ],
    );
    let args = "pipeline --ranks 1 --micro-batches 2";
    let (out, _) = ends(0, &args.split(' ').collect::<Vec<_>>());
    contains(
        &out,
        &[
            "DualPipeV, 1 rank, 2 micro-batches; ",
            "\nrank 0  F0f0F1b0--f1&B0-b1--I1W1\n",
            "Capital letters: stage 0; small letters: stage 1.",
        ],
    );
    let args = "pipeline --schedule 1f1b --ranks 2 --micro-batches 4 --costs 1e-6,2,1,3";
    let (out, _) = ends(0, &args.split(' ').collect::<Vec<_>>());
    contains(&out, &["F 1e-6", "too wide for text; --svg draws it"]);

    for (code, args, expected) in [
        (
            1,
            "--schedule dualpipe --ranks 7 --micro-batches 20",
            "error: ranks = 7: DualPipe needs a positive even number",
        ),
        (
            1,
            "--ranks 8 --micro-batches 15",
            "error: micro_batches = 15: DualPipeV needs at least 16 for 8 ranks",
        ),
        (
            1,
            "--ranks 99999999999 --micro-batches 1",
            "error: ranks = 99999999999: ranks x micro_batches must be at most 1048576",
        ),
        (
            1,
            "--ranks 2 --micro-batches 4 --communication -1",
            "error: communication = -1: must be a number from 0 to 1e9",
        ),
        (
            2,
            "--ranks 2 --micro-batches 4 --costs 1,2,1",
            "must be four numbers: F,B,W,FB",
        ),
        (
            2,
            "--ranks 2 --micro-batches 4 --costs -1,2,1,3",
            "F = -1: must be a number above 0, at most 1e9",
        ),
        (2, "--ranks -2 --micro-batches 4", "--ranks"),
        (2, "--ranks 2", "--micro-batches"),
    ] {
        let args: Vec<&str> = ["pipeline"].into_iter().chain(args.split(' ')).collect();
        let (out, error) = ends(code, &args);
        assert_eq!(out, "");
        contains(&error, &[expected]);
    }
}

#[test]
fn json_is_that_of_the_reference_and_a_comparison() {
    let args = "pipeline --schedule dualpipe-v --ranks 4 --micro-batches 10 --json";
    let (out, _) = ends(0, &args.split(' ').collect::<Vec<_>>());
    let found: Value = serde_json::from_str(&out).unwrap();
    let reference = fs::read_to_string(fixture().join("dualpipev_pp4_m10.json")).unwrap();
    let reference: Value = serde_json::from_str(&reference).unwrap();
    for (key, value) in reference.as_object().unwrap() {
        assert_eq!(found[key], *value, "{key}");
    }
    assert_eq!(found["peak_activations_per_rank"], json!([9, 9, 9, 9]));
    // The stages of the others are twice as large. DualPipe: (4 / 2 - 1)(3 + 2 - 3) for stages of cost 1.
    let comparison = found["comparison"].as_array().unwrap();
    let row = comparison.iter().find(|row| row["schedule"] == "DualPipe");
    assert_eq!(
        *row.unwrap(),
        json!({
            "schedule": "DualPipe",
            "stages": 4,
            "cost_of_a_stage": 2.0,
            "stages_per_rank": 2,
            "makespan": 64.0,
            "bubble": 4.0,
            "bubble_formula": 4.0,
            "peak_activations": 5,
            "peak_activations_formula": 5,
        })
    );
}

#[test]
fn a_drawing_has_a_box_for_every_action() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("timeline.svg");
    for (schedule, actions, frames) in [("dualpipe", 62, 12), ("1f1b", 64, 0)] {
        let args = format!("pipeline --schedule {schedule} --ranks 4 --micro-batches 8 --svg");
        let mut args: Vec<&str> = args.split(' ').collect();
        args.push(path.to_str().unwrap());
        ends(0, &args);
        let svg = fs::read_to_string(&path).unwrap();
        contains(&svg, &["<svg xmlns=", "</svg>\n", ">Rank 3</text>"]);
        // Every ampersand is escaped.
        assert_eq!(svg.matches('&').count(), svg.matches("&amp;").count());
        assert_eq!(svg.matches("<g><title>").count(), actions, "{schedule}");
        // One for each overlapped pair and one in the legend.
        let found = svg.matches(r##"stroke="#1c1c1c""##).count();
        assert_eq!(found, frames + usize::from(frames > 0), "{schedule}");
        assert_eq!(svg.matches("<g>").count(), svg.matches("</g>").count());
    }
    // Nothing is left beside it.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);

    let args = "pipeline --ranks 2 --micro-batches 4 --svg";
    let gone = dir.path().join("gone").join("a.svg");
    let args: Vec<&str> = args.split(' ').chain([gone.to_str().unwrap()]).collect();
    let (_, error) = ends(1, &args);
    contains(&error, &["gone/a.svg"]);
}
