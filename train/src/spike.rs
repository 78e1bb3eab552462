//! Spikes: steps whose loss is far above that of the steps before. A pure policy.
//!
//! "Far" is measured robustly: in deviations from the median of a window of losses, where a deviation is the median
//! distance from the median, scaled to the standard deviation of normal numbers. Spikes do not enter the window, so that
//! one does not hide the next; but a level that lasts for half a window is not a spike any more, whatever it is.

use serde::{Deserialize, Serialize};

/// `[optimizer] spike`
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct SpikeConfig {
    /// What happens at a spike.
    pub action: SpikeAction,
    /// Losses that a step's is compared with; none is judged before half of them are there.
    pub window: usize,
    /// Deviations above the median from which on it is a spike.
    pub deviations: f64,
}

/// What happens at a spike.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SpikeAction {
    /// Nothing; none is looked for.
    Off,
    /// It is counted in the metrics.
    #[default]
    Warn,
    /// It is counted, and its optimizer step is left out.
    Skip,
}

impl Default for SpikeConfig {
    fn default() -> Self {
        Self::of(SpikeAction::default())
    }
}

impl SpikeConfig {
    /// None is looked for.
    pub const OFF: Self = Self::of(SpikeAction::Off);

    const fn of(action: SpikeAction) -> Self {
        Self {
            action,
            window: 64,
            deviations: 8.0,
        }
    }

    /// The broken rule, if any: (key, value, rule).
    pub fn problem(&self) -> Option<(&'static str, f64, &'static str)> {
        if self.window < 8 {
            Some(("window", self.window as f64, "must be at least 8"))
        } else if !(self.deviations.is_finite() && self.deviations > 0.0) {
            let rule = "must be a positive number";
            Some(("deviations", self.deviations, rule))
        } else {
            None
        }
    }
}

/// The losses so far, as far as the next one is compared with them. In single precision: what is written to a checkpoint
/// is read again as it was.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SpikeWatch {
    /// Oldest first.
    losses: Vec<f32>,
    /// Spikes in a row up to the last step.
    in_a_row: usize,
    /// Spikes so far.
    count: u64,
}

impl SpikeWatch {
    /// Spikes so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether the loss of the next step is a spike.
    pub fn observe(&mut self, loss: f64, config: &SpikeConfig) -> bool {
        let loss = loss as f32;
        if !loss.is_finite() || self.limit(config).is_some_and(|limit| loss > limit) {
            self.in_a_row += 1;
            if self.in_a_row <= config.window / 2 || !loss.is_finite() {
                self.count += 1;
                return true;
            }
            self.losses.clear();
        }
        self.in_a_row = 0;
        self.losses.push(loss);
        let excess = self.losses.len().saturating_sub(config.window);
        self.losses.drain(..excess);
        false
    }

