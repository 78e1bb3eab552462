//! The movement of tokens on the CPU.

use burn::backend::{
    Flex,
    tensor::{FloatTensor, IntTensor},
};
use rayon::prelude::*;

use super::{PermuteGrad, PermuteOps, Sorted, padded_rows};
use crate::{
    flex::{
        FlexFloat, Scalar, contiguous, dims, elements, float_tensor, indices, int_tensor,
        with_scalar,
    },
    parts::by_parts,
    vector::vectorized,
};

impl PermuteOps for Flex {
    fn sort_by_expert(
        chosen: IntTensor<Self>,
        experts: usize,
        tile: usize,
    ) -> Sorted<IntTensor<Self>> {
        let chosen = indices(&chosen);
        let pairs = chosen.len();
        let mut counts = vec![0i32; experts];
        for &expert in &chosen {
            counts[expert] += 1;
        }
        let rows: Vec<i32> = counts
            .iter()
            .map(|&count| (count as usize).next_multiple_of(tile) as i32)
            .collect();
        let mut next: Vec<i32> = rows
            .iter()
            .scan(0, |offset, rows| {
                let start = *offset;
                *offset += rows;
                Some(start)
            })
            .collect();
        // What no pair is written to pads a segment.
        let mut order = vec![pairs as i32; padded_rows(pairs, experts, tile)];
        let mut slots = Vec::with_capacity(pairs);
        for (pair, &expert) in chosen.iter().enumerate() {
            order[next[expert] as usize] = pair as i32;
            slots.push(next[expert]);
            next[expert] += 1;
        }
        let all = order.len();
        (
            int_tensor(order, [all]),
            int_tensor(slots, [pairs]),
            int_tensor(counts, [experts]),
            int_tensor(rows, [experts]),
        )
    }

    fn permute_rows(
        x: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let [tokens, k] = dims(&slots);
        let (x, order) = (contiguous(x), indices(&order));
        with_scalar!(x, T => fill_rows(&x, order.len(), #[inline(always)] |values: &[T], width, row, out| {
            if order[row] < tokens * k {
                out.copy_from_slice(row_of(values, width, order[row] / k));
            }
        }))
    }

    fn combine_rows(
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        _order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let [tokens, k] = dims(&slots);
        let (y, weights, slots) = (contiguous(y), contiguous(weights), indices(&slots));
        with_scalar!(y, T => {
            let weights = elements::<T>(&weights);
            fill_rows(&y, tokens, #[inline(always)] |values: &[T], width, token, out| {
                for pair in token * k..(token + 1) * k {
                    add_scaled(out, row_of(values, width, slots[pair]), weights[pair]);
                }
            })
        })
    }
}

impl PermuteGrad for Flex {
    fn permute_rows_grad(grad: FloatTensor<Self>, slots: IntTensor<Self>) -> FloatTensor<Self> {
        let [tokens, k] = dims(&slots);
        let (grad, slots) = (contiguous(grad), indices(&slots));
        with_scalar!(grad, T => fill_rows(&grad, tokens, #[inline(always)] |values: &[T], width, token, out| {
            for &slot in &slots[token * k..(token + 1) * k] {
                add_scaled(out, row_of(values, width, slot), T::ONE);
            }
        }))
    }

    fn combine_rows_grad(
        grad: FloatTensor<Self>,
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [tokens, k] = dims(&slots);
        let (grad, y, weights) = (contiguous(grad), contiguous(y), contiguous(weights));
        let (order, slots) = (indices(&order), indices(&slots));
        with_scalar!(y, T => {
            let [_, width] = dims(&y);
            let (y, weights) = (elements::<T>(&y), elements::<T>(&weights));
            let grad_y = fill_rows(&grad, order.len(), #[inline(always)] |values: &[T], width, row, out| {
                let pair = order[row];
                if pair < weights.len() {
                    add_scaled(out, row_of(values, width, pair / k), weights[pair]);
                }
            });
            let grad = elements::<T>(&grad);
            let mut grad_weights = vec![T::ZERO; tokens * k];
            grad_weights.par_chunks_mut(k).enumerate().for_each(|(token, out)| {
                let grad = row_of(grad, width, token);
                for (out, &slot) in out.iter_mut().zip(&slots[token * k..]) {
                    *out = dot(grad, row_of(y, width, slot));
                }
            });
            (grad_y, float_tensor(grad_weights, [tokens, k]))
        })
    }
}

/// A tensor of `rows` rows of the width of `source`, each filled by `fill(source, width, row, out)`.
fn fill_rows<T: Scalar>(
    source: &FlexFloat,
    rows: usize,
    fill: impl Fn(&[T], usize, usize, &mut [T]) + Sync,
) -> FlexFloat {
    /// Rows per task: enough work to be worth handing to another thread.
    const CHUNK: usize = 64;
    let [_, width] = dims(source);
    let values = elements::<T>(source);
    let (out, _) = by_parts(rows * width, CHUNK * width, |chunk, out| {
        vectorized!(
            for (offset, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
                fill(values, width, chunk * CHUNK + offset, out);
            }
        );
    });
    float_tensor(out, [rows, width])
}

#[inline(always)]
fn row_of<T>(values: &[T], width: usize, row: usize) -> &[T] {
    &values[row * width..(row + 1) * width]
}

#[inline(always)]
fn add_scaled<T: Scalar>(out: &mut [T], row: &[T], scale: T) {
    for (out, &value) in out.iter_mut().zip(row) {
        *out += scale * value;
    }
}

/// A dot product in eight interleaved sums: a fixed order that the compiler can keep in one vector register.
fn dot<T: Scalar>(a: &[T], b: &[T]) -> T {
    const LANES: usize = 8;
    let mut sums = [T::ZERO; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks.clone()) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let mut total = T::ZERO;
    for sum in sums {
        total += sum;
    }
    for (&a, &b) in rest {
        total += a * b;
    }
    total
}
