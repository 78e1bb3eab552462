//! The movement of tokens in plain tensor operations.

use burn::tensor::{IndexingUpdateOp, Int, Tensor};

use super::{Permutation, padded_rows};

/// A counting sort: a pair's row is its expert's offset plus its rank among the expert's pairs.
pub(super) fn sort_by_expert(chosen: Tensor<2, Int>, experts: usize, tile: usize) -> Permutation {
    let [tokens, k] = chosen.dims();
    let pairs = tokens * k;
    let device = chosen.device();
    let expert = Tensor::<1, Int>::arange(0..experts as i64, &device).reshape([1, experts]);
    let chosen = chosen.reshape([pairs, 1]);
    let hit = chosen
        .clone()
        .expand([pairs, experts])
        .equal(expert.expand([pairs, experts]))
        .int(); // [S, E]
    let seen = hit.clone().cumsum(0);
    let counts = hit.sum_dim(0).reshape([experts]);
    let rows = (counts.clone() + (tile as i64 - 1)) / tile as i64 * tile as i64;
    let offsets = rows.clone().cumsum(0) - rows.clone();
    let slots = offsets.gather(0, chosen.clone().reshape([pairs]))
        + seen.gather(1, chosen).reshape([pairs])
        - 1;
    let all = padded_rows(pairs, experts, tile);
    // What no pair is added to pads a segment.
    let order = Tensor::<1, Int>::full([all], pairs as i64, &device).scatter(
        0,
        slots.clone(),
        Tensor::arange(0..pairs as i64, &device) - pairs as i64,
        IndexingUpdateOp::Add,
    );
    Permutation {
        order,
        slots: slots.reshape([tokens, k]),
        counts,
        rows,
        tile,
    }
}

/// See [`super::permute`].
pub(super) fn permute(x: Tensor<2>, permutation: &Permutation) -> Tensor<2> {
    let ([_, k], [_, width]) = (permutation.dims(), x.dims());
    // The token of a padding row is the one past the end.
    let zeros = Tensor::zeros([1, width], (&x.device(), x.dtype()));
    let x = Tensor::cat(vec![x, zeros], 0);
    x.select(0, permutation.order.clone() / k as i64)
}

/// See [`super::combine`].
pub(super) fn combine(y: Tensor<2>, weights: Tensor<2>, permutation: &Permutation) -> Tensor<2> {
    let [tokens, k] = permutation.dims();
    let [_, width] = y.dims();
    let rows = y
        .select(0, permutation.slots.clone().reshape([tokens * k]))
        .reshape([tokens, k, width]);
    (rows * weights.unsqueeze_dim(2))
        .sum_dim(1)
        .reshape([tokens, width])
}
