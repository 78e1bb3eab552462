//! Group-limited top-k in plain tensor operations.

use burn::tensor::{Int, Tensor};

use super::GroupLimit;

/// See [`super::select_experts`].
pub(super) fn select_experts(choice: Tensor<2>, limit: GroupLimit) -> Tensor<2, Int> {
    let [tokens, experts] = choice.dims();
    let per_group = experts / limit.groups;
    let choice = choice.clone().mask_fill(choice.is_nan(), f32::NEG_INFINITY);
    let grouped = choice.clone().reshape([tokens, limit.groups, per_group]); // [T, G, E/G]
    let group_scores = grouped
        .topk(per_group.min(2), 2)
        .sum_dim(2)
        .reshape([tokens, limit.groups]);
    let kept = best_first(group_scores, limit.groups_per_token); // [T, M]

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
    best_first(
        choice.mask_fill(stays.bool_not(), f32::NEG_INFINITY),
        limit.experts_per_token,
    )
}

/// The indices of the `count` highest values of each row, best first, ties to the lowest index.
///
/// Made of maximum, comparison and minimum, because backends differ in which of equal values their sorts prefer.
fn best_first(mut values: Tensor<2>, count: usize) -> Tensor<2, Int> {
    let [rows, columns] = values.dims();
    let index = Tensor::<1, Int>::arange(0..columns as i64, &values.device())
        .reshape([1, columns])
        .expand([rows, columns]);
    let mut taken = index.clone().lower_elem(0); // [rows, columns], all false
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
