//! ZB1P: 1F1B with backward passes in two parts (Qi et al., 2023, there ZB-H1; the report's table 2).
//!
//! Only Bi is waited for by another rank, so W can fill what would be a bubble. The order of F and Bi is that of
//! 1F1B. Rank r lets W lag r micro-batches behind Bi: it starts with r forward passes less than rank 0 and may keep
//! r more activations, so that no rank keeps more than `ranks`. At the end the r that lag are all that is left.

use super::{Schedule, action::Direction, recorder::Recorder, timeline::RankSteps};

const ONLY: Direction = Direction::Ascending;

pub(super) fn steps(rank: usize, ranks: usize, micro_batches: usize) -> RankSteps {
    let mut steps = Recorder::new(Schedule::ZeroBubble.placement(ranks), rank);
    let ahead = (ranks - 1 - rank).min(micro_batches);
    for _ in 0..ahead {
        steps.forward(ONLY);
    }
    for micro_batch in 0..micro_batches {
        if ahead + micro_batch < micro_batches {
            steps.forward(ONLY);
        }
        steps.backward_input(ONLY);
        if micro_batch >= rank {
            steps.weight();
        }
    }
    for _ in 0..rank.min(micro_batches) {
        steps.weight();
    }
    steps.finish()
}
