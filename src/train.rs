//! `deepburn train`: prepares data, trains, and says where the result is.

use std::{io::IsTerminal, path::PathBuf, process::ExitCode, sync::Arc};

use burn::train::{Interrupter, renderer::MetricsRenderer};
use deepburn_train::{
    config::TrainConfig,
    data::{self, DataError, Prepared, entropy},
    parallel::{Communicator, first_then_others},
    pipeline::schedule::Schedule,
    run::{self, RunOptions, RunSummary, TrainError},
};

use crate::{
    INTERRUPTED, device::DeviceSpec, progress::Progress, ranks, signals::at_first_signal,
    step_lines::StepLines,
};

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

pub(crate) fn run(mut args: Args) -> anyhow::Result<ExitCode> {
    args.device = args.device.of_rank(ranks::local_rank());
    let config = TrainConfig::read(&args.config, &args.set)?;
    let Some(processes) = ranks::join(&config.parallel, args.device)? else {
        let mut progress = Progress::new();
        let prepared = prepare(&config, &mut progress)?;
        return lead(&args, &config, prepared, run::run);
    };
    let world = &processes.world;
    let mut progress = (world.rank() == 0).then(Progress::new);
    let result = first_then_others(world.as_ref(), || {
        let prepared = match &mut progress {
            Some(progress) => prepare(&config, progress),
            None => data::prepare(&config.data, config.run.seed, &mut |_| {}),
        };
        prepared.map_err(TrainError::from)
    });
    let result = match result {
        Ok(prepared) if world.rank() == 0 => {
            lead(&args, &config, prepared, |config, data, options| {
                run::run_as_rank(world.clone(), config, data, options)
            })
        }
        Ok(prepared) => follow(&args, &config, prepared, world.clone()),
        Err(error) => Err(error.into()),
    };
    match result {
        Err(error) if world.rank() > 0 => {
            let cause: Option<&TrainError> = error.downcast_ref();
            if cause.is_none_or(|cause| !cause.is_heard() && !cause.is_seen_by_all()) {
                eprintln!("error: rank {}: {error}", world.rank());
            }
            Ok(ExitCode::FAILURE)
        }
        result => result,
    }
}

fn prepare(config: &TrainConfig, progress: &mut Progress) -> Result<Prepared, DataError> {
    data::prepare(&config.data, config.run.seed, &mut |event| {
        progress.event(event)
    })
}

/// Trains in sight of the user.
fn lead(
    args: &Args,
    config: &TrainConfig,
    data: Prepared,
    train: impl FnOnce(&TrainConfig, Prepared, RunOptions) -> Result<RunSummary, TrainError>,
) -> anyhow::Result<ExitCode> {
    let device = args.device.open()?;
    let baseline = entropy::split_entropy(&data.valid)?;
    describe(config, baseline);

    let interrupter = Interrupter::new();
    let asked = "stopping after this step, with a checkpoint; once more to stop at once";
    stop_on_ctrl_c(&interrupter, move || eprintln!("{asked}"))?;
    // mpirun passes output on, whatever its own is.
    let alone = ranks::local_rank().is_none();
    let lines = args.plain || !alone || !std::io::stdout().is_terminal();
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
    let summary = train(config, data, options)?;
    finish(config, &summary, baseline);
    Ok(exit_code(&summary))
}

/// Trains as a rank that shows nothing.
fn follow(
    args: &Args,
    config: &TrainConfig,
    data: Prepared,
    world: Arc<dyn Communicator>,
) -> anyhow::Result<ExitCode> {
    let interrupter = Interrupter::new();
    stop_on_ctrl_c(&interrupter, || ())?;
    let options = RunOptions {
        device: args.device.open()?,
        resume: args.resume,
        renderer: None,
        interrupter,
    };
    let summary = run::run_as_rank(world, config, data, options)?;
    Ok(exit_code(&summary))
}

fn exit_code(summary: &RunSummary) -> ExitCode {
    if summary.interrupted {
        ExitCode::from(INTERRUPTED)
    } else {
        ExitCode::SUCCESS
    }
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

/// The first Ctrl-C asks for a checkpoint after the step under way, a second ends the process.
fn stop_on_ctrl_c(
    interrupter: &Interrupter,
    asked: impl Fn() + Send + 'static,
) -> anyhow::Result<()> {
    let interrupter = interrupter.clone();
    at_first_signal(move || {
        asked();
        interrupter.stop(Some("Ctrl-C"));
    })
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
