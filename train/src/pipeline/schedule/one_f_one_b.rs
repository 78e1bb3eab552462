//! 1F1B: one forward, one backward (Harlap et al., 2018; the report's table 2).
//!
//! Rank r starts with as many forward passes as there are ranks behind it. From then on each forward pass is followed
//! by the backward pass of the oldest micro-batch, so that a rank keeps at most `ranks - r` activations. What is left
//! at the end are backward passes.

use super::{Schedule, action::Direction, recorder::Recorder, timeline::RankSteps};

const ONLY: Direction = Direction::Ascending;

pub(super) fn steps(rank: usize, ranks: usize, micro_batches: usize) -> RankSteps {
    let mut steps = Recorder::new(Schedule::OneFOneB.placement(ranks), rank);
    let ahead = (ranks - 1 - rank).min(micro_batches);
    for _ in 0..ahead {
        steps.forward(ONLY);
    }
    for _ in ahead..micro_batches {
        steps.forward(ONLY);
        steps.backward(ONLY);
    }
    for _ in 0..ahead {
        steps.backward(ONLY);
    }
    steps.finish()
}
