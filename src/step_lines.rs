//! Training without a terminal: a line per step, as a renderer of Burn.

use std::collections::HashMap;

use burn::train::{
    logger::{EvaluationProgressLogger, TrainingProgressLogger},
    metric::{MetricDefinition, MetricId},
    renderer::{
        EvaluationName, MetricState, MetricsRenderer, MetricsRendererEvaluation,
        MetricsRendererTraining,
    },
};

/// Prints steps and validations on standard output.
pub(crate) struct StepLines {
    steps: u64,
    interval: u64,
    /// Stretches between validations that are over.
    stretches: u64,
    validating: bool,
    names: HashMap<MetricId, String>,
    values: HashMap<String, f64>,
}

impl StepLines {
    /// For a run of `steps` with a validation every `interval`.
    pub(crate) fn new(steps: u64, interval: u64) -> Self {
        Self {
            steps,
            interval,
            stretches: 0,
            validating: false,
            names: HashMap::new(),
            values: HashMap::new(),
        }
    }

    fn remember(&mut self, state: MetricState) {
        if let MetricState::Numeric(entry, Some(value)) = state
            && let Some(name) = self.names.get(&entry.metric_id)
        {
            self.values.insert(name.clone(), value.current());
        }
    }

    fn value(&self, name: &str) -> f64 {
        self.values.get(name).copied().unwrap_or(f64::NAN)
    }

    fn print_step(&self, step: u64) {
        let mtp = self
            .values
            .get("MTP loss")
            .map(|loss| format!(" | mtp {loss:.4}"));
        let spikes = self.values.get("Spikes");
        let spikes = spikes.map(|spikes| format!(" | spikes {spikes:.0}"));
        println!(
            "step {step}/{} | loss {:.4}{} | {:.3} bits/byte | grad norm {:.3} | lr {:.2e} | {:.0} tokens/s | \
             MaxVio {:.3} | dead experts {:.0} | {:.0} MiB{}",
            self.steps,
            self.value("Loss"),
            mtp.unwrap_or_default(),
            self.value("Bits per byte"),
            self.value("Gradient norm"),
            self.value("Learning rate"),
            self.value("Tokens per second"),
            self.value("MaxVio"),
            self.value("Dead experts"),
            self.value("Memory"),
            spikes.unwrap_or_default(),
        );
    }
}

impl MetricsRendererTraining for StepLines {
    fn update_train(&mut self, state: MetricState) {
        self.remember(state);
    }

    fn update_valid(&mut self, state: MetricState) {
        self.remember(state);
    }
}

impl TrainingProgressLogger for StepLines {
    fn start(&mut self, _: usize, starting: usize, _: Option<usize>, _: Option<&str>) {
        self.stretches = starting as u64 - 1;
    }

    fn start_split(&mut self, split: &str, _: usize) {
        self.validating = split != "train";
        self.values.clear();
    }

    fn update_split(&mut self, items: usize) {
        if !self.validating {
            self.print_step(self.stretches * self.interval + items as u64);
        }
    }

    fn end_split(&mut self) {
        if self.validating {
            println!(
                "validation | loss {:.4} | perplexity {:.2} | {:.3} bits/byte",
                self.value("Loss"),
                self.value("Perplexity"),
                self.value("Bits per byte"),
            );
        }
    }

    fn update_epoch(&mut self, epoch: usize) {
        self.stretches = epoch as u64;
    }

    fn end(&mut self) {}

    fn log_event_training(&mut self, _: String) {}
}

// A run here has no test splits; Burn's renderers serve both.
impl MetricsRendererEvaluation for StepLines {
    fn update_test(&mut self, _: EvaluationName, _: MetricState) {}
}

impl EvaluationProgressLogger for StepLines {
    fn start_global_progress(&mut self, _: usize) {}
    fn start_test(&mut self, _: &str, _: usize) {}
    fn update_test_progress(&mut self, _: usize) {}
    fn end_test(&mut self) {}
    fn end_global_progress(&mut self) {}
    fn log_event_evaluation(&mut self, _: String) {}
}

impl MetricsRenderer for StepLines {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names
            .insert(definition.metric_id, definition.name.to_string());
    }
}
