//! DualPipeV: one half of DualPipe, with its stages folded at what was the middle.
//!
//! DualPipe's two halves are mirror images, so one of them is enough if both directions are legs of one way: a
//! micro-batch goes from rank 0 to the last and, through stages of their own, back to rank 0. The stages are twice as
//! many as the ranks, and there is one copy of the model instead of two. What was sent across the middle stays on the
//! last rank. The order of the actions is that of DualPipe on twice as many ranks with twice as many micro-batches.

use super::{Schedule, action::Direction, dualpipe::Seat, recorder::Recorder, timeline::RankSteps};

pub(super) fn steps(rank: usize, ranks: usize, micro_batches: usize) -> RankSteps {
    let [near, far] = Direction::BOTH;
    let seat = Seat {
        outside: rank,
        inside: ranks - 1 - rank,
        near,
        far,
    };
    let steps = Recorder::new(Schedule::DualPipeV.placement(ranks), rank);
    seat.phases(steps, micro_batches)
}
