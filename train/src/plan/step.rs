//! A step of training: the pipeline, then the optimizer; and what many of them come to.

use serde::Serialize;

use super::{
    PlanConfig, Stage,
    gemm::Part,
    memory::{Held, parts_of, replicas},
    work::{Machine, Work},
};
use crate::{
    config::ConfigError,
    pipeline::schedule::{
        Action, Chunk, Costs, Placement, Refused, Simulation, Timeline, simulate_uneven,
    },
};

/// Where the time of a rank goes between the start of a step and the end of the last backward pass, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RankTimes {
    /// Products, attention and memory traffic.
    pub computation: f64,
    /// Communication behind computation.
    pub hidden: f64,
    /// Communication that computation waits for.
    pub exposed: f64,
    /// Waiting for other ranks.
    pub bubble: f64,
}

/// What a run comes to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Seconds of an optimizer step.
    pub step: f64,
    /// Optimizer steps.
    pub steps: f64,
    /// Tokens per second, all GPUs together.
    pub tokens_per_second: f64,
    /// Of the whole run.
    pub gpu_hours: f64,
    /// Their rent.
    pub usd: f64,
    /// Three times the forward FLOPs, per second and GPU: what is computed again does not count.
    pub tflops: f64,
    /// Relative to the BF16 peak.
    pub bf16_utilisation: f64,
    /// Relative to the FP8 peak.
    pub fp8_utilisation: f64,
    /// Seconds of a step for summing gradients and gathering weights; 0 if not known.
    pub reduction: f64,
    /// Seconds of a step for the optimizer; 0 if not known.
    pub optimizer: f64,
}

pub(super) struct Run {
    pub(super) ranks: Vec<RankTimes>,
    pub(super) mean: Costs,
    pub(super) timeline: Timeline,
    pub(super) simulation: Simulation,
    pub(super) prediction: Prediction,
    pub(super) reported: Option<Prediction>,
}

pub(super) fn run(machine: &Machine<'_>, stages: &[Stage]) -> Result<Run, ConfigError> {
    let config = machine.config;
    let (schedule, pp) = (config.layout.schedule, config.layout.pp);
    let timeline = schedule
        .timeline(pp, config.micro_batches())
        .map_err(|refused| rule(config, refused))?;
    let pipeline = Pipeline {
        config,
        stages,
        placement: timeline.placement,
        transfer: transfer(machine),
    };
    let communication = match pp {
        1 => 0.0,
        _ => pipeline.transfer + config.cluster.latency_us * 1e-6,
    };
    let simulation = simulate_uneven(&timeline, communication, |rank, action| {
        pipeline.times(rank, action).total()
    })
    .expect("a schedule makes valid timelines");
    let ranks: Vec<RankTimes> = (0..pp)
        .map(|rank| {
            let mut times = RankTimes {
                bubble: simulation.bubble[rank],
                ..RankTimes::default()
            };
            for step in &timeline.ranks[rank].steps {
                let action = pipeline.times(rank, step.action);
                times.computation += action.computation;
                times.hidden += action.hidden;
                times.exposed += action.exposed;
            }
            times
        })
        .collect();
    let [reduction, optimizer] = update(machine, stages, &timeline);
    let step = simulation.makespan + reduction + optimizer;
    let prediction = Prediction {
        reduction,
        optimizer,
        ..of_step(machine, step)
    };
    let hours = config.training.reported_gpu_hours;
    Ok(Run {
        ranks,
        mean: pipeline.mean(&timeline),
        timeline,
        simulation,
        prediction,
        reported: (hours > 0.0).then(|| {
            let steps = prediction.steps * config.cluster.gpus as f64;
            of_step(machine, hours * 3600.0 / steps)
        }),
    })
}

/// The schedule knows ranks and micro-batches, the file what they come from.
fn rule(config: &PlanConfig, refused: Refused) -> ConfigError {
    let layout = &config.layout;
    match refused.field {
        "ranks" => ConfigError::rule("layout.pp", layout.pp, &refused.rule),
        _ => {
            let rule = format!(
                "gives {} micro-batches per pipeline; {}",
                refused.value, refused.rule
            );
            ConfigError::rule("layout.global_batch", layout.global_batch, &rule)
        }
    }
}

/// Seconds to hand a micro-batch on to the next rank.
fn transfer(machine: &Machine<'_>) -> f64 {
    let (config, assumed) = (machine.config, &machine.config.assumptions);
    let bytes = (config.tokens() * machine.model.hidden_size) as f64 * assumed.bf16_bytes;
    bytes / network_rate(config)
}

/// Bytes per second between nodes, of all but dispatch.
fn network_rate(config: &PlanConfig) -> f64 {
    config.cluster.ib_gb_s * 1e9 * config.assumptions.combine_efficiency
}

struct Pipeline<'a> {
    config: &'a PlanConfig,
    stages: &'a [Stage],
    placement: Placement,
    transfer: f64,
}

/// Of one action.
#[derive(Clone, Copy, Default)]
struct Times {
    computation: f64,
    hidden: f64,
    exposed: f64,
}

