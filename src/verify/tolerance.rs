//! How far a result may be from its reference, with the reasons.
//!
//! References are single precision. As each case's `meta.json` says, results of their forward pass are at most 9e-6
//! from double precision, 1.7e-5 with YaRN, losses and gradients at most 2e-6; ours may be as far on the other side.

/// What is held against a limit. Errors that are no number exceed every limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bound {
    /// The largest absolute error.
    Max(f64),
    /// The mean absolute error.
    Mean(f64),
    /// The largest error relative to the reference's element.
    Relative(f64),
}

/// Logits, hidden states, what attention and feed-forward parts return, and the cache. A wrong epsilon of the norms
/// moves logits by 5.5e-5.
pub(super) const RESULTS: Bound = Bound::Max(2e-5);
/// The same where positions are extended or weights are block-quantised: the reference's own noise is larger.
pub(super) const RESULTS_WIDE: Bound = Bound::Max(5e-5);
/// Logits of a model that computes in FP8: a code that rounds the other way may send a token to another expert, so that
/// single logits are off by as much as 1.5e-3 between two ways of summing; their mean is off by 1.1e-5 at most, while
/// another rounding moves it by 0.14.
pub(super) const RESULTS_W8A8: Bound = Bound::Mean(1e-3);
/// Weights of the chosen experts: sigmoids of router logits, normalised, so closer than these.
pub(super) const WEIGHTS: Bound = Bound::Max(1e-5);
/// Frequencies and scales come from a few operations on constants: some units of 6e-8. A wrong ramp or exponent
/// changes them by percents.
pub(super) const CONSTANTS: Bound = Bound::Relative(1e-5);
/// Losses and gradient norms; the reference's noise is 4e-7 and 1.3e-6.
pub(super) const LOSS: Bound = Bound::Max(LOSS_LIMIT);
const LOSS_LIMIT: f64 = 1e-5;
/// Gradients, whose noise is 1.5e-7.
pub(super) const GRADIENT: Bound = Bound::Max(1e-5);
/// All parameters after training together: noise is 1.4e-8 to 3.8e-8, a wrong optimizer moves them by 9e-6 or more.
pub(super) const PARAMETERS: Bound = Bound::Mean(1e-6);
/// One parameter's elements after training. AdamW's first steps follow the sign of the gradient, so where that is
/// noise an element may be off by a learning rate (1e-3).
pub(super) const PARAMETER: Bound = Bound::Max(1e-3);
/// Selection biases move by multiples of 1e-3.
pub(super) const BIAS: Bound = Bound::Max(1e-6);
/// The balance loss is about 1e-4 in all, so it is compared by ratio.
pub(super) const BALANCE: Bound = Bound::Relative(1e-5);
/// Its gradients are 1e-7 and less.
pub(super) const BALANCE_GRADIENT: Bound = Bound::Max(1e-10);

/// An element of a matrix product whose largest element is `largest`: sums of hundreds of products in another order.
pub(super) fn product(largest: f32) -> Bound {
    Bound::Max(1e-5 * f64::from(largest))
}

/// A loss that is not divided by the number of its targets: off by as many times its mean's error.
pub(super) fn loss_sum(targets: usize) -> Bound {
    Bound::Max(LOSS_LIMIT * targets as f64)
}
