//! Routing in plain tensor operations.

use burn::tensor::{Bool, DType, Int, Tensor, activation::sigmoid};

use super::{GroupLimit, Routed, SMALLEST_SUM, Weighting};

/// See [`super::route`].
pub(super) fn route(
    logits: Tensor<2>,
    bias: Tensor<1>,
    limit: GroupLimit,
    weighting: Weighting,
) -> Routed {
    let dtype = logits.dtype();
    // Half precisions are widened; double stays.
    let logits = match dtype {
        DType::F32 | DType::F64 => logits,
        _ => logits.cast(DType::F32),
    };
    let affinity = sigmoid(logits);
    let bias = bias.cast(affinity.dtype()).detach();
    let choice = affinity.clone().detach() + bias.unsqueeze_dim(0);
    let chosen = super::select_experts(choice, limit);
    let weights = affinity.gather(1, chosen.clone());
    let weights = if weighting.normalised {
        weights.clone() / (weights.sum_dim(1) + SMALLEST_SUM)
    } else {
        weights
    };
    Routed {
        chosen,
        weights: (weights * weighting.scale).cast(dtype),
    }
}

/// See [`super::select_experts`].
pub(super) fn select_experts(choice: Tensor<2>, limit: GroupLimit) -> Tensor<2, Int> {
    let [tokens, experts] = choice.dims();
    let per_group = experts / limit.groups;
    let choice = numbers(choice);
    let grouped = choice.clone().reshape([tokens, limit.groups, per_group]); // [T, G, E/G]
    let group_scores = grouped
        .topk(per_group.min(2), 2)
        .sum_dim(2)
        .reshape([tokens, limit.groups]);
    let group_scores = numbers(group_scores); // inf - inf
    let none_out = group_scores.clone().is_nan();
    let kept = best_first(group_scores, none_out, limit.groups_per_token); // [T, M]

    // An expert stays if its group is among the kept ones.
    let group_of = Tensor::<1, Int>::arange(0..experts as i64, &choice.device()) / per_group as i64;
    let stays = kept
        .unsqueeze_dim::<3>(2)
        .equal(
            group_of
                .reshape([1, 1, experts])
                .expand([tokens, limit.groups_per_token, experts]),
        )
        .any_dim(1)
        .reshape([tokens, experts]);
    best_first(choice, stays.bool_not(), limit.experts_per_token)
}

/// The values, with -inf for NaN.
fn numbers(values: Tensor<2>) -> Tensor<2> {
    values.clone().mask_fill(values.is_nan(), f32::NEG_INFINITY)
}

/// The indices of the `count` highest values of each row that are not `out`, best first, ties to the lowest index.
///
/// Made of maximum, comparison and minimum, because backends differ in which of equal values their sorts prefer.
fn best_first(values: Tensor<2>, out: Tensor<2, Bool>, count: usize) -> Tensor<2, Int> {
    let [rows, columns] = values.dims();
    let mut values = values.mask_fill(out.clone(), f32::NEG_INFINITY);
    let index = Tensor::<1, Int>::arange(0..columns as i64, &values.device())
        .reshape([1, columns])
        .expand([rows, columns]);
    let mut taken = out;
    let mut chosen = Vec::with_capacity(count);
    for _ in 0..count {
        let best = values.clone().max_dim(1).expand([rows, columns]);
        let candidate = values
            .clone()
            .equal(best)
            .bool_and(taken.clone().bool_not());
        let first = index
            .clone()
            .mask_fill(candidate.bool_not(), columns as i64)
            .min_dim(1); // [rows, 1]
        let hit = index.clone().equal(first.clone().expand([rows, columns]));
        values = values.mask_fill(hit.clone(), f32::NEG_INFINITY);
        taken = taken.bool_or(hit);
        chosen.push(first);
    }
    Tensor::cat(chosen, 1)
}
