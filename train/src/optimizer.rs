//! The optimizer and its learning rate, as Burn's Learner takes them.

use burn::{
    optim::{
        AdamWState, AdaptiveMomentumState, LearningRate as Rate, ModuleOptimizer, Optimizer,
        RecordState, StateSink, StateSource,
        lr_scheduler::{LrScheduler, LrSchedulerRecord},
    },
    tensor::{DType, Device, Tensor},
};
use deepburn_kernels::{adamw, bf16::rounded};

use crate::{config::OptimizerConfig, precision::Precision, schedule::LearningRate};

/// AdamW on every parameter. Gradients are clipped before, by their global norm (see [`crate::step::update`]).
pub fn adamw(config: &OptimizerConfig, precision: Precision) -> ModuleOptimizer {
    ModuleOptimizer::from(AdamW {
        update: adamw::AdamW {
            rate: 0.0,
            beta_1: config.beta1 as f32,
            beta_2: config.beta2 as f32,
            epsilon: config.epsilon as f32,
            weight_decay: config.weight_decay as f32,
        },
        moments: precision.moments(),
    })
}

/// Burn's AdamW with its state, in one pass over each parameter where the device has a kernel, and with moments of any
/// type.
#[derive(Clone)]
struct AdamW {
    /// But for the rate, which is the step's.
    update: adamw::AdamW,
    /// F32 or BF16; where the device has no tensors of it, its numbers are held in the parameter's type.
    moments: DType,
}

/// Burn's state of AdamW. Records are read into the host's memory, from where each step takes them to its parameter's
/// device: Burn reads them into its default device, which need not be there.
#[derive(Clone)]
struct State<const D: usize>(AdamWState<D>);

impl<const D: usize> RecordState for State<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        self.0.state_flatten(prefix, out);
    }

    fn state_unflatten(prefix: &str, source: &mut StateSource, _: &Device) -> Option<Self> {
        AdamWState::state_unflatten(prefix, source, &Device::flex()).map(Self)
    }
}

impl Optimizer for AdamW {
    type State<const D: usize> = State<D>;

    fn step<const D: usize>(
        &self,
        rate: Rate,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        state: Option<State<D>>,
    ) -> (Tensor<D>, Option<State<D>>) {
        let update = adamw::AdamW {
            rate,
            ..self.update
        };
        let held = if parameter.device().supports_dtype(self.moments) {
            self.moments
        } else {
            parameter.dtype()
        };
        let (moments, time) = match state {
            Some(State(AdamWState { momentum })) => {
                // A record is read in the type of the device's numbers.
                let moments = [momentum.moment_1, momentum.moment_2];
                (moments.map(|m| m.cast(held)), momentum.time + 1)
            }
            None => {
                let zeros = gradient.zeros_like().cast(held);
                ([zeros.clone(), zeros], 1)
            }
        };
        let (parameter, mut moments) = update.update(parameter, gradient, moments, time);
        if held != self.moments {
            moments = moments.map(rounded);
        }
        let [first, second] = moments;
        let momentum = AdaptiveMomentumState::new(time, first, second);
        (parameter, Some(State(AdamWState::new(momentum))))
    }

    fn to_device<const D: usize>(state: State<D>, device: &Device) -> State<D> {
        State(AdamWState::new(state.0.momentum.to_device(device)))
    }
}

/// The report's learning rate as a scheduler of Burn. Its only state is the step.
#[derive(Clone, Debug)]
pub struct ReportSchedule {
    rate: LearningRate,
    steps: u64,
    next: u64,
}

impl ReportSchedule {
    /// A schedule of a run of `steps` whose next step is `next` (from 0).
    pub fn new(rate: LearningRate, steps: u64, next: u64) -> Self {
        Self { rate, steps, next }
    }
}

impl LrScheduler for ReportSchedule {
    fn step(&mut self) -> Rate {
        self.next += 1;
        self.rate.at(self.next - 1, self.steps)
    }

    fn to_record(&self) -> LrSchedulerRecord {
        LrSchedulerRecord::new().with_scalar("next", self.next)
    }

    fn load_record(&mut self, record: LrSchedulerRecord) {
        if let Some(next) = record.scalar("next") {
            self.next = next;
        }
    }
}
