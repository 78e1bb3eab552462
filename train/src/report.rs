//! What is known of a step: for the log, the terminal and the dashboard.

use burn::{
    backend::ExecutionError,
    tensor::TensorReadError,
    train::{
        ItemLazy,
        metric::{
            Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric,
            NumericAttributes, NumericEntry, SerializedEntry, format_float,
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
    /// Optimizer steps left out so far because gradients were not finite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped_steps: Option<u64>,
    /// Losses so far that were far above those before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spikes: Option<u64>,
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

/// A number of a report, as one of Burn's metrics: the mean over predicted tokens, then shown through `show`.
#[derive(Clone)]
pub struct Measure {
    name: MetricName,
    unit: Option<&'static str>,
    higher_is_better: bool,
    pick: fn(&StepReport) -> Option<f64>,
    show: fn(f64) -> f64,
    current: f64,
    sum: f64,
    tokens: u64,
}

impl Measure {
    /// What is shown of training steps.
    pub fn of_training() -> Vec<Self> {
        let mut measures = Self::of_validation();
        measures.extend([
            Self::new("Gradient norm", None, |r| r.gradient_norm),
            Self::new("Learning rate", None, |r| r.learning_rate),
            Self {
                higher_is_better: true,
                ..Self::new("Tokens per second", None, |r| r.tokens_per_second)
            },
            Self::new("MaxVio", None, |r| r.worst_violation),
            Self::new("Dead experts", None, |r| {
                r.dead_experts.map(|dead| dead as f64)
            }),
            Self::new("Spikes", None, |r| r.spikes.map(|spikes| spikes as f64)),
            Self::new("Memory", Some("MiB"), |r| {
                r.memory_bytes
                    .map(|bytes| bytes as f64 / f64::from(1 << 20))
            }),
        ]);
        measures
    }

    /// What is shown of validation.
    pub fn of_validation() -> Vec<Self> {
        vec![
            Self::new("Loss", Some("nats"), |r| Some(r.main)),
            Self::new("MTP loss", Some("nats"), |r| r.mtp.first().copied()),
            // The perplexity of many tokens is that of their mean loss, not their mean perplexity.
            Self {
                show: f64::exp,
                ..Self::new("Perplexity", None, |r| Some(r.main))
            },
            Self::new("Bits per byte", None, |r| Some(r.bits_per_byte)),
        ]
    }

    fn new(name: &str, unit: Option<&'static str>, pick: fn(&StepReport) -> Option<f64>) -> Self {
        Self {
            name: name.to_owned().into(),
            unit,
            higher_is_better: false,
            pick,
            show: |value| value,
            current: f64::NAN,
            sum: 0.0,
            tokens: 0,
        }
    }

    fn mean(&self) -> f64 {
        (self.show)(self.sum / self.tokens as f64)
    }

    fn entry(&self, value: &NumericEntry) -> SerializedEntry {
        let unit = self.unit.map(|unit| format!(" {unit}")).unwrap_or_default();
        let (mean, current) = (
            format_float(self.mean(), 4),
            format_float((self.show)(self.current), 4),
        );
        SerializedEntry::new(
            format!("epoch {mean}{unit} - batch {current}{unit}"),
            value.serialize(),
        )
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
        let Some(value) = (self.pick)(report) else {
            return Ok(SerializedEntry::not_available(self.unit));
        };
        self.current = value;
        self.sum += value * report.predicted_tokens as f64;
        self.tokens += report.predicted_tokens;
        Ok(self.entry(&NumericEntry::Value((self.show)(value))))
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        if self.tokens == 0 {
            return Ok(SerializedEntry::not_available(self.unit));
        }
        Ok(self.entry(&self.final_value()))
    }

    fn clear(&mut self) {
        (self.sum, self.tokens) = (0.0, 0);
    }
}

impl Numeric for Measure {
    fn value(&self) -> Option<NumericEntry> {
        (self.tokens > 0).then(|| NumericEntry::Value((self.show)(self.current)))
    }

    fn running_value(&self) -> Option<NumericEntry> {
        (self.tokens > 0).then(|| NumericEntry::Aggregated {
            aggregated_value: self.mean(),
            count: self.tokens as usize,
        })
    }

    fn final_value(&self) -> NumericEntry {
        NumericEntry::Final(self.mean())
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

    #[test]
    fn measures_are_means_over_tokens_and_perplexity_that_of_the_mean() {
        let [mut loss, _, mut perplexity, _]: [Measure; 4] =
            Measure::of_validation().try_into().ok().unwrap();
        let progress = burn::data::dataloader::Progress::new(1, 1, None);
        let metadata = MetricMetadata {
            progress,
            iteration: None,
            lr: None,
        };
        for (predicted_tokens, main) in [(1, 1.0), (3, 5.0)] {
            let report = StepReport {
                predicted_tokens,
                main,
                ..StepReport::default()
            };
            loss.update(&report, &metadata).unwrap();
            perplexity.update(&report, &metadata).unwrap();
        }
        assert_eq!(loss.final_value().current(), 4.0);
        assert_eq!(perplexity.final_value().current(), 4f64.exp());
        assert_eq!(perplexity.value().unwrap().current(), 5f64.exp());
        loss.clear();
        assert!(loss.value().is_none());
    }
}
