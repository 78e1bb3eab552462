//! Group-limited top-k on the CPU: one pass per token over its row.

use burn::backend::{
    Autodiff, Backend, Flex,
    autodiff::checkpoint::strategy::CheckpointStrategy,
    tensor::{FloatTensor, IntTensor},
};

use super::{GroupLimit, RoutingOps};
use crate::flex::{Scalar, contiguous, dims, elements, int_tensor, with_scalar};

impl RoutingOps for Flex {
    fn choose(choice: FloatTensor<Self>, limit: GroupLimit) -> IntTensor<Self> {
        let [tokens, experts] = dims(&choice);
        let choice = contiguous(choice);
        let mut chosen = Vec::with_capacity(tokens * limit.experts_per_token);
        with_scalar!(choice, T => {
            let mut best = Best::<T>::default();
            for row in elements::<T>(&choice).chunks_exact(experts) {
                choose_row(row, limit, &mut best, &mut chosen);
            }
        });
        int_tensor(chosen, [tokens, limit.experts_per_token])
    }
}

impl<B: Backend + RoutingOps, C: CheckpointStrategy> RoutingOps for Autodiff<B, C> {
    fn choose(choice: FloatTensor<Self>, limit: GroupLimit) -> IntTensor<Self> {
        B::choose(choice.into_primitive(), limit)
    }
}

fn choose_row<T: Scalar>(row: &[T], limit: GroupLimit, best: &mut Best<T>, chosen: &mut Vec<i32>) {
    let per_group = row.len() / limit.groups;
    best.reset(limit.groups_per_token);
    for (group, values) in row.chunks_exact(per_group).enumerate() {
        best.offer(top_two_sum(values), group);
    }
    let mut kept: Vec<usize> = best.items.iter().map(|&(_, group)| group).collect();
    kept.sort_unstable();

    best.reset(limit.experts_per_token);
    for group in kept {
        let experts = row
            .iter()
            .enumerate()
            .skip(group * per_group)
            .take(per_group);
        for (expert, &value) in experts {
            best.offer(value, expert);
        }
    }
    chosen.extend(best.items.iter().map(|&(_, expert)| expert as i32));
}

fn top_two_sum<T: Scalar>(values: &[T]) -> T {
    let mut values = values.iter().map(|&value| number(value));
    let mut first = values.next().expect("groups are not empty");
    let Some(mut second) = values.next() else {
        return first;
    };
    if second > first {
        (first, second) = (second, first);
    }
    for value in values {
        if value > first {
            (first, second) = (value, first);
        } else if value > second {
            second = value;
        }
    }
    first += second;
    first
}

/// The value, and the lowest for NaN.
fn number<T: Scalar>(value: T) -> T {
    if value.partial_cmp(&value).is_some() {
        value
    } else {
        T::LOWEST
    }
}

/// The highest values offered so far, best first. Offered in order of index, an equal value never displaces an
/// earlier one, which is the tie rule.
#[derive(Default)]
struct Best<T> {
    items: Vec<(T, usize)>,
    capacity: usize,
}

impl<T: Scalar> Best<T> {
    fn reset(&mut self, capacity: usize) {
        self.items.clear();
        self.capacity = capacity;
    }

    fn offer(&mut self, value: T, index: usize) {
        let value = number(value);
        let at = self
            .items
            .iter()
            .rposition(|item| item.0 >= value)
            .map_or(0, |at| at + 1);
        if at < self.capacity {
            self.items.truncate(self.capacity - 1);
            self.items.insert(at, (value, index));
        }
    }
}
