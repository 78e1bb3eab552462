//! Pipeline schedules as values (report, section 3.2.1).
//!
//! A model is cut into stages and a batch into micro-batches. A schedule says in which order each rank computes its
//! stages, forward and backward, and what it sends and receives in between. [`Schedule::timeline`] makes that order,
//! [`Timeline::validate`] proves that it can be executed, [`simulate`] tells how long it takes if all stages cost the
//! same, [`simulate_uneven`] if they do not.
//!
//! Start reading at [`action`], then [`dualpipe`].

pub mod action;
pub mod dualpipe;
pub mod dualpipe_v;
mod formulas;
pub mod one_f_one_b;
pub mod placement;
mod recorder;
mod rendezvous;
pub mod simulation;
pub mod timeline;
mod validate;
pub mod zero_bubble;

use serde::{Deserialize, Serialize};

pub use action::{Action, Chunk, Direction, Pass, Transfer, TransferKind};
pub use placement::{Neighbour, Placement, Route};
pub use simulation::{Costs, Simulation, Span, simulate, simulate_uneven};
pub use timeline::{RankSteps, Step, Timeline};
pub use validate::Violation;

/// The largest number of ranks times micro-batches: far more than any pipeline has, and little memory.
pub const MAX_CHUNKS: usize = 1 << 20;

/// An order of forward and backward passes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Schedule {
    /// One forward, one backward: see [`one_f_one_b`].
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// ZB1P, with backward passes in two parts: see [`zero_bubble`].
    #[serde(rename = "zb1p")]
    ZeroBubble,
    /// Micro-batches from both ends: see [`dualpipe`].
    #[serde(rename = "dualpipe")]
    DualPipe,
    /// DualPipe folded onto half the ranks: see [`dualpipe_v`].
    #[serde(rename = "dualpipe-v")]
    DualPipeV,
}

/// A number that a schedule cannot work with.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{field} = {value}: {rule}")]
pub struct Refused {
    /// What it is: `ranks`, `micro_batches`, `communication` or a cost as F, B, Bi, W, FB.
    pub field: &'static str,
    /// As it was found.
    pub value: String,
    /// What holds for it.
    pub rule: String,
}

impl Schedule {
    /// All of them, in the order of the report's table 2.
    pub const ALL: [Self; 4] = [
        Self::OneFOneB,
        Self::ZeroBubble,
        Self::DualPipe,
        Self::DualPipeV,
    ];

    /// Its name in the report and in DeepSeek's repository.
    pub fn name(self) -> &'static str {
        match self {
            Self::OneFOneB => "1F1B",
            Self::ZeroBubble => "ZB1P",
            Self::DualPipe => "DualPipe",
            Self::DualPipeV => "DualPipeV",
        }
    }

    /// Where its stages are.
    pub fn placement(self, ranks: usize) -> Placement {
        let route = match self {
            Self::OneFOneB | Self::ZeroBubble => Route::OneWay,
            Self::DualPipe => Route::BothWays,
            Self::DualPipeV => Route::Folded,
        };
        Placement { route, ranks }
    }

    /// What each rank does with a batch of `micro_batches`.
    ///
    /// # Errors
    /// Sizes that this schedule is not made for.
    pub fn timeline(self, ranks: usize, micro_batches: usize) -> Result<Timeline, Refused> {
        self.check(ranks, micro_batches)?;
        let per_rank = match self {
            Self::OneFOneB => one_f_one_b::steps,
            Self::ZeroBubble => zero_bubble::steps,
            Self::DualPipe => dualpipe::steps,
            Self::DualPipeV => dualpipe_v::steps,
        };
        Ok(Timeline {
            placement: self.placement(ranks),
            micro_batches: match self {
                Self::DualPipe => micro_batches / 2,
                _ => micro_batches,
            },
            ranks: (0..ranks)
                .map(|rank| per_rank(rank, ranks, micro_batches))
                .collect(),
        })
    }

    fn check(self, ranks: usize, micro_batches: usize) -> Result<(), Refused> {
        let name = self.name();
        let refused = |field, value: usize, rule| {
            Err(Refused {
                field,
                value: value.to_string(),
                rule,
            })
        };
        let even = self == Self::DualPipe;
        if ranks == 0 || even && !ranks.is_multiple_of(2) {
            let even = if even { "even " } else { "" };
            return refused(
                "ranks",
                ranks,
                format!("{name} needs a positive {even}number"),
            );
        }
        if ranks
            .checked_mul(micro_batches)
            .is_none_or(|product| product > MAX_CHUNKS)
        {
            let rule = format!("ranks x micro_batches must be at most {MAX_CHUNKS}");
            return if ranks > MAX_CHUNKS {
                refused("ranks", ranks, rule)
            } else {
                refused("micro_batches", micro_batches, rule)
            };
        }
        let least = match self {
            Self::OneFOneB | Self::ZeroBubble => 1,
            Self::DualPipe | Self::DualPipeV => 2 * ranks,
        };
        if micro_batches < least || even && !micro_batches.is_multiple_of(2) {
            let even = if even { "an even number, " } else { "" };
            let rule = format!("{name} needs {even}at least {least} for {ranks} ranks");
            return refused("micro_batches", micro_batches, rule);
        }
        Ok(())
    }
}
