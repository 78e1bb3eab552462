//! DualPipe: micro-batches from both ends, forward and backward passes overlapped (report, section 3.2.1, figure 5).
//!
//! Every rank has two stages, one for each direction. What a rank does depends on how far it is from the end of the
//! pipeline that it is nearer to, `outside`, and from the middle, `inside`; the two halves are mirror images. The
//! direction that comes from the nearer end is `near`, and its micro-batches arrive first. The other is `far`.
//!
//! In the steady state every action is a pair: F of one and B of the other direction, which keep each other's
//! communication out of sight. The phases before lead up to it, those after lead out:
//!
//! | phase | times | does | because |
//! |---|---|---|---|
//! | 1 | 2 inside | F near | `far` has not arrived yet |
//! | 2 | outside + 1 | F near, F far | the first gradient has not arrived yet |
//! | 3 | inside | Bi far, W, F far | gradients of `far` have a longer way to go: Bi sends them on early |
//! | 4 | the rest | F near & B far, F far & B near | steady state |
//! | 5 | inside | B far, F far & B near | `near` has no more forward passes |
//! | 6 | outside + 1 | B far, B near | neither has; in the second half of the phase Bi for B |
//! | 7 | inside | W, Bi near | W in the gaps between gradients |
//! | 8 | outside + 1 | W | what is still queued |
//!
//! With n micro-batches in each direction, phase 4 has n - 2 (inside + outside + 1) + outside + 1 turns: then all
//! phases together have n of each kind. It is never empty as n is at least the number of ranks.

use super::{
    Schedule,
    action::{Direction, Pass},
    recorder::Recorder,
    timeline::RankSteps,
};

pub(super) fn steps(rank: usize, ranks: usize, micro_batches: usize) -> RankSteps {
    let [ascending, descending] = Direction::BOTH;
    let (outside, near, far) = if rank < ranks / 2 {
        (rank, ascending, descending)
    } else {
        (ranks - 1 - rank, descending, ascending)
    };
    let seat = Seat {
        outside,
        inside: ranks / 2 - 1 - outside,
        near,
        far,
    };
    let steps = Recorder::new(Schedule::DualPipe.placement(ranks), rank);
    seat.phases(steps, micro_batches / 2)
}

/// Where a rank sits between one end of the pipeline and the place where both directions meet.
pub(super) struct Seat {
    /// Ranks between it and the end.
    pub(super) outside: usize,
    /// Ranks between it and the middle.
    pub(super) inside: usize,
    /// The direction that comes from that end.
    pub(super) near: Direction,
    /// The direction that comes from the middle.
    pub(super) far: Direction,
}

impl Seat {
    /// All phases, with `micro_batches` in each direction.
    ///
    /// In phases 2 and 3 the next input is received while something else is computed. The two ranks in the middle
    /// need more care, as what is near for one is far for the other: a rank must not wait for its send while the
    /// receiver waits for a send of its own.
    pub(super) fn phases(&self, mut steps: Recorder, micro_batches: usize) -> RankSteps {
        let &Self {
            outside,
            inside,
            near,
            far,
        } = self;
        let in_the_middle = inside == 0;

        for _ in 0..2 * inside {
            steps.forward(near);
        }

        for turn in 0..=outside {
            steps.forward_unsent(near);
            if in_the_middle {
                steps.send(Pass::Forward, near);
            }
            steps.receive(Pass::Forward, near);
            steps.forward_unsent(far);
            // In the middle the last one is for a neighbour that is in phase 3 by now: the F of phase 4 comes first.
            if !in_the_middle || turn < outside {
                steps.send(Pass::Forward, far);
            }
            if !in_the_middle {
                steps.send(Pass::Forward, near);
            }
        }

        for _ in 0..inside {
            steps.backward_input(far);
            steps.receive(Pass::Forward, far);
            steps.weight();
            steps.forward(far);
        }

        for turn in 0..micro_batches + outside + 1 - 2 * (inside + outside + 1) {
            if turn == 0 && in_the_middle {
                // Not a pair: the first gradient is still on its way, and F fills the time. Both outputs are for the
                // other rank in the middle, which receives them together, for a pair, after doing the same.
                steps.forward_unsent(near);
                steps.send(Pass::Forward, far);
                steps.backward_unsent(far);
                steps.send(Pass::Forward, near);
                steps.send(Pass::Backward, far);
            } else {
                steps.overlapped(near, far);
            }
            steps.overlapped(far, near);
        }

        for _ in 0..inside {
            steps.backward(far);
            steps.overlapped(far, near);
        }

        for place in 0..2 * (outside + 1) {
            let direction = if place % 2 == 0 { far } else { near };
            if place <= outside {
                steps.backward(direction);
            } else {
                steps.backward_input(direction);
            }
        }

        for _ in 0..inside {
            steps.weight();
            steps.backward_input(near);
        }

        for _ in 0..=outside {
            steps.weight();
        }
        steps.finish()
    }
}
