//! What the backward pass computes again instead of keeping it from the forward pass (report section 3.2.3).

use burn::tensor::{GradientCheckpointingStrategy, Tensor};

/// Whether the results of some operations are computed again.
///
/// Burn's gradient checkpointing, for these operations alone: their results are not kept for whoever needs them in the
/// backward pass, who gets them from what they were computed of. All others are computed once. Without autodiff there is
/// nothing to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Recompute(pub(crate) bool);

impl Recompute {
    /// What `f` makes of `x`.
    pub(crate) fn of<const N: usize, const M: usize>(
        self,
        x: Tensor<N>,
        f: impl FnOnce(Tensor<N>) -> Tensor<M>,
    ) -> Tensor<M> {
        match x.gradient_checkpointing_strategy() {
            Some(before) if self.0 => f(marked(x)).with_gradient_checkpointing_strategy(before),
            _ => f(x),
        }
    }

    /// What `f` makes of `x` and a weight.
    pub(crate) fn with_weight<const N: usize, const M: usize, const W: usize>(
        self,
        x: Tensor<N>,
        weight: Tensor<W>,
        f: impl FnOnce(Tensor<N>, Tensor<W>) -> Tensor<M>,
    ) -> Tensor<M> {
        match x.is_autodiff() && self.0 {
            true => self.of(x, |x| f(x, marked(weight))),
            false => f(x, weight),
        }
    }
}

fn marked<const N: usize>(x: Tensor<N>) -> Tensor<N> {
    x.with_gradient_checkpointing_strategy(GradientCheckpointingStrategy::Balanced)
}
