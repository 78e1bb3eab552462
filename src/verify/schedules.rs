//! `dualpipe*.json`: the order of a pipeline schedule, its transfers and its times. No model takes part.

use std::{fs, path::Path};

use anyhow::{Context, anyhow};
use deepburn_train::pipeline::schedule::{Span, Transfer, simulate};
use serde_json::Value;

use super::{
    report::{Errors, Report},
    schedule_file::ScheduleFile,
    tolerance::Bound,
};

/// Times are sums of costs in double precision, held side by side in single precision: rounding is 6e-8 of the makespan
/// at most. Another order of actions moves them by a cost.
const TIME: f64 = 1e-6;

/// Whether this is the name of such a file.
pub(super) fn is_schedule(name: &str) -> bool {
    name.starts_with("dualpipe") && name.ends_with(".json")
}

/// Recomputes what is in the file `name`.
pub(super) fn verify(dir: &Path, name: &str, report: &mut Report) -> anyhow::Result<()> {
    let path = dir.join(name);
    let what = || path.display().to_string();
    let text = fs::read_to_string(&path).with_context(what)?;
    let parsed: Value = serde_json::from_str(&text).with_context(what)?;
    let wrong = |problem: String| anyhow!("{}: {problem}", what());
    let file = ScheduleFile::read(&parsed).map_err(wrong)?;
    file.costs
        .check()
        .map_err(|refused| wrong(format!("costs.{refused}")))?;
    let timeline = file
        .schedule
        .timeline(file.ranks, file.micro_batches)
        .map_err(|refused| {
            let key = match refused.field {
                "ranks" => "pp",
                _ => "num_chunks",
            };
            wrong(format!("{key} = {}: {}", refused.value, refused.rule))
        })?;
    let simulation = simulate(&timeline, &file.costs)?;

    for (rank, order) in timeline.order().iter().enumerate() {
        let expected = &file.order[rank];
        let place = format!("order.rank{rank}");
        let differ = differences(order, expected);
        report.differences((name, &place), &[expected.len()], differ);

        let steps = &timeline.ranks[rank];
        let expected = &file.steps[rank].actions;
        let actions: Vec<_> = steps.steps.iter().map(|step| step.action).collect();
        let place = format!("ops.rank{rank}");
        let differ = differences(&actions, expected);
        report.differences((name, &place), &[expected.len()], differ);

        let expected = &file.steps[rank].waits;
        let waits: Vec<Vec<Transfer>> = steps.waits().map(<[_]>::to_vec).collect();
        let place = format!("waits.rank{rank}");
        let differ = differences(&waits, expected);
        report.differences((name, &place), &[expected.len()], differ);
    }

    let expected: Vec<&[Span]> = file.steps.iter().map(|rank| &rank.spans[..]).collect();
    let found: Vec<&[Span]> = simulation.spans.iter().map(|rank| &rank[..]).collect();
    let mut times = Times {
        name,
        bound: Bound::Max(TIME * simulation.makespan),
        report,
    };
    times.by_rank("start", [&found, &expected], |span| span.start);
    times.by_rank("end", [&found, &expected], |span| span.end);
    times.compare("makespan", &[], [&[simulation.makespan], &[file.makespan]]);
    let ranks = [file.ranks];
    times.compare(
        "bubble_per_rank",
        &ranks,
        [&simulation.bubble, &file.bubble],
    );
    if !file.unknown.is_empty() {
        report.skip(name, file.unknown, "not known");
    }
    Ok(())
}

struct Times<'a> {
    name: &'a str,
    bound: Bound,
    report: &'a mut Report,
}

impl Times<'_> {
    /// Compares one time of each action, rank after rank.
    fn by_rank(&mut self, row: &str, sides: [&[&[Span]]; 2], time: impl Fn(&Span) -> f64) {
        let [found, expected] =
            sides.map(|ranks| ranks.concat().iter().map(&time).collect::<Vec<f64>>());
        let same_steps = sides[0]
            .iter()
            .zip(sides[1])
            .all(|(a, b)| a.len() == b.len());
        if same_steps {
            self.compare(row, &[expected.len()], [&found, &expected]);
        } else {
            // Which of them belong together is not known.
            let place = (self.name, row);
            let longer = found.len().max(expected.len());
            self.report.differences(place, &[expected.len()], longer);
            let found: Vec<f32> = found.iter().map(|&t| t as f32).collect();
            self.report.keep_floats(place, &[found.len()], &found);
        }
    }

    fn compare(&mut self, row: &str, shape: &[usize], [found, expected]: [&[f64]; 2]) {
        let [found, expected] =
            [found, expected].map(|times| times.iter().map(|&t| t as f32).collect::<Vec<f32>>());
        let errors = Errors::between(&found, &expected);
        let place = (self.name, row);
        self.report.errors(place, shape, errors, self.bound);
        self.report.keep_floats(place, shape, &found);
    }
}

/// Places at which two lists differ, those that only one of them has included.
fn differences<T: PartialEq>(found: &[T], expected: &[T]) -> usize {
    let differ = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    differ + found.len().abs_diff(expected.len())
}
