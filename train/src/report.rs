//! What is known of a step: for the log, the terminal and the dashboard.

use burn::{
    backend::ExecutionError,
    tensor::TensorReadError,
    train::{
        ItemLazy,
        metric::{
            Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric,
            NumericAttributes, NumericEntry, SerializedEntry,
            state::{FormatOptions, NumericMetricState},
        },
    },
};
use serde::{Deserialize, Serialize};

use crate::balance;

/// One step of training, or the mean over the validation windows after it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct StepReport {
    /// Number of the step, from 1.
    pub step: u64,
    /// Tokens that were predicted.
    pub predicted_tokens: u64,
    /// What is minimised.
    pub loss: f64,
    /// Next-token cross-entropy, nats per token.
    pub main: f64,
    /// Cross-entropy of each MTP depth, nats per token.
    pub mtp: Vec<f64>,
    /// Sequence-wise balance loss without its factor.
    pub balance: f64,
    /// `exp(main)`.
    pub perplexity: f64,
    /// `main` per byte of text, in bits.
    pub bits_per_byte: f64,
    /// Norm of the gradients before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradient_norm: Option<f64>,
    /// Learning rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Speed of the selection bias, gamma.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bias_speed: Option<f64>,
    /// Predicted tokens per second of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// MaxVio of each mixture-of-experts layer, MTP modules last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub max_violation: Vec<f64>,
    /// The largest of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_violation: Option<f64>,
    /// Experts that received nothing, over all layers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_experts: Option<usize>,
    /// Memory of the process, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<usize>,
}

impl StepReport {
    /// The mean of several reports: of micro-batches of one step, or of validation batches.
    pub fn mean(reports: &[Self]) -> Self {
        let total: u64 = reports.iter().map(|report| report.predicted_tokens).sum();
        let mean = |value: &dyn Fn(&Self) -> f64| {
            let sum: f64 = reports
                .iter()
                .map(|r| value(r) * r.predicted_tokens as f64)
                .sum();
            sum / total as f64
        };
        let depths = reports.first().map_or(0, |report| report.mtp.len());
        Self {
            predicted_tokens: total,
            loss: mean(&|report| report.loss),
            main: mean(&|report| report.main),
            mtp: (0..depths)
                .map(|depth| mean(&|report| report.mtp[depth]))
                .collect(),
            balance: mean(&|report| report.balance),
            ..Self::default()
        }
    }

    /// Fills in perplexity and bits per byte.
    pub fn with_text_measures(mut self, bytes_per_token: f64) -> Self {
        self.perplexity = self.main.exp();
        self.bits_per_byte = self.main / std::f64::consts::LN_2 / bytes_per_token;
        self
    }

    /// Fills in how balanced the load was.
    pub fn with_loads(mut self, loads: &[Vec<u64>]) -> Self {
        self.max_violation = loads
            .iter()
            .map(|load| balance::max_violation(load))
            .collect();
        self.worst_violation = self.max_violation.iter().copied().reduce(f64::max);
        self.dead_experts = Some(loads.iter().map(|load| balance::dead_experts(load)).sum());
        self
    }
}

impl ItemLazy for StepReport {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

impl Adaptor<StepReport> for StepReport {
    fn adapt(&self) -> StepReport {
        self.clone()
    }
}

/// A number of a report, as one of Burn's metrics.
#[derive(Clone)]
pub struct Measure {
    name: MetricName,
    unit: Option<&'static str>,
    higher_is_better: bool,
    pick: fn(&StepReport) -> Option<f64>,
    state: NumericMetricState,
}

impl Measure {
    /// What is shown of training steps.
    pub fn of_training() -> Vec<Self> {
        let mut measures = Self::of_validation();
        measures.extend([
            Self::new("Gradient norm", None, false, |r| r.gradient_norm),
            Self::new("Learning rate", None, false, |r| r.learning_rate),
            Self::new("Tokens per second", None, true, |r| r.tokens_per_second),
            Self::new("MaxVio", None, false, |r| r.worst_violation),
            Self::new("Dead experts", None, false, |r| {
                r.dead_experts.map(|dead| dead as f64)
            }),
            Self::new("Memory", Some("MiB"), false, |r| {
                r.memory_bytes
                    .map(|bytes| bytes as f64 / f64::from(1 << 20))
            }),
        ]);
        measures
    }

    /// What is shown of validation.
    pub fn of_validation() -> Vec<Self> {
        vec![
            Self::new("Loss", Some("nats"), false, |r| Some(r.main)),
            Self::new("MTP loss", Some("nats"), false, |r| r.mtp.first().copied()),
            Self::new("Perplexity", None, false, |r| Some(r.perplexity)),
            Self::new("Bits per byte", None, false, |r| Some(r.bits_per_byte)),
        ]
    }

    fn new(
        name: &str,
        unit: Option<&'static str>,
        higher_is_better: bool,
        pick: fn(&StepReport) -> Option<f64>,
    ) -> Self {
        let state = NumericMetricState::default();
        Self {
            name: name.to_owned().into(),
            unit,
            higher_is_better,
            pick,
            state,
        }
    }

    fn format(&self) -> FormatOptions {
        let options = FormatOptions::new(self.name.clone()).precision(4);
        match self.unit {
            Some(unit) => options.unit(unit),
            None => options,
        }
    }
}

impl Metric for Measure {
    type Input = StepReport;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: self.unit.map(str::to_owned),
            higher_is_better: self.higher_is_better,
        }
        .into()
    }

    fn update(
        &mut self,
        report: &StepReport,
        _: &MetricMetadata,
    ) -> Result<SerializedEntry, TensorReadError> {
        match (self.pick)(report) {
            Some(value) => {
                self.state.update(value, 1);
                Ok(self.state.compute_update(self.format()))
            }
            None => Ok(SerializedEntry::not_available(self.unit)),
        }
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(self.state.compute_final(self.format()))
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for Measure {
    fn value(&self) -> Option<NumericEntry> {
        Some(self.state.current_value())
    }

    fn running_value(&self) -> Option<NumericEntry> {
        Some(self.state.running_value())
    }

    fn final_value(&self) -> NumericEntry {
        self.state.final_value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_are_weighted_by_tokens() {
        let report = |predicted_tokens, main| StepReport {
            predicted_tokens,
            main,
            mtp: vec![2.0 * main],
            ..StepReport::default()
        };
        let mean = StepReport::mean(&[report(1, 1.0), report(3, 5.0)]);
        assert_eq!(
            (mean.predicted_tokens, mean.main, mean.mtp),
            (4, 4.0, vec![8.0])
        );
    }

    #[test]
    fn bits_per_byte_is_nats_over_bytes() {
        let report = StepReport {
            main: 2.0 * std::f64::consts::LN_2,
            ..StepReport::default()
        };
        assert_eq!(report.with_text_measures(4.0).bits_per_byte, 0.5);
    }
}