    /// The largest loss that is not a spike, if there are enough to judge by.
    fn limit(&self, config: &SpikeConfig) -> Option<f32> {
        /// From the median distance of normal numbers to their standard deviation.
        const TO_STANDARD: f64 = 1.4826;
        /// Losses that are all but equal deviate by this part of themselves.
        const LEAST: f64 = 0.005;
        if self.losses.len() < config.window / 2 {
            return None;
        }
        let losses: Vec<f64> = self.losses.iter().map(|&loss| f64::from(loss)).collect();
        let middle = median(losses.clone());
        let distance = median(losses.iter().map(|loss| (loss - middle).abs()).collect());
        let deviation = (TO_STANDARD * distance).max(LEAST * middle.abs());
        Some((middle + config.deviations * deviation) as f32)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() % 2 {
        0 => (values[half - 1] + values[half]) / 2.0,
        _ => values[half],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: SpikeConfig = SpikeConfig {
        action: SpikeAction::Warn,
        window: 16,
        deviations: 8.0,
    };

    /// Which of the losses are spikes, by their places.
    fn spikes(losses: impl IntoIterator<Item = f64>) -> Vec<usize> {
        let mut watch = SpikeWatch::default();
        let observed = losses.into_iter().map(|loss| watch.observe(loss, &CONFIG));
        let found = observed.enumerate().filter(|(_, spike)| *spike);
        let found: Vec<usize> = found.map(|(at, _)| at).collect();
        assert_eq!(watch.count(), found.len() as u64);
        found
    }

    /// Numbers that look random, -1 to 1.
    fn noise(at: usize) -> f64 {
        let bits = (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (bits ^ bits >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) as i64 as f64 / i64::MAX as f64
    }

    #[test]
    fn a_falling_noisy_loss_has_no_spikes_but_those_put_in() {
        let loss = |at: usize| 3.0 + 6.0 / (1.0 + at as f64 / 20.0) + 0.2 * noise(at);
        assert!(spikes((0..2000).map(loss)).is_empty());
        let with = |at: usize| loss(at) + if at % 300 == 299 { 2.0 } else { 0.0 };
        assert_eq!(
            spikes((0..2000).map(with)),
            [299, 599, 899, 1199, 1499, 1799]
        );
    }

    #[test]
    fn equal_losses_do_not_make_the_next_one_a_spike() {
        let rise = |by: f64| move |at: usize| if at == 50 { 2.0 + by } else { 2.0 };
        // Eight times half a percent.
        assert!(spikes((0..60).map(rise(0.079))).is_empty());
        assert_eq!(spikes((0..60).map(rise(0.081))), [50]);
        assert!(spikes((0..60).map(|_| 0.0)).is_empty());
    }

    #[test]
    fn one_spike_does_not_hide_the_next() {
        let loss = |at: usize| {
            if at > 30 && at.is_multiple_of(2) {
                9.0
            } else {
                3.0 + 0.1 * noise(at)
            }
        };
        let expected: Vec<usize> = (32..200).step_by(2).collect();
        assert_eq!(spikes((0..200).map(loss)), expected);
    }

    /// Whatever comes, a run is never left without steps for more than half a window.
    #[test]
    fn a_level_that_lasts_is_accepted() {
        let steps = |at: usize| if at < 40 { 3.0 } else { 5.0 };
        assert_eq!(spikes((0..200).map(steps)), (40..48).collect::<Vec<_>>());
        for growth in [1.01f64, 1.1, 2.0, 1e3] {
            let found = spikes((0..60).map(|at| growth.powi(at)));
            let taken = (0..60).filter(|at| !found.contains(at)).collect::<Vec<_>>();
            let longest = taken.windows(2).map(|pair| pair[1] - pair[0] - 1).max();
            assert!(longest <= Some(8), "{growth}: {found:?}");
        }
        // Slow growth is none at all.
        assert!(spikes((0..2000).map(|at| 3.0 * 1.001f64.powi(at))).is_empty());
    }

    #[test]
    fn what_is_not_finite_is_a_spike_and_no_measure() {
        let loss = |at: usize| match at {
            5 | 30..60 => f64::NAN,
            7 => f64::INFINITY,
            _ => 2.0,
        };
        let expected: Vec<usize> = [5, 7].into_iter().chain(30..60).collect();
        assert_eq!(spikes((0..80).map(loss)), expected);
        // Nor are numbers far below the others.
        let low = |at: usize| if at % 9 == 8 { -1e30 } else { 2.0 };
        assert!(spikes((0..80).map(low)).is_empty());
    }

    #[test]
    fn a_watch_goes_on_where_it_was_written() {
        let loss = |at: usize| 3.0 + noise(at) / 3.0 + if at % 37 == 36 { 40.0 } else { 0.0 };
        let (mut whole, mut parts) = (SpikeWatch::default(), SpikeWatch::default());
        for at in 0..300 {
            let text = serde_json::to_string(&parts).unwrap();
            parts = serde_json::from_str(&text).unwrap();
            assert_eq!(
                whole.observe(loss(at), &CONFIG),
                parts.observe(loss(at), &CONFIG)
            );
        }
        assert_eq!(whole, parts);
        assert_eq!(whole.count(), 8);
    }
}
