//! Losses: next-token cross-entropy and the sequence-wise balance loss.

use burn::tensor::{IndexingUpdateOp, Int, Tensor};
use deepburn_kernels::cross_entropy as kernels;

use crate::{moe::Routing, projection::Arithmetic};

/// Mean cross-entropy in nats.
///
/// # Shapes
/// - `logits`: `[B, T, W]`
/// - `targets`: `[B, T]`
pub fn cross_entropy(logits: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
    let [batch, length, vocabulary] = logits.dims();
    let rows = batch * length;
    kernels::cross_entropy(logits.reshape([rows, vocabulary]), targets.reshape([rows]))
}

/// As [`cross_entropy`], of the predictions of an output head.
///
/// # Shapes
/// - `hidden`: `[B, T, D]`
/// - `weight`: `[D, W]`
/// - `targets`: `[B, T]`
pub fn head_cross_entropy(
    hidden: Tensor<3>,
    weight: Tensor<2>,
    targets: Tensor<2, Int>,
    arithmetic: Arithmetic,
) -> Tensor<1> {
    let [batch, length, width] = hidden.dims();
    let rows = batch * length;
    kernels::linear_cross_entropy(
        arithmetic.activation(hidden.reshape([rows, width])),
        arithmetic.weight(weight),
        targets.reshape([rows]),
    )
}

/// Which experts the balance loss counts as chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalanceReading {
    /// The top K of the affinities alone: equation 18 as printed.
    Paper,
    /// The experts really used, with bias and group limit.
    Actual,
}

/// The sequence-wise balance loss without its factor alpha (equations 17 to 20), mean over the sequences.
///
/// # Shapes
/// - `routing`: of one layer, its T = `sequences` * L tokens in order of sequences
pub fn sequence_balance(routing: &Routing, sequences: usize, reading: BalanceReading) -> Tensor<1> {
    let [tokens, experts] = routing.affinity.dims();
    let [_, k] = routing.chosen.dims();
    let length = tokens / sequences;
    let chosen = match reading {
        BalanceReading::Actual => routing.chosen.clone(),
        BalanceReading::Paper => routing.affinity.clone().detach().topk_with_indices(k, 1).1,
    };
    let device = routing.affinity.device().inner();
    let hits = Tensor::<2>::zeros([sequences, experts], &device).scatter(
        1,
        chosen.reshape([sequences, length * k]).inner(),
        Tensor::ones([sequences, length * k], &device),
        IndexingUpdateOp::Add,
    );
    let frequency = hits * (experts as f64 / (k * length) as f64); // f, [B, E]
    let frequency = Tensor::from_inner(frequency);
    let share = routing.affinity.clone() / routing.affinity.clone().sum_dim(1);
    let probability = share.reshape([sequences, length, experts]).mean_dim(1); // P, [B, 1, E]
    (frequency * probability.reshape([sequences, experts])).sum() / sequences as f64
}
