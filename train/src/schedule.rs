//! How learning rate, MTP weight and bias speed change over a run: the report's schedules (section 4.2) as functions
//! of the fraction of training that is done.
//!
//! The report gives its points in tokens of 14.8T; each is kept as a fraction of the run.

use serde::{Deserialize, Serialize};

/// Learning rate: linear warm-up, constant, cosine, constant, lower constant.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LearningRate {
    /// Highest rate (2.2e-4).
    pub peak: f64,
    /// Steps of linear growth from zero (2000).
    pub warmup_steps: u64,
    /// Fraction of the run at which the cosine starts (10T of 14.8T tokens).
    #[serde(default = "decay_start")]
    pub decay_start: f64,
    /// Fraction at which it ends (14.3T).
    #[serde(default = "decay_end")]
    pub decay_end: f64,
    /// Fraction from which the last rate holds (14.633T).
    #[serde(default = "last_start")]
    pub last_start: f64,
    /// Rate at the end of the cosine, relative to the peak (2.2e-5).
    #[serde(default = "end_ratio")]
    pub end_ratio: f64,
    /// Last rate, relative to the peak (7.3e-6).
    #[serde(default = "last_ratio")]
    pub last_ratio: f64,
}

fn decay_start() -> f64 {
    10.0 / 14.8
}
fn decay_end() -> f64 {
    14.3 / 14.8
}
fn last_start() -> f64 {
    14.633 / 14.8
}
fn end_ratio() -> f64 {
    0.1
}
fn last_ratio() -> f64 {
    7.3 / 220.0
}

impl LearningRate {
    /// The rate of `step` (from 0) in a run of `steps`.
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / self.warmup_steps as f64;
        }
        let done = fraction(step, steps);
        let ratio = if done < self.decay_start {
            1.0
        } else if done < self.decay_end {
            let along = (done - self.decay_start) / (self.decay_end - self.decay_start);
            let cosine = (1.0 + (std::f64::consts::PI * along).cos()) / 2.0;
            self.end_ratio + (1.0 - self.end_ratio) * cosine
        } else if done < self.last_start {
            self.end_ratio
        } else {
            self.last_ratio
        };
        self.peak * ratio
    }

    /// The broken rule, if any: (key, value, rule).
    pub fn problem(&self) -> Option<(&'static str, f64, &'static str)> {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let ratio = |value: f64| (0.0..=1.0).contains(&value);
        if !positive(self.peak) {
            Some(("peak", self.peak, "must be a positive number"))
        } else if !ratio(self.decay_start) {
            Some(("decay_start", self.decay_start, "must be 0 to 1"))
        } else if !(self.decay_start..=1.0).contains(&self.decay_end) {
            Some(("decay_end", self.decay_end, "must be decay_start to 1"))
        } else if !(self.decay_end..=1.0).contains(&self.last_start) {
            Some(("last_start", self.last_start, "must be decay_end to 1"))
        } else if !ratio(self.end_ratio) {
            Some(("end_ratio", self.end_ratio, "must be 0 to 1"))
        } else if !ratio(self.last_ratio) {
            Some(("last_ratio", self.last_ratio, "must be 0 to 1"))
        } else {
            None
        }
    }
}

/// A value that changes once.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Switch {
    /// Value before.
    pub first: f64,
    /// Value from then on.
    pub then: f64,
    /// Fraction of the run at which it changes.
    pub at: f64,
}

impl Switch {
    /// The value of `step` (from 0) in a run of `steps`.
    pub fn at(&self, step: u64, steps: u64) -> f64 {
        if fraction(step, steps) < self.at {
            self.first
        } else {
            self.then
        }
    }

    /// Lambda, the weight of the MTP loss: 0.3 for 10T tokens, then 0.1.
    pub fn mtp_weight() -> Self {
        Self {
            first: 0.3,
            then: 0.1,
            at: 10.0 / 14.8,
        }
    }

    /// Gamma, the speed of the selection bias: 0.001 for 14.3T tokens, then 0.
    pub fn bias_speed() -> Self {
        Self {
            first: 0.001,
            then: 0.0,
            at: 14.3 / 14.8,
        }
    }
}

fn fraction(step: u64, steps: u64) -> f64 {
    step as f64 / steps.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> LearningRate {
        LearningRate {
            peak: 2.2e-4,
            warmup_steps: 2000,
            decay_start: decay_start(),
            decay_end: decay_end(),
            last_start: last_start(),
            end_ratio: end_ratio(),
            last_ratio: last_ratio(),
        }
    }

    /// One step per 1M tokens: 14.8M steps, so that the report's points are whole steps.
    #[test]
    fn the_reports_learning_rates() {
        let rate = |step| report().at(step, 14_800_000);
        let close = |found: f64, expected: f64| {
            assert!(
                (found / expected - 1.0).abs() < 1e-6,
                "found {found:e}, expected {expected:e}"
            );
        };
        close(rate(0), 2.2e-4 / 2000.0);
        close(rate(1999), 2.2e-4);
        close(rate(9_999_999), 2.2e-4);
        close(rate(12_150_000), (2.2e-4 + 2.2e-5) / 2.0);
        close(rate(14_300_001), 2.2e-5);
        close(rate(14_632_999), 2.2e-5);
        close(rate(14_633_001), 7.3e-6);
    }

    #[test]
    fn switches_change_once() {
        let gamma = Switch::bias_speed();
        assert_eq!(
            [gamma.at(0, 100), gamma.at(96, 100), gamma.at(97, 100)],
            [0.001, 0.001, 0.0]
        );
    }

    #[test]
    fn unordered_points_are_a_problem() {
        assert_eq!(report().problem(), None);
        let wrong = LearningRate {
            decay_end: 0.5,
            ..report()
        };
        assert_eq!(
            wrong.problem(),
            Some(("decay_end", 0.5, "must be decay_start to 1"))
        );
    }
}
