//! Which experts a token goes to: group-limited top-k (report section 2.1.2, node-limited routing).

mod flex;
mod reference;

use burn::{
    backend::{
        Dispatch, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};

/// How many experts are chosen, and from how many groups of neighbouring experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// Experts chosen per token, K.
    pub experts_per_token: usize,
    /// Groups into which the experts are divided evenly, G.
    pub groups: usize,
    /// Groups from which a token's experts may come, M.
    pub groups_per_token: usize,
}

impl GroupLimit {
    /// Whether the limit can be met with `experts` experts: the rule that [`select_experts`] asserts.
    pub fn fits(&self, experts: usize) -> bool {
        self.groups > 0
            && experts.is_multiple_of(self.groups)
            && (1..=self.groups).contains(&self.groups_per_token)
            && (1..=self.groups_per_token * (experts / self.groups))
                .contains(&self.experts_per_token)
    }
}

/// Chooses the experts of every token.
///
/// A group's score is the sum of its two highest `choice` values (of its one value if it has one expert). The
/// `groups_per_token` best groups stay; every expert of the others is out, whatever its value (DeepSeek masks
/// with -inf: a mask of zero would let them in among negative values). Of the rest the `experts_per_token` best
/// are chosen, best first. Among equal values the lowest index wins, for groups and for experts. NaN counts as
/// -inf.
///
/// Not differentiable: the choice is a constant of the backward pass. Native on Flex for f32 and f64.
///
/// # Shapes
/// - `choice`: `[T, E]`, affinity plus selection bias
/// - result: `[T, K]`, expert indices
///
/// # Panics
/// If the limit does not fit the number of experts ([`GroupLimit::fits`]).
pub fn select_experts(choice: Tensor<2>, limit: GroupLimit) -> Tensor<2, Int> {
    let [_, experts] = choice.dims();
    assert!(
        limit.fits(experts),
        "{limit:?} cannot be met with {experts} experts"
    );
    let choice = choice.detach();
    if crate::flex::is_native(&choice.device(), choice.dtype()) {
        let GroupLimit {
            experts_per_token,
            groups,
            groups_per_token,
        } = limit;
        Tensor::from_dispatch(Dispatch::choose(
            choice.into_dispatch(),
            experts_per_token,
            groups,
            groups_per_token,
        ))
    } else {
        reference::select_experts(choice, limit)
    }
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait RoutingOps: burn::backend::Backend {
    fn choose(
        choice: FloatTensor<Self>,
        experts_per_token: usize,
        groups: usize,
        groups_per_token: usize,
    ) -> IntTensor<Self>;
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use proptest::prelude::*;

    use super::*;

    fn limit(experts_per_token: usize, groups: usize, groups_per_token: usize) -> GroupLimit {
        GroupLimit {
            experts_per_token,
            groups,
            groups_per_token,
        }
    }

    fn choose(rows: Vec<f32>, experts: usize, limit: GroupLimit) -> Vec<i32> {
        let tokens = rows.len() / experts;
        let choice =
            Tensor::<2>::from_data(TensorData::new(rows, [tokens, experts]), &Device::flex());
        let native = select_experts(choice.clone(), limit)
            .into_data()
            .iter::<i32>()
            .collect::<Vec<_>>();
        let reference = reference::select_experts(choice, limit)
            .into_data()
            .iter::<i32>()
            .collect::<Vec<_>>();
        assert_eq!(native, reference, "native and reference disagree");
        native
    }

    #[test]
    fn ties_go_to_the_lowest_index() {
        assert_eq!(choose(vec![0.5; 8], 8, limit(3, 4, 2)), [0, 1, 2]);
    }

    #[test]
    fn experts_of_other_groups_are_out_even_among_negative_values() {
        // Group 1 has the best pair; with a zero mask the experts of group 0 would beat its negative second value.
        let row = vec![-0.9, -0.9, 0.8, -0.3];
        assert_eq!(choose(row, 4, limit(2, 2, 1)), [2, 3]);
    }

    #[test]
    fn a_group_is_judged_by_its_two_best_not_its_best() {
        let row = vec![0.9, 0.0, 0.0, 0.6, 0.5, 0.0];
        assert_eq!(choose(row, 6, limit(2, 2, 1)), [3, 4]);
    }

    #[test]
    fn groups_of_one_expert_one_group_and_all_experts() {
        assert_eq!(choose(vec![0.1, 0.4, 0.3], 3, limit(2, 3, 2)), [1, 2]);
        assert_eq!(choose(vec![0.1, 0.4, 0.3], 3, limit(3, 1, 1)), [1, 2, 0]);
    }

    proptest! {
        /// Against a scalar oracle written from the definition, with many ties.
        #[test]
        fn agrees_with_a_scalar_oracle(
            (groups, per_group, groups_per_token, k, values) in (1usize..5, 1usize..5)
                .prop_flat_map(|(groups, per_group)| (Just(groups), Just(per_group), 1..=groups))
                .prop_flat_map(|(groups, per_group, chosen)| (
                    Just(groups), Just(per_group), Just(chosen), 1..=chosen * per_group,
                    prop::collection::vec(-3i8..4, groups * per_group * 3),
                ))
        ) {
            let experts = groups * per_group;
            let rows: Vec<f32> = values.iter().map(|&v| f32::from(v) / 4.0).collect();
            let chosen = choose(rows.clone(), experts, limit(k, groups, groups_per_token));
            for (row, chosen) in rows.chunks(experts).zip(chosen.chunks(k)) {
                let mut by_group: Vec<(usize, f32)> = row.chunks(per_group).enumerate().map(|(g, values)| {
                    let mut values = values.to_vec();
                    values.sort_by(|a, b| b.total_cmp(a));
                    (g, values.iter().take(2).sum())
                }).collect();
                by_group.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                let allowed: Vec<usize> = by_group.iter().take(groups_per_token).map(|g| g.0).collect();
                let mut order: Vec<usize> = (0..experts).filter(|e| allowed.contains(&(e / per_group))).collect();
                order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
                let expected: Vec<i32> = order.into_iter().take(k).map(|e| e as i32).collect();
                prop_assert_eq!(chosen, expected);
            }
        }
    }
}
