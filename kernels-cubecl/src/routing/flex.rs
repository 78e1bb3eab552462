//! Group-limited top-k on the CPU: one pass per token over its row.

use burn::backend::{
    Autodiff, Backend, Flex,
    autodiff::checkpoint::strategy::CheckpointStrategy,
    tensor::{FloatTensor, IntTensor},
};
use rayon::prelude::*;

use super::{GroupLimit, RouteGrad, RouteOps, RoutingOps, SMALLEST_SUM, Weighting};
use crate::{
    flex::{Scalar, contiguous, dims, elements, float_tensor, indices, int_tensor, with_scalar},
    parts::by_parts,
};

/// Tokens per task: enough work to be worth handing to another thread.
const CHUNK: usize = 128;

impl RoutingOps for Flex {
    fn choose(choice: FloatTensor<Self>, limit: GroupLimit) -> IntTensor<Self> {
        let [tokens, experts] = dims(&choice);
        let k = limit.experts_per_token;
        let choice = contiguous(choice);
        let mut chosen = vec![0i32; tokens * k];
        with_scalar!(choice, T => {
            let rows = elements::<T>(&choice).par_chunks(CHUNK * experts);
            chosen.par_chunks_mut(CHUNK * k).zip(rows).for_each(|(chosen, rows)| {
                let mut best = Best::<T>::default();
                for (row, chosen) in rows.chunks_exact(experts).zip(chosen.chunks_exact_mut(k)) {
                    choose_row(row, limit, &mut best, chosen);
                }
            });
        });
        int_tensor(chosen, [tokens, k])
    }
}

impl RouteOps for Flex {
    fn choose_and_weigh(
        logits: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        limit: GroupLimit,
        weighting: Weighting,
    ) -> (IntTensor<Self>, FloatTensor<Self>) {
        let [tokens, experts] = dims(&logits);
        let k = limit.experts_per_token;
        let (logits, bias) = (contiguous(logits), contiguous(bias));
        let bias = elements::<f32>(&bias);
        let mut chosen = vec![0i32; tokens * k];
        let mut weights = vec![0f32; tokens * k];
        let results = chosen
            .par_chunks_mut(CHUNK * k)
            .zip(weights.par_chunks_mut(CHUNK * k));
        let rows = elements::<f32>(&logits).par_chunks(CHUNK * experts);
        results.zip(rows).for_each(|((chosen, weights), rows)| {
            let mut best = Best::default();
            let (mut affinity, mut choice) = (vec![0f32; experts], vec![0f32; experts]);
            let results = chosen.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k));
            for (row, (chosen, weights)) in rows.chunks_exact(experts).zip(results) {
                for (expert, &logit) in row.iter().enumerate() {
                    affinity[expert] = sigmoid(logit);
                    choice[expert] = affinity[expert] + bias[expert];
                }
                choose_row(&choice, limit, &mut best, chosen);
                let of_chosen = || chosen.iter().map(|&expert| affinity[expert as usize]);
                let sum = sum_of(of_chosen(), weighting);
                for (weight, affinity) in weights.iter_mut().zip(of_chosen()) {
                    *weight = affinity / sum * weighting.scale as f32;
                }
            }
        });
        (
            int_tensor(chosen, [tokens, k]),
            float_tensor(weights, [tokens, k]),
        )
    }
}

impl RouteGrad for Flex {
    /// With w = c s / sum(s): ds = (c dw - sum(c dw s) / sum(s)) / sum(s), and dz = ds s (1 - s).
    fn weigh_grad(
        grad: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        chosen: IntTensor<Self>,
        weighting: Weighting,
    ) -> FloatTensor<Self> {
        let ([tokens, experts], [_, k]) = (dims(&logits), dims(&grad));
        let (grad, logits, chosen) = (contiguous(grad), contiguous(logits), indices(&chosen));
        let (grad, logits) = (elements::<f32>(&grad), elements::<f32>(&logits));
        let (out, _) = by_parts(
            tokens * experts,
            CHUNK * experts,
            |part, out: &mut [f32]| {
                let mut affinity = vec![0f32; k];
                for (row, out) in out.chunks_exact_mut(experts).enumerate() {
                    let token = part * CHUNK + row;
                    let chosen = &chosen[token * k..][..k];
                    let grad = &grad[token * k..][..k];
                    let scaled = |grad: f32| grad * weighting.scale as f32;
                    for (affinity, &expert) in affinity.iter_mut().zip(chosen) {
                        *affinity = sigmoid(logits[token * experts + expert]);
                    }
                    let sum = sum_of(affinity.iter().copied(), weighting);
                    let terms = grad.iter().zip(&affinity);
                    let mean = match weighting.normalised {
                        true => terms.map(|(&grad, s)| scaled(grad) * s).sum::<f32>() / sum,
                        false => 0.0,
                    };
                    for ((&expert, &grad), s) in chosen.iter().zip(grad).zip(&affinity) {
                        out[expert] = (scaled(grad) - mean) / sum * s * (1.0 - s);
                    }
                }
            },
        );
        float_tensor(out, [tokens, experts])
    }
}

/// As exact as Burn's, unlike the vector version: whoever compares choices compares these.
fn sigmoid(x: f32) -> f32 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// What affinities are divided by.
fn sum_of(affinities: impl Iterator<Item = f32>, weighting: Weighting) -> f32 {
    match weighting.normalised {
        true => affinities.sum::<f32>() + SMALLEST_SUM as f32,
        false => 1.0,
    }
}

impl<B: Backend + RoutingOps, C: CheckpointStrategy> RoutingOps for Autodiff<B, C> {
    fn choose(choice: FloatTensor<Self>, limit: GroupLimit) -> IntTensor<Self> {
        B::choose(choice.into_primitive(), limit)
    }
}

fn choose_row<T: Scalar>(row: &[T], limit: GroupLimit, best: &mut Best<T>, chosen: &mut [i32]) {
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
    for (chosen, &(_, expert)) in chosen.iter_mut().zip(&best.items) {
        *chosen = expert as i32;
    }
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
