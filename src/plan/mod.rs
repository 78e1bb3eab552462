//! `deepburn plan`: what training a model on a cluster would take.

mod text;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use deepburn_model::checkpoint;
use deepburn_train::{
    pipeline::schedule::{Costs, Simulation, Span},
    plan::{
        Plan, PlanConfig, assumptions,
        sensitivity::{self, Variant},
    },
};
use serde_json::{Value, json};

use crate::{pipeline, print_now};

/// Predict what training a model on a cluster takes: time, memory, communication, GPU hours.
///
/// Nothing is trained or measured. The prediction follows from the model's shape, the layout and published rates, all of
/// which are printed with their sources and can be set.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Cluster, layout and training, a TOML file
    config: PathBuf,

    /// Set a value over the file: section.key=value; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Draw the timeline of one pipeline into this file
    #[arg(long, value_name = "FILE.svg")]
    svg: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = PlanConfig::read(&args.config, &args.set)?;
    let model = checkpoint::read_config(&config.model_path(&args.config))?;
    let plan = Plan::new(&model, &config)?;
    let variants = sensitivity::variants(&model, &config)?;
    if let Some(path) = &args.svg {
        checkpoint::write_file(path, svg(&plan).as_bytes())?;
    }
    let text = if args.json {
        let value = json(&plan, &variants);
        serde_json::to_string_pretty(&value).context("cannot write JSON")? + "\n"
    } else {
        text::text(&plan, &variants)
    };
    // Whether somebody reads to the end makes no difference.
    let _ = print_now(&text).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// In milliseconds: a chunk takes a few dozen.
fn svg(plan: &Plan) -> String {
    const MILLISECONDS: f64 = 1e3;
    let span = |span: &Span| Span {
        start: span.start * MILLISECONDS,
        end: span.end * MILLISECONDS,
    };
    let timed = &plan.simulation;
    let simulation = Simulation {
        spans: timed
            .spans
            .iter()
            .map(|rank| rank.iter().map(span).collect())
            .collect(),
        makespan: timed.makespan * MILLISECONDS,
        bubble: timed
            .bubble
            .iter()
            .map(|bubble| bubble * MILLISECONDS)
            .collect(),
    };
    let mean = Costs {
        communication: plan.mean.communication * MILLISECONDS,
        ..plan.mean.scaled(MILLISECONDS)
    };
    let schedule = plan.config.layout.schedule;
    pipeline::draw_uneven(schedule, mean, plan.timeline.clone(), simulation)
}

fn json(plan: &Plan, variants: &[Variant]) -> Value {
    let ranks = plan.ranks.iter().map(|(times, memory)| {
        json!({ "seconds": times, "bytes": memory, "total_bytes": memory.total() })
    });
    let stages = plan
        .stages
        .iter()
        .map(|stage| json!({ "layers": stage.layers(), "seconds": stage.passes }));
    json!({
        "config": plan.config,
        "parameters": plan.parameters,
        "pipelines": plan.config.data_parallel(),
        "micro_batches": plan.config.micro_batches(),
        "hops_per_token": plan.hops,
        "all_to_all": plan.all_to_all,
        "moe_layer": plan.moe_layer,
        "makespan": plan.simulation.makespan,
        "predicted": plan.prediction,
        "reported": plan.reported,
        "stages": stages.collect::<Vec<_>>(),
        "ranks": ranks.collect::<Vec<_>>(),
        "sensitivity": variants,
        "assumptions": assumptions::table(&plan.config),
        "notes": assumptions::NOTES,
    })
}
