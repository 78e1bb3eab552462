//! What DeepSeek's own code executes, rank by rank: see tests/fixtures/dualpipe/README.md.

use std::fs;

use deepburn_train::pipeline::schedule::{Costs, RankSteps, Schedule, Transfer, simulate};
use serde_json::Value;

use crate::{fixture, timeline};

/// The files, their sizes and makespans, the latter as meta.json has them.
const FILES: [(&str, Schedule, [usize; 2], f64); 6] = [
    ("dualpipe_pp4_m8", Schedule::DualPipe, [4, 8], 26.0),
    ("dualpipe_pp4_m10", Schedule::DualPipe, [4, 10], 32.0),
    ("dualpipe_pp8_m20", Schedule::DualPipe, [8, 20], 66.0),
    ("dualpipev_pp4_m8", Schedule::DualPipeV, [4, 8], 54.0),
    ("dualpipev_pp4_m10", Schedule::DualPipeV, [4, 10], 66.0),
    ("dualpipev_pp8_m20", Schedule::DualPipeV, [8, 20], 134.0),
];

fn read(name: &str) -> Value {
    let text = fs::read_to_string(fixture().join(name).with_extension("json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

/// A batch of transfers as `Transfer` displays them.
fn transfers(batch: &Value) -> Vec<String> {
    let name = |transfer: &Value| {
        let kind = transfer["c"].as_str().unwrap();
        let to = if kind.starts_with("send") {
            "to"
        } else {
            "from"
        };
        let number = |key: &str| transfer[key].as_u64().unwrap();
        let (direction, micro_batch, peer) = (number("dir"), number("mb"), number("peer"));
        format!("{kind} {direction}.{micro_batch} {to} {peer}")
    };
    list(batch).iter().map(name).collect()
}

fn names(batch: &[Transfer]) -> Vec<String> {
    batch.iter().map(ToString::to_string).collect()
}

#[test]
fn every_rank_computes_in_the_order_of_the_reference() {
    for (file, schedule, [ranks, micro_batches], _) in FILES {
        let expected = read(file);
        let found = timeline(schedule, ranks, micro_batches).order();
        assert_eq!(found.len(), list(&expected["order"]).len(), "{file}");
        for (rank, (found, expected)) in found.iter().zip(list(&expected["order"])).enumerate() {
            let expected: Vec<&str> = list(expected)
                .iter()
                .map(|op| op.as_str().unwrap())
                .collect();
            assert_eq!(*found, expected, "{file} rank {rank}");
        }
    }
}

#[test]
fn every_batch_of_transfers_is_that_of_the_reference() {
    for (file, schedule, [ranks, micro_batches], _) in FILES {
        let reference = read(file);
        let found = timeline(schedule, ranks, micro_batches).ranks;
        assert_eq!(found.len(), list(&reference["ranks"]).len(), "{file}");
        for (rank, (found, reference)) in found.iter().zip(list(&reference["ranks"])).enumerate() {
            let RankSteps { steps, final_wait } = found;
            let ops = list(&reference["ops"]);
            assert_eq!(steps.len(), ops.len(), "{file} rank {rank}");
            for (at, (step, op)) in steps.iter().zip(ops).enumerate() {
                let (found, expected) = (names(&step.wait), transfers(&op["wait"]));
                assert_eq!(found, expected, "{file} rank {rank} before step {at}");
            }
            let last = transfers(&reference["final_wait"]);
            assert_eq!(names(final_wait), last, "{file} rank {rank} at the end");
        }
    }
}

#[test]
fn every_start_and_end_is_that_of_the_reference() {
    for (file, schedule, [ranks, micro_batches], makespan) in FILES {
        let reference = read(file);
        let timeline = timeline(schedule, ranks, micro_batches);
        let simulation = simulate(&timeline, &Costs::UNIT).unwrap();
        for (rank, spans) in simulation.spans.iter().enumerate() {
            let found: Vec<(f64, f64)> = spans.iter().map(|span| (span.start, span.end)).collect();
            let expected: Vec<(f64, f64)> = list(&reference["ranks"][rank]["ops"])
                .iter()
                .map(|op| (number(&op["start"]), number(&op["end"])))
                .collect();
            assert_eq!(found, expected, "{file} rank {rank}");
        }
        assert_eq!(simulation.makespan, makespan, "{file}");
        assert_eq!(simulation.makespan, number(&reference["makespan"]));
        let bubble: Vec<f64> = list(&reference["bubble_per_rank"])
            .iter()
            .map(number)
            .collect();
        assert_eq!(simulation.bubble, bubble, "{file}");
    }
}
