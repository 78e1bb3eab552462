//! `deepburn bench`: how fast a model reads and writes on this machine.

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, ensure};
use deepburn_infer::{
    benchmark::{Measurement, Workload, measure},
    speculation::Speculation,
};
use serde_json::{Value, json};

use crate::{counting::Counting, generate::positive, model_dir::ModelChoice, print_now};

/// Measure how fast a model reads prompts and writes texts.
///
/// Over several numbers of texts at once, greedily; with drafts of the prediction modules and without where the model has
/// some. Drafts depend on the text: --file makes the prompts of one.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelChoice,

    /// Texts at once
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [1, 2, 4, 8], value_parser = positive)]
    batch: Vec<usize>,

    /// Tokens of every prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = positive)]
    prompt_tokens: usize,

    /// New tokens of every text
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    new_tokens: usize,

    /// Drafted tokens per step [default: as many as the model has modules]
    #[arg(long, value_name = "K", value_parser = positive)]
    depth: Option<usize>,

    /// The best of so many measurements counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = positive)]
    repeat: usize,

    /// Text that prompts are cut from, instead of random tokens
    #[arg(long, value_name = "TEXT")]
    file: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    ensure!(
        args.new_tokens > 1,
        "--new-tokens: must be at least 2, the first comes from the prompt"
    );
    let engine = args.model.open()?;
    let text = match &args.file {
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            Some(engine.encode(&text, false)?)
        }
        None => None,
    };
    let modules = engine.config.num_nextn_predict_layers;
    ensure!(
        args.depth.is_none() || modules > 0,
        "--depth: this model has no prediction modules (num_nextn_predict_layers = 0)"
    );
    let mut ways = vec![Speculation::Off];
    if modules > 0 {
        ways.push(Speculation::Depth(args.depth.unwrap_or(modules)));
    }
    let runs = args.batch.len() * ways.len() * args.repeat;
    let mut progress = Counting::new("runs", runs);
    let mut found: Vec<Measurement> = Vec::new();
    let mut done = 0;
    for &batch in &args.batch {
        for &speculate in &ways {
            let workload = Workload {
                batch,
                prompt_tokens: args.prompt_tokens,
                new_tokens: args.new_tokens,
                speculate,
            };
            let mut best: Option<Measurement> = None;
            for _ in 0..args.repeat {
                let now = measure(&engine, workload, text.as_deref())?;
                best = Some(best.map_or(now, |best| best.faster_of_both(now)));
                done += 1;
                progress.set(done, String::new);
            }
            found.extend(best);
        }
    }
    drop(progress);
    let text = match args.json {
        true => format!("{:#}\n", as_json(&found)),
        false => as_text(&found),
    };
    let _ = print_now(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn depth(measurement: &Measurement) -> usize {
    match measurement.workload.speculate {
        Speculation::Depth(depth) => depth,
        Speculation::Off | Speculation::Auto => 0,
    }
}

fn as_text(found: &[Measurement]) -> String {
    let mut text = format!(
        "{:>5} {:>6} {:>15} {:>15} {:>9} {:>11}\n",
        "texts", "drafts", "prompt tokens/s", "new tokens/s", "accepted", "tokens/step"
    );
    for row in found {
        let acceptance = row.drafts.acceptance();
        text += &format!(
            "{:>5} {:>6} {:>15.1} {:>15.1} {:>9} {:>11}\n",
            row.workload.batch,
            depth(row),
            row.prompt_speed,
            row.decode_speed,
            acceptance.map_or("-".into(), |rate| format!("{:.1}%", 100.0 * rate)),
            (row.drafts.tokens_per_step()).map_or("-".into(), |rate| format!("{rate:.2}")),
        );
    }
    text
}

fn as_json(found: &[Measurement]) -> Value {
    let rows = found.iter().map(|row| {
        json!({
            "texts": row.workload.batch,
            "prompt_tokens": row.workload.prompt_tokens,
            "new_tokens": row.workload.new_tokens,
            "drafts_per_step": depth(row),
            "prompt_tokens_per_second": row.prompt_speed,
            "new_tokens_per_second": row.decode_speed,
            "acceptance": row.drafts.acceptance(),
            "tokens_per_step": row.drafts.tokens_per_step(),
        })
    });
    rows.collect()
}
