//! `deepburn pipeline`: when each rank of a pipeline computes what, and how schedules compare.

mod comparison;
mod svg;
mod text;

use std::{fmt::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::ValueEnum;
use deepburn_model::checkpoint;
use deepburn_train::pipeline::schedule::{
    Action, Chunk, Costs, Direction, Route, Schedule, Simulation, Span, Step, Timeline, Transfer,
    simulate,
};
use serde_json::{Value, json};

use crate::print_now;

/// Show when each rank of a pipeline computes what, and compare schedules.
///
/// Nothing is trained: the order is computed, checked and timed. Capital letters and dark colours are micro-batches on
/// their way from rank 0 to the last rank, small letters and light colours those on their way from there to rank 0.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The schedule to show
    #[arg(long, value_enum, default_value_t = Name::DualPipeV)]
    schedule: Name,

    /// Devices in the pipeline
    #[arg(long, value_name = "N")]
    ranks: usize,

    /// Parts of a batch, in both directions together
    #[arg(long, value_name = "N")]
    micro_batches: usize,

    /// What a stage takes for one micro-batch, in any unit: forward, backward, the part of backward that is for the
    /// weights, an overlapped pair
    #[arg(long, value_name = "F,B,W,FB", default_value = "1,2,1,3", value_parser = parse_costs, allow_hyphen_values = true)]
    costs: Costs,

    /// What it takes to send a result to the next rank, while both can go on computing
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    communication: f64,

    /// Draw the timeline into this file
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Name {
    /// One forward, one backward
    #[value(name = "1f1b")]
    OneFOneB,
    /// Backward passes in two parts (ZB-H1)
    #[value(name = "zb1p")]
    ZeroBubble,
    /// Micro-batches from both ends, two copies of the model
    #[value(name = "dualpipe")]
    DualPipe,
    /// DualPipe with one copy of the model, each micro-batch there and back
    #[value(name = "dualpipe-v")]
    DualPipeV,
}

impl From<Name> for Schedule {
    fn from(name: Name) -> Self {
        match name {
            Name::OneFOneB => Self::OneFOneB,
            Name::ZeroBubble => Self::ZeroBubble,
            Name::DualPipe => Self::DualPipe,
            Name::DualPipeV => Self::DualPipeV,
        }
    }
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let costs = Costs {
        communication: args.communication,
        ..args.costs
    };
    let plan = Plan::new(args.schedule.into(), args.ranks, args.micro_batches, costs)?;
    if let Some(path) = &args.svg {
        checkpoint::write_file(path, svg::draw(&plan).as_bytes())?;
    }
    let text = if args.json {
        serde_json::to_string_pretty(&plan.json()?).context("cannot write JSON")? + "\n"
    } else {
        plan.text()?
    };
    // Whether somebody reads to the end makes no difference.
    let _ = print_now(&text).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// Draws a timeline whose stages differ: `mean` has their mean costs. All times are in milliseconds.
pub(crate) fn draw_uneven(
    schedule: Schedule,
    mean: Costs,
    timeline: Timeline,
    simulation: Simulation,
) -> String {
    let directions = match timeline.placement.route {
        Route::BothWays => 2,
        Route::OneWay | Route::Folded => 1,
    };
    svg::draw(&Plan {
        schedule,
        micro_batches: timeline.micro_batches * directions,
        costs: mean,
        takes: "in milliseconds, a stage takes on average",
        timeline,
        simulation,
    })
}

/// A schedule with its times.
struct Plan {
    schedule: Schedule,
    micro_batches: usize,
    costs: Costs,
    /// How the costs are introduced.
    takes: &'static str,
    timeline: Timeline,
    simulation: Simulation,
}

impl Plan {
    fn new(
        schedule: Schedule,
        ranks: usize,
        micro_batches: usize,
        costs: Costs,
    ) -> anyhow::Result<Self> {
        costs.check()?;
        let timeline = schedule.timeline(ranks, micro_batches)?;
        let simulation = simulate(&timeline, &costs)?;
        Ok(Self {
            schedule,
            micro_batches,
            costs,
            takes: "a stage takes",
            timeline,
            simulation,
        })
    }

    fn ranks(&self) -> usize {
        self.timeline.ranks.len()
    }

    /// The largest of all ranks.
    fn bubble(&self) -> f64 {
        self.simulation.bubble.iter().copied().fold(0.0, f64::max)
    }

    fn headline(&self) -> String {
        let Costs {
            forward,
            backward,
            backward_input,
            backward_weight,
            overlapped,
            communication,
        } = self.costs;
        let [f, b, bi, w, fb, c] = [
            forward,
            backward,
            backward_input,
            backward_weight,
            overlapped,
            communication,
        ]
        .map(number);
        format!(
            "{}, {}, {}; {} F {f}, B {b}, Bi {bi}, W {w}, F&B {fb}; communication {c}",
            self.schedule.name(),
            counted(self.ranks(), "rank"),
            counted(self.micro_batches, "micro-batch"),
            self.takes,
        )
    }

    /// What the two directions are, if there are two.
    fn directions(&self) -> Option<[String; 2]> {
        let (ranks, placement) = (self.ranks(), self.timeline.placement);
        let last = ranks - 1;
        match placement.route {
            Route::OneWay => None,
            Route::BothWays => Some([
                "micro-batches that enter at rank 0".to_owned(),
                format!("micro-batches that enter at rank {last}"),
            ]),
            Route::Folded if ranks == 1 => Some(["stage 0", "stage 1"].map(str::to_owned)),
            Route::Folded => Some([
                format!("stages 0 to {last}, from rank 0 to rank {last}"),
                format!(
                    "stages {ranks} to {}, from rank {last} to rank 0",
                    placement.stages() - 1
                ),
            ]),
        }
    }

    fn text(&self) -> anyhow::Result<String> {
        let mut text = self.headline() + "\n\n";
        match text::timeline(self) {
            Some(timeline) => text += &timeline,
            None => text += "The timeline is too wide for text; --svg draws it.\n",
        }
        text += "\nF forward, B backward, I backward for the input, W backward for the weights, F&B overlapped.\n";
        if let Some([capital, small]) = self.directions() {
            line(
                &mut text,
                format_args!("Capital letters: {capital}; small letters: {small}."),
            );
        }
        text += "\n";
        text += &comparison::text(&comparison::rows(self)?);
        Ok(text)
    }

    /// The keys of the reference files that `deepburn verify` reads, and the comparison.
    fn json(&self) -> anyhow::Result<Value> {
        let ranks: Vec<Value> = (0..self.ranks()).map(|rank| self.rank_json(rank)).collect();
        Ok(json!({
            "schedule": self.schedule.name(),
            "pp": self.ranks(),
            "num_chunks": self.micro_batches,
            "costs": {
                "F": self.costs.forward,
                "B": self.costs.backward,
                "Bi": self.costs.backward_input,
                "W": self.costs.backward_weight,
                "FB": self.costs.overlapped,
            },
            "communication": self.costs.communication,
            "makespan": self.simulation.makespan,
            "bubble_per_rank": self.simulation.bubble,
            "peak_activations_per_rank": self.timeline.peak_activations(),
            "order": self.timeline.order(),
            "ranks": ranks,
            "comparison": comparison::json(&comparison::rows(self)?),
        }))
    }

    fn rank_json(&self, rank: usize) -> Value {
        let transfers = |batch: &[Transfer]| -> Value { batch.iter().map(transfer_json).collect() };
        let steps = &self.timeline.ranks[rank];
        let ops = steps.steps.iter().zip(&self.simulation.spans[rank]);
        let op = |(step, span): (&Step, &Span)| {
            let mut op = action_json(step.action);
            op["wait"] = transfers(&step.wait);
            op["start"] = json!(span.start);
            op["end"] = json!(span.end);
            op
        };
        json!({
            "rank": rank,
            "ops": ops.map(op).collect::<Vec<_>>(),
            "final_wait": transfers(&steps.final_wait),
        })
    }
}

fn action_json(action: Action) -> Value {
    let on = |name: &str, chunk: Chunk| json!({ "op": name, "dir": chunk.direction.index(), "mb": chunk.micro_batch });
    let place = |chunk: Chunk| json!({ "dir": chunk.direction.index(), "mb": chunk.micro_batch });
    match action {
        Action::Forward(chunk) => on("F", chunk),
        Action::Backward(chunk) => on("B", chunk),
        Action::BackwardInput(chunk) => on("Bi", chunk),
        Action::BackwardWeight(chunk) => on("W", chunk),
        Action::Overlapped { forward, backward } => {
            json!({ "op": "FB", "f": place(forward), "b": place(backward) })
        }
    }
}

fn transfer_json(transfer: &Transfer) -> Value {
    json!({
        "c": format!("{}{}", transfer.kind.name(), transfer.pass.letter()),
        "dir": transfer.chunk.direction.index(),
        "mb": transfer.chunk.micro_batch,
        "peer": transfer.peer,
    })
}

/// Four costs; what is left of a backward pass without W is Bi.
fn parse_costs(text: &str) -> Result<Costs, String> {
    let numbers: Option<Vec<f64>> = text
        .split(',')
        .map(|number| number.trim().parse().ok())
        .collect();
    let Some(&[forward, backward, backward_weight, overlapped]) = numbers.as_deref() else {
        return Err("must be four numbers: F,B,W,FB".to_owned());
    };
    let costs = Costs {
        forward,
        backward,
        backward_input: backward - backward_weight,
        backward_weight,
        overlapped,
        communication: 0.0,
    };
    costs.check().map_err(|refused| refused.to_string())?;
    Ok(costs)
}

/// At most four decimals, unless there is nothing before them.
fn number(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-3 {
        return format!("{value:e}");
    }
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn counted(count: usize, noun: &str) -> String {
    let plural = match (count, noun.ends_with("ch")) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{count} {noun}{plural}")
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    writeln!(text, "{content}").expect("a string takes whatever is written to it");
}

/// A letter for a direction: capital on the way from rank 0.
fn cased(letter: char, direction: Direction) -> char {
    match direction {
        Direction::Ascending => letter,
        Direction::Descending => letter.to_ascii_lowercase(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_four_numbers_with_what_is_left_of_backward() {
        let costs = parse_costs("1, 2.5,1,3").unwrap();
        assert_eq!(
            (costs.backward, costs.backward_input, costs.overlapped),
            (2.5, 1.5, 3.0)
        );
        for (text, problem) in [
            ("1,2,1", "must be four numbers: F,B,W,FB"),
            ("1,2,1,3,4", "must be four numbers: F,B,W,FB"),
            ("1,2,x,3", "must be four numbers: F,B,W,FB"),
            ("1,2,3,3", "Bi = -1: must be a number from 0 to 1e9"),
            ("0,2,1,3", "F = 0: must be a number above 0, at most 1e9"),
        ] {
            assert_eq!(parse_costs(text).unwrap_err(), problem, "{text}");
        }
    }

    #[test]
    fn numbers_have_the_decimals_that_they_need() {
        let numbers = [66.0, 0.5, 1.0 / 3.0, 100.0, 0.1 + 0.2, 0.0, 2e-6];
        let expected = ["66", "0.5", "0.3333", "100", "0.3", "0", "2e-6"];
        assert_eq!(numbers.map(number), expected);
    }
}
