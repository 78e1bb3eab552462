//! Whether drafting pays: seconds per new token with it and without, from steps of either kind in turn.

/// Neighbouring steps of the same kind.
const WINDOW: u32 = 8;
/// Steps of each kind that decide.
const ENOUGH: u32 = 24;

/// Measures, then decides once.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Payoff {
    with: Rate,
    without: Rate,
    steps: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    steps: u32,
    seconds: f64,
    tokens: u64,
}

impl Rate {
    fn seconds_per_token(self) -> f64 {
        self.seconds / self.tokens.max(1) as f64
    }
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Measured {
    /// Seconds per new token with drafts.
    pub(crate) with: f64,
    /// Without.
    pub(crate) without: f64,
}

impl Measured {
    pub(crate) fn pays(&self) -> bool {
        self.with < self.without
    }
}

impl Payoff {
    /// The result, once there is one.
    pub(crate) fn result(&self) -> Option<Measured> {
        let enough = self.with.steps.min(self.without.steps) >= ENOUGH;
        enough.then(|| Measured {
            with: self.with.seconds_per_token(),
            without: self.without.seconds_per_token(),
        })
    }

    /// Whether the next step should draft.
    pub(crate) fn drafts(&self) -> bool {
        match self.result() {
            Some(measured) => measured.pays(),
            None => (self.steps / WINDOW).is_multiple_of(2),
        }
    }

    /// Adds a step. One between two windows is of neither kind and moves on only: `drafted` is `None`.
    pub(crate) fn record(&mut self, drafted: Option<bool>, seconds: f64, tokens: u64) {
        if self.result().is_some() {
            return;
        }
        self.steps += 1;
        let rate = match drafted {
            Some(true) => &mut self.with,
            Some(false) => &mut self.without,
            None => return,
        };
        rate.steps += 1;
        rate.seconds += seconds;
        rate.tokens += tokens;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps of so many seconds and tokens, with drafts and without; the decision and when it came.
    fn decided(with: (f64, u64), without: (f64, u64)) -> (bool, usize) {
        let mut payoff = Payoff::default();
        let mut before = true;
        for step in 0.. {
            if let Some(measured) = payoff.result() {
                assert_eq!(payoff.drafts(), measured.pays());
                assert!((measured.with - with.0 / with.1 as f64).abs() < 1e-9);
                assert!((measured.without - without.0 / without.1 as f64).abs() < 1e-9);
                return (measured.pays(), step);
            }
            let now = payoff.drafts();
            let (seconds, tokens) = if now { with } else { without };
            payoff.record((now == before).then_some(now), seconds, tokens);
            before = now;
        }
        unreachable!("the loop returns")
    }

    #[test]
    fn the_faster_way_wins() {
        // A step with drafts takes longer and gives more tokens.
        assert!(decided((1.5, 2), (1.0, 1)).0);
        assert!(!decided((1.5, 1), (1.0, 1)).0);
        let (_, steps) = decided((2.0, 2), (1.0, 1));
        assert!(steps < 64, "{steps}");
    }

    #[test]
    fn kinds_take_turns_and_the_decision_stays() {
        let mut payoff = Payoff::default();
        let mut kinds = Vec::new();
        while payoff.result().is_none() {
            let now = payoff.drafts();
            kinds.push(now);
            payoff.record(Some(now), if now { 1.0 } else { 2.0 }, 1);
        }
        assert_eq!(kinds[..16], [[true; 8], [false; 8]].concat());
        payoff.record(Some(true), 1e9, 1);
        assert!(payoff.drafts());
    }
}