impl Times {
    fn total(&self) -> f64 {
        self.computation + self.exposed
    }
}

impl Pipeline<'_> {
    fn times(&self, rank: usize, action: Action) -> Times {
        let stage = |chunk: Chunk| {
            let stage = self.placement.stage(rank, chunk.direction);
            &self.stages[stage].passes
        };
        match action {
            Action::Forward(chunk) => alone(stage(chunk).forward),
            Action::Backward(chunk) => alone(stage(chunk).backward()),
            Action::BackwardInput(chunk) => alone(stage(chunk).input),
            Action::BackwardWeight(chunk) => alone(stage(chunk).weight),
            Action::Overlapped { forward, backward } => {
                self.pair(stage(forward).forward + stage(backward).backward())
            }
        }
    }

    /// Figure 4: all-to-all of both, and what is handed on in both directions, beside the computation of both, which
    /// has fewer multiprocessors meanwhile.
    fn pair(&self, work: Work) -> Times {
        if !self.config.layout.overlap {
            return alone(work);
        }
        let sms = self.config.cluster.sms as f64;
        let left = sms - self.config.layout.communication_sms as f64;
        let computation = work.computation(left / sms);
        let network = work.network + 2.0 * self.transfer;
        Times {
            computation,
            hidden: f64::min(network, computation),
            exposed: f64::max(network - computation, 0.0),
        }
    }

    /// Over all stages, of pairs over all that there are.
    fn mean(&self, timeline: &Timeline) -> Costs {
        let count = self.stages.len() as f64;
        let mean = |work: fn(&Stage) -> Work| {
            let times = self.stages.iter().map(|stage| alone(work(stage)).total());
            times.sum::<f64>() / count
        };
        let (mut pairs, mut time) = (0.0, 0.0);
        for (rank, steps) in timeline.ranks.iter().enumerate() {
            for step in &steps.steps {
                if let Action::Overlapped { .. } = step.action {
                    pairs += 1.0;
                    time += self.times(rank, step.action).total();
                }
            }
        }
        let (forward, backward) = (
            mean(|stage| stage.passes.forward),
            mean(|stage| stage.passes.backward()),
        );
        Costs {
            forward,
            backward,
            backward_input: mean(|stage| stage.passes.input),
            backward_weight: mean(|stage| stage.passes.weight),
            overlapped: if pairs > 0.0 {
                time / pairs
            } else {
                forward + backward
            },
            communication: self.transfer,
        }
    }
}

/// Nothing beside it, and all multiprocessors for either.
fn alone(work: Work) -> Times {
    Times {
        computation: work.computation(1.0),
        hidden: 0.0,
        exposed: work.network,
    }
}

/// Seconds until the weights of the next step are there: reduction, and the optimizer on each GPU's part.
fn update(machine: &Machine<'_>, stages: &[Stage], timeline: &Timeline) -> [f64; 2] {
    let (config, assumed) = (machine.config, &machine.config.assumptions);
    let parts: Vec<Vec<Part>> = stages.iter().map(|stage| stage.parts.clone()).collect();
    let [shared, experts] = replicas(config);
    // In a ring each GPU sends all but its own part once to reduce and once to gather.
    let sent = |parameters: f64, replicas: f64| {
        let bytes = assumed.reduced_gradient_bytes + assumed.weight_bytes;
        parameters * bytes * (1.0 - 1.0 / replicas)
    };
    let touched = assumed.reduced_gradient_bytes
        + 2.0 * (assumed.master_bytes + assumed.moments_bytes)
        + assumed.weight_bytes;
    let mut longest = [0.0, 0.0];
    for rank in 0..config.layout.pp {
        let held = Held::of(
            machine.model,
            config.layout.ep,
            &parts_of(&parts, timeline, rank),
        );
        let bytes = sent(held.shared, shared) + sent(held.experts, experts);
        let times = [
            bytes / network_rate(config),
            machine.seconds(held.owned(config) * touched),
        ];
        longest = [0, 1].map(|which| f64::max(longest[which], times[which]));
    }
    longest
}

/// What a run with steps of this length comes to.
fn of_step(machine: &Machine<'_>, step: f64) -> Prediction {
    let (model, config) = (machine.model, machine.config);
    let (layout, training) = (&config.layout, &config.training);
    let tokens = (layout.global_batch * layout.sequence_length) as f64;
    let steps = training.tokens / tokens;
    let gpus = config.cluster.gpus as f64;
    let gpu_hours = steps * step * gpus / 3600.0;
    let forward: f64 = Part::all(model)
        .iter()
        .flatten()
        .map(|part| part.flops(model, layout.sequence_length))
        .sum();
    let tflops = 3.0 * forward * tokens / step / gpus / 1e12;
    Prediction {
        step,
        steps,
        tokens_per_second: tokens / step,
        gpu_hours,
        usd: gpu_hours * training.usd_per_gpu_hour,
        tflops,
        bf16_utilisation: tflops / config.cluster.bf16_peak_tflops,
        fp8_utilisation: tflops / config.cluster.fp8_peak_tflops,
        reduction: 0.0,
        optimizer: 0.0,
    }
}
