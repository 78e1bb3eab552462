//! A schedule for given sizes: what each rank does, in order.

use super::{
    action::{Action, Direction, Transfer},
    placement::Placement,
};

/// What every rank does with one batch.
///
/// Its parts are open, so that a timeline of any origin can be put to [`Timeline::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// Where the stages are.
    pub placement: Placement,
    /// How many micro-batches there are in each direction.
    pub micro_batches: usize,
    /// By rank.
    pub ranks: Vec<RankSteps>,
}

/// What one rank does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankSteps {
    /// In order.
    pub steps: Vec<Step>,
    /// The transfers to wait for at the end.
    pub final_wait: Vec<Transfer>,
}

/// A wait, then an action.
///
/// The transfers of a batch are started together when the action before is done, in this order, and the rank goes
/// on when all of them are: what NCCL calls a group.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What the action before has left to send, and what is received.
    pub wait: Vec<Transfer>,
    /// The computation.
    pub action: Action,
}

impl Timeline {
    /// The largest number of activations that each rank keeps at once, table 2's "activation".
    ///
    /// The unit is what one stage keeps of one micro-batch. It is kept from the start of F to the end of B, or where
    /// B is split to the end of W. In an overlapped pair the forward pass's is added before the other's is dropped.
    pub fn peak_activations(&self) -> Vec<usize> {
        // Counts are exact in floating point.
        let peaks = self.peak_kept(|_, _| 1.0).into_iter();
        peaks.map(|peak| peak as usize).collect()
    }

    /// The same where `kept` is what a rank's stage for a direction keeps of one micro-batch, in any unit.
    pub fn peak_kept(&self, kept: impl Fn(usize, Direction) -> f64) -> Vec<f64> {
        let peak = |(rank, steps): (usize, &RankSteps)| {
            let (mut now, mut peak) = (0.0, 0.0);
            for part in steps.steps.iter().flat_map(|step| step.action.parts()) {
                let size = kept(rank, part.chunk().direction);
                match part {
                    Action::Forward(_) => now += size,
                    Action::Backward(_) | Action::BackwardWeight(_) => {
                        now = f64::max(now - size, 0.0);
                    }
                    Action::BackwardInput(_) | Action::Overlapped { .. } => (),
                }
                peak = f64::max(peak, now);
            }
            peak
        };
        self.ranks.iter().enumerate().map(peak).collect()
    }

    /// The short names of what each rank does.
    pub fn order(&self) -> Vec<Vec<String>> {
        let names = |rank: &RankSteps| {
            let steps = rank.steps.iter();
            steps.map(|step| step.action.to_string()).collect()
        };
        self.ranks.iter().map(names).collect()
    }
}

impl RankSteps {
    /// The batches of transfers: one before each action, and the last.
    pub fn waits(&self) -> impl Iterator<Item = &[Transfer]> {
        let steps = self.steps.iter().map(|step| step.wait.as_slice());
        steps.chain([self.final_wait.as_slice()])
    }
}
