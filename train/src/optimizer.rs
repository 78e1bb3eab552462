//! The optimizer and its learning rate, as Burn's Learner takes them.

use burn::optim::{
    AdamWConfig, LearningRate as Rate, ModuleOptimizer,
    lr_scheduler::{LrScheduler, LrSchedulerRecord},
};

use crate::{config::OptimizerConfig, schedule::LearningRate};

/// AdamW on every parameter. Gradients are clipped before, by their global norm (see [`crate::step::update`]).
pub fn adamw(config: &OptimizerConfig) -> ModuleOptimizer {
    AdamWConfig::new()
        .with_beta_1(config.beta1 as f32)
        .with_beta_2(config.beta2 as f32)
        .with_epsilon(config.epsilon as f32)
        .with_weight_decay(config.weight_decay as f32)
        .init()
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
