//! `deepburn train`: prepares data, trains, and says where the result is.

use std::{
    io::IsTerminal,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::Context;
use burn::train::{Interrupter, renderer::MetricsRenderer};
use deepburn_train::{
    config::TrainConfig,
    data::{self, entropy},
    pipeline::schedule::Schedule,
    run::{self, RunOptions, RunSummary},
};

use crate::{INTERRUPTED, device::DeviceSpec, progress::Progress, ranks, step_lines::StepLines};

#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The run's configuration, a TOML file
    config: PathBuf,

    /// Set a value over the configuration: section.key=value; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Where to compute: cpu, wgpu, wgpu:N, cuda or cuda:N, as far as compiled in
    #[arg(long, default_value = "cpu")]
    device: DeviceSpec,

    /// Go on from the newest checkpoint in run.directory
    #[arg(long)]
    resume: bool,

    /// Print a line per step also on a terminal, instead of the dashboard
    #[arg(long)]
    plain: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    ranks::alone()?;
    let config = TrainConfig::read(&args.config, &args.set)?;
    let device = args.device.open()?;
    let mut progress = Progress::new();
    let prepared = data::prepare(&config.data, config.run.seed, &mut |event| {
        progress.event(event)
    })?;
    let baseline = entropy::split_entropy(&prepared.valid)?;
    describe(&config, baseline);

    let interrupter = Interrupter::new();
    stop_on_ctrl_c(&interrupter)?;
    let lines = args.plain || !std::io::stdout().is_terminal();
    let renderer = lines.then(|| {
        let (steps, interval) = (config.run.steps, config.validation.interval);
        Box::new(StepLines::new(steps, interval)) as Box<dyn MetricsRenderer>
    });
    let options = RunOptions {
        device,
        resume: args.resume,
        renderer,
        interrupter,
    };
    let summary = run::run(&config, prepared, options)?;
    finish(&config, &summary, baseline);
    Ok(if summary.interrupted {
        ExitCode::from(INTERRUPTED)
    } else {
        ExitCode::SUCCESS
    })
}

fn describe(config: &TrainConfig, baseline: entropy::Entropy) {
    println!(
        "entropy of the validation tokens, nats per token: unigram {:.4}, bigram {:.4}",
        baseline.unigram, baseline.bigram
    );
    println!(
        "training: {} steps of {} tokens, results in {}",
        config.run.steps,
        config.tokens_per_step(),
        config.run.directory.display()
    );
    let parallel = &config.parallel;
    if parallel.mesh().ranks() > 1 {
        println!(
            "ranks: {}, data {} x pipeline {} ({}) x expert {}, {} micro-batches of {} sequences in each pipeline",
            parallel.mesh().ranks(),
            parallel.data,
            parallel.pipeline,
            Schedule::from(parallel.schedule).name(),
            parallel.expert,
            config.micro_batches_per_pipeline(),
            config.batch.sequences
        );
    }
}

/// The first Ctrl-C asks for a checkpoint after the step under way, the second ends the process.
fn stop_on_ctrl_c(interrupter: &Interrupter) -> anyhow::Result<()> {
    static ASKED: AtomicBool = AtomicBool::new(false);
    let interrupter = interrupter.clone();
    ctrlc::set_handler(move || {
        if ASKED.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("stopping after this step, with a checkpoint; once more to stop at once");
        interrupter.stop(Some("Ctrl-C"));
    })
    .context("cannot listen for Ctrl-C")
}

fn finish(config: &TrainConfig, summary: &RunSummary, baseline: entropy::Entropy) {
    if let Some(report) = &summary.validation {
        println!(
            "validation loss {:.4} nats per token ({:.3} bits per byte) after step {}; unigram entropy {:.4}, \
             bigram entropy {:.4}",
            report.main, report.bits_per_byte, report.step, baseline.unigram, baseline.bigram
        );
    }
    if let Some(path) = &summary.checkpoint {
        println!("checkpoint: {}", path.display());
    }
    let directory = config.run.directory.display();
    if summary.interrupted {
        println!(
            "stopped after step {} of {}; go on with --resume",
            summary.steps, config.run.steps
        );
    } else {
        println!("complete it: deepburn generate --model {directory} --prompt \"pub fn \"");
    }
}
