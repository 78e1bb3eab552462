//! Causal attention on the CPU: heads side by side on the threads, each in blocks of queries.

use burn::backend::{
    Flex,
    tensor::{FloatTensor, IntTensor},
};
use rayon::prelude::*;

use super::{AttentionGrad, AttentionOps, Saved};
use crate::{
    flex::{FlexFloat, contiguous, dims, elements, float_tensor, indices},
    gemm::{Into, Matrix, multiply},
    vector::{dot, exp, log_sum_exp, vectorized},
};

/// Queries per block: its scores against a few hundred keys stay in the second-level cache.
const BLOCK: usize = 64;

impl AttentionOps for Flex {
    fn attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        first: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        Self::attend_saving(q, k, v, first).0
    }
}

impl AttentionGrad for Flex {
    fn attend_saving(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        first: IntTensor<Self>,
    ) -> (FloatTensor<Self>, Saved<Self>) {
        let ([batch, length, heads, _], [_, _, _, value]) = (dims(&q), dims(&v));
        let (q, k, v) = (contiguous(q), contiguous(k), contiguous(v));
        let visible = Visible::new(&first, length);
        let mut out = vec![0f32; batch * heads * length * value];
        let mut normalisers = vec![0f32; batch * heads * length];
        {
            let [q, k, v] = [&q, &k, &v].map(Heads::of);
            let tasks = out
                .par_chunks_exact_mut(length * value)
                .zip(normalisers.par_chunks_exact_mut(length));
            tasks.enumerate().for_each(|(head, (out, normalisers))| {
                let mut scores = vec![0f32; BLOCK * length];
                for block in blocks(length) {
                    let keys = block.end;
                    let scores = &mut scores[..block.len() * keys];
                    multiply(
                        q.rows(head, block.clone()),
                        k.rows(head, 0..keys).transposed(),
                        scores,
                        Into::Replace,
                    );
                    for (row, query) in scores.chunks_exact_mut(keys).zip(block.clone()) {
                        let seen = visible.of(head / heads, query);
                        normalisers[query] = vectorized(|| log_sum_exp(&row[seen.clone()]));
                        vectorized(|| probabilities(row, seen, normalisers[query]));
                    }
                    let out = &mut out[block.start * value..block.end * value];
                    let scores = Matrix::of(scores, block.len(), keys);
                    multiply(scores, v.rows(head, 0..keys), out, Into::Replace);
                }
            });
        }
        let normalisers = float_tensor(normalisers, [batch * heads, length]);
        (
            by_position(out, [batch, heads, length, value]),
            Saved {
                q,
                k,
                v,
                first,
                normalisers,
            },
        )
    }

    /// With P the probabilities and dP = dO V^T: dS = P (dP - sum(P dP)), dQ = dS K, dK = dS^T Q, dV = P^T dO.
    fn attend_grad(grad: FloatTensor<Self>, saved: Saved<Self>) -> [FloatTensor<Self>; 3] {
        let Saved {
            q,
            k,
            v,
            first,
            normalisers,
        } = saved;
        let ([batch, length, heads, key], [_, _, _, value]) = (dims(&q), dims(&v));
        let grad = contiguous(grad);
        let visible = Visible::new(&first, length);
        let size = batch * heads * length;
        let mut grad_q = vec![0f32; size * key];
        let mut grad_k = vec![0f32; size * key];
        let mut grad_v = vec![0f32; size * value];
        {
            let [q, k, v, grad] = [&q, &k, &v, &grad].map(Heads::of);
            let normalisers = elements::<f32>(&normalisers);
            let tasks = grad_q
                .par_chunks_exact_mut(length * key)
                .zip(grad_k.par_chunks_exact_mut(length * key))
                .zip(grad_v.par_chunks_exact_mut(length * value));
            tasks
                .enumerate()
                .for_each(|(head, ((grad_q, grad_k), grad_v))| {
                    let normalisers = &normalisers[head * length..];
                    let mut p = vec![0f32; BLOCK * length];
                    let mut ds = vec![0f32; BLOCK * length];
                    for block in blocks(length) {
                        let (rows, keys) = (block.len(), block.end);
                        let (p, ds) = (&mut p[..rows * keys], &mut ds[..rows * keys]);
                        let (q, k) = (q.rows(head, block.clone()), k.rows(head, 0..keys));
                        let (v, grad) = (v.rows(head, 0..keys), grad.rows(head, block.clone()));
                        multiply(q, k.transposed(), p, Into::Replace);
                        multiply(grad, v.transposed(), ds, Into::Replace);
                        let both = p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys));
                        for ((p, ds), query) in both.zip(block.clone()) {
                            let seen = visible.of(head / heads, query);
                            vectorized(|| {
                                probabilities(p, seen, normalisers[query]);
                                let mean = dot(p, ds);
                                for (ds, &p) in ds.iter_mut().zip(&*p) {
                                    *ds = p * (*ds - mean);
                                }
                            });
                        }
                        let (p, ds) = (Matrix::of(p, rows, keys), Matrix::of(ds, rows, keys));
                        multiply(p.transposed(), grad, &mut grad_v[..keys * value], Into::Add);
                        multiply(ds.transposed(), q, &mut grad_k[..keys * key], Into::Add);
                        let grad_q = &mut grad_q[block.start * key..block.end * key];
                        multiply(ds, k, grad_q, Into::Replace);
                    }
                });
        }
        [
            by_position(grad_q, [batch, heads, length, key]),
            by_position(grad_k, [batch, heads, length, key]),
            by_position(grad_v, [batch, heads, length, value]),
        ]
    }
}

/// The heads of a contiguous `[B, T, H, D]` tensor.
#[derive(Clone, Copy)]
struct Heads<'a> {
    elements: &'a [f32],
    length: usize,
    heads: usize,
    width: usize,
}

impl<'a> Heads<'a> {
    fn of(tensor: &'a FlexFloat) -> Self {
        let [_, length, heads, width] = dims(tensor);
        Self {
            elements: elements(tensor),
            length,
            heads,
            width,
        }
    }

    /// Positions `rows` of a head, counted over batch and heads.
    fn rows(&self, head: usize, rows: std::ops::Range<usize>) -> Matrix<'a, f32> {
        let stride = self.heads * self.width;
        let (sequence, head) = (head / self.heads, head % self.heads);
        let start = (sequence * self.length + rows.start) * stride + head * self.width;
        Matrix::strided(&self.elements[start..], rows.len(), self.width, stride)
    }
}

/// The keys that each query sees.
struct Visible {
    first: Vec<usize>,
    sequences: usize,
    length: usize,
}

impl Visible {
    fn new(first: &IntTensor<Flex>, length: usize) -> Self {
        let first = indices(first);
        Self {
            sequences: first.len() / length,
            first,
            length,
        }
    }

    fn of(&self, sequence: usize, query: usize) -> std::ops::Range<usize> {
        self.first[sequence % self.sequences * self.length + query]..query + 1
    }
}

fn blocks(length: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..length)
        .step_by(BLOCK)
        .map(move |start| start..(start + BLOCK).min(length))
}

/// A tensor of `[B, H, T, D]` elements seen as `[B, T, H, D]`.
fn by_position(elements: Vec<f32>, shape: [usize; 4]) -> FlexFloat {
    float_tensor(elements, shape).permute(&[0, 2, 1, 3])
}

/// Turns a row of scores into probabilities, zero where the query does not see.
#[inline(always)]
fn probabilities(row: &mut [f32], seen: std::ops::Range<usize>, normaliser: f32) {
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
    for score in &mut row[seen] {
        *score = exp(*score - normaliser);
    }
}
