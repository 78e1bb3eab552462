//! The closed formulas of the report's table 2, to compare simulated timelines with.

use super::{Schedule, simulation::Costs};

impl Schedule {
    /// How long the rank that waits for longest has nothing to do.
    ///
    /// Exact for F = Bi = W = B / 2, F&B from B to F + B, free communication and at least as many micro-batches as
    /// ranks; that of 1F1B for any F and B. Where F&B = F + B all ranks wait for as long.
    ///
    /// `DualPipeV` has twice as many stages as ranks, which is the report's PP; its costs are those of the smaller
    /// stages.
    pub fn bubble(self, ranks: usize, costs: &Costs) -> f64 {
        let &Costs {
            forward,
            backward,
            backward_weight,
            overlapped,
            ..
        } = costs;
        let others = ranks.saturating_sub(1) as f64;
        let pair = overlapped + backward - 3.0 * backward_weight;
        match self {
            Self::OneFOneB => others * (forward + backward),
            Self::ZeroBubble => others * (forward + backward - 2.0 * backward_weight),
            Self::DualPipe => (ranks / 2).saturating_sub(1) as f64 * pair,
            Self::DualPipeV => others * pair,
        }
    }

    /// The largest number of activations that a rank keeps, in the unit of
    /// [`Timeline::peak_activations`](super::Timeline::peak_activations): PP, for DualPipe PP + 1, where PP is the
    /// number of stages.
    ///
    /// Rank 0 of 1F1B keeps as many, rank r less by r. Of the others every rank does.
    pub fn activations(self, ranks: usize) -> usize {
        let stages = self.placement(ranks).stages();
        match self {
            Self::OneFOneB | Self::ZeroBubble => stages,
            Self::DualPipe | Self::DualPipeV => stages + 1,
        }
    }

    /// How many stages a rank has the parameters of: table 2's 1x and 2x, where the unit is the stage.
    pub fn stages_per_rank(self) -> usize {
        self.placement(1).directions().len()
    }
}
