//! `deepburn eval`: how well a model predicts a text.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Context;
use deepburn_infer::{
    evaluation::{Evaluation, EvaluationOptions, evaluate},
    placement::{Placement, PlacementError, imbalance_in_order},
};
use serde_json::{Value, json};

use crate::{counting::Counting, generate::positive, model_dir::ModelChoice, print_now};

/// Measure how well a model predicts a text.
///
/// Perplexity and bits per byte; for prediction modules how often their token is the one that the model would choose
/// itself, with the true text before it.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelChoice,

    /// The text
    #[arg(long, value_name = "TEXT")]
    file: PathBuf,

    /// Tokens that the model sees at most: the text is cut into windows of so many [default: 1024, or the model's
    /// context if that is shorter]
    #[arg(long, value_name = "N", value_parser = positive)]
    context: Option<usize>,

    /// Put the beginning-of-text token before the text
    #[arg(long)]
    bos: bool,

    /// Also tell how busy the experts are, and how redundant ones would balance so many devices
    #[arg(long, value_name = "DEVICES", value_parser = positive)]
    experts: Option<usize>,

    /// Redundant experts per layer for --experts [default: one per device]
    #[arg(long, value_name = "N", requires = "experts")]
    redundant: Option<usize>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What redundant experts do for one layer.
struct Layer {
    /// The busiest expert's load over the mean, minus one.
    max_violation: f64,
    in_order: f64,
    placement: Placement,
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let text = fs::read_to_string(&args.file).with_context(|| args.file.display().to_string())?;
    let engine = args.model.open()?;
    let options = EvaluationOptions {
        context: args
            .context
            .unwrap_or(engine.config.max_position_embeddings.min(1024)),
        add_bos: args.bos,
    };
    let mut progress: Option<Counting> = None;
    let found = evaluate(&engine, &text, options, &mut |done, all| {
        let progress = progress.get_or_insert_with(|| Counting::new("tokens", all));
        progress.set(done, String::new);
    });
    drop(progress);
    let found = found.with_context(|| args.file.display().to_string())?;
    let layers = match args.experts {
        Some(devices) => {
            let redundant = args.redundant.unwrap_or(devices);
            let layers = found.expert_loads.iter();
            let layers = layers.map(|loads| Layer::new(loads, redundant, devices));
            Some(layers.collect::<Result<Vec<_>, _>>().context("--experts")?)
        }
        None => None,
    };
    let text = match args.json {
        true => format!("{:#}\n", as_json(&found, layers.as_deref())),
        false => as_text(&found, layers.as_deref()),
    };
    let _ = print_now(&text)?;
    Ok(ExitCode::SUCCESS)
}

impl Layer {
    fn new(loads: &[u64], redundant: usize, devices: usize) -> Result<Self, PlacementError> {
        let mean = loads.iter().sum::<u64>() as f64 / loads.len() as f64;
        let most = loads.iter().copied().max().unwrap_or(0) as f64;
        Ok(Self {
            max_violation: most / mean - 1.0,
            in_order: imbalance_in_order(loads, devices),
            placement: Placement::new(loads, redundant, devices)?,
        })
    }

    /// The experts with more than one copy, and how many.
    fn doubled(&self) -> impl Iterator<Item = (usize, usize)> {
        let copies = self.placement.copies.iter().copied().enumerate();
        copies.filter(|&(_, copies)| copies > 1)
    }
}

fn as_text(found: &Evaluation, layers: Option<&[Layer]>) -> String {
    let mut text = format!(
        "tokens:        {} of {} bytes\nperplexity:    {:.4}\nbits per byte: {:.4}\n",
        found.tokens,
        found.bytes,
        found.perplexity(),
        found.bits_per_byte(),
    );
    for (depth, module) in found.modules.iter().enumerate() {
        text += &format!(
            "module {}:      {:.1}% accepted, {:.1}% right, of {} predictions\n",
            depth + 1,
            100.0 * module.acceptance(),
            100.0 * module.right as f64 / module.rows.max(1) as f64,
            module.rows,
        );
    }
    for (number, layer) in layers.into_iter().flatten().enumerate() {
        let doubled = layer
            .doubled()
            .map(|(expert, copies)| format!("{expert} x{copies}"));
        text += &format!(
            "MoE layer {number}: MaxVio {:.2}, busiest device {:.2} of the mean, with redundant experts {:.2}: {}\n",
            layer.max_violation,
            layer.in_order,
            layer.placement.imbalance(),
            doubled.collect::<Vec<_>>().join(", "),
        );
    }
    text
}

fn as_json(found: &Evaluation, layers: Option<&[Layer]>) -> Value {
    let modules = found.modules.iter().map(|module| {
        json!({
            "predictions": module.rows,
            "accepted": module.agreed,
            "right": module.right,
        })
    });
    let mut report = json!({
        "tokens": found.tokens,
        "bytes": found.bytes,
        "nats": found.nats,
        "perplexity": found.perplexity(),
        "bits_per_byte": found.bits_per_byte(),
        "modules": modules.collect::<Vec<_>>(),
        "expert_loads": found.expert_loads,
    });
    if let Some(layers) = layers {
        let layers = layers.iter().map(|layer| {
            json!({
                "max_violation": layer.max_violation,
                "imbalance_in_order": layer.in_order,
                "imbalance": layer.placement.imbalance(),
                "copies": layer.placement.copies,
                "devices": layer.placement.devices,
            })
        });
        report["placement"] = layers.collect();
    }
    report
}
