//! Causal attention on the CPU: heads side by side on the threads, each in blocks of queries.

use std::ops::Range;

use burn::backend::{
    Flex,
    tensor::{FloatTensor, IntTensor},
};
use rayon::prelude::*;

use super::{AttentionGrad, AttentionOps, Inputs, Sizes};
use crate::{
    flex::{FlexFloat, contiguous, dims, elements, float_tensor, indices},
    gemm::{Into, Matrix, multiply},
    parts::{by_parts, pieces},
    vector::{dot, exp, max, sum, vectorized},
};

/// Queries per block: its scores against a few hundred keys stay in the second-level cache.
const BLOCK: usize = 32;
/// Positions per task where heads are put together.
const ROWS: usize = 64;

impl AttentionOps for Flex {
    fn attend(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        first: IntTensor<Self>,
        sizes: Sizes,
    ) -> FloatTensor<Self> {
        let inputs = Inputs {
            q,
            kv,
            k_pe,
            cos,
            sin,
            first,
            sizes,
        };
        Self::attend_saving(&inputs).0
    }
}

impl AttentionGrad for Flex {
    fn attend_saving(inputs: &Inputs<Self>) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let tensors = Contiguous::of(inputs);
        let all = Heads::of(&tensors, inputs);
        let (length, value) = (all.length, all.sizes.value);
        let count = all.batch * all.sizes.heads;
        let of_head = |head: usize| {
            let mut out = vec![0f32; length * value];
            let mut normalisers = vec![0f32; length];
            let (q, k) = (all.queries(head), all.keys(head));
            let q = all.matrix(&q);
            let k_transposed = all.matrix(&k).transposed().row_major();
            let k_transposed = Matrix::of(&k_transposed, all.key(), length);
            let mut scores = vec![0f32; BLOCK.min(length) * length];
            for block in pieces(length, BLOCK) {
                let keys = block.end;
                let scores = &mut scores[..block.len() * keys];
                let q = q.rows(block.clone());
                multiply(q, k_transposed.columns(0..keys), scores, Into::Replace);
                let mut totals = [0f32; BLOCK];
                let rows = scores.chunks_exact_mut(keys).zip(block.clone());
                for ((row, query), total) in rows.zip(&mut totals) {
                    let seen = all.visible(head, query);
                    let highest = vectorized!({
                        let highest = max(&row[seen.clone()]);
                        probabilities(row, seen.clone(), highest);
                        *total = sum(&row[seen.clone()], |weight| weight);
                        highest
                    });
                    normalisers[query] = highest + total.ln();
                }
                let out = &mut out[block.start * value..block.end * value];
                let scores = Matrix::of(scores, block.len(), keys);
                multiply(scores, all.values(head, 0..keys), out, Into::Replace);
                for (row, total) in out.chunks_exact_mut(value).zip(totals) {
                    row.iter_mut().for_each(|x| *x /= total);
                }
            }
            (out, normalisers)
        };
        let (out, normalisers): (Vec<_>, Vec<_>) = (0..count).into_par_iter().map(of_head).unzip();
        let out = all.side_by_side(&out, value);
        let shape = [all.batch, length, all.sizes.heads * value];
        let normalisers = float_tensor(normalisers.concat(), [count, length]);
        (float_tensor(out, shape), normalisers)
    }

    /// With P the probabilities and dP = dO V^T: dS = P (dP - sum(P dP)), dQ = dS K, dK = dS^T Q, dV = P^T dO.
    fn attend_grad(
        grad: FloatTensor<Self>,
        inputs: &Inputs<Self>,
        normalisers: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3] {
        let tensors = Contiguous::of(inputs);
        let all = Heads::of(&tensors, inputs);
        let grad = contiguous(grad);
        let (grad, normalisers) = (elements::<f32>(&grad), elements::<f32>(&normalisers));
        let Sizes {
            heads,
            nope,
            value,
            scale,
        } = all.sizes;
        let (batch, length, rope, key) = (all.batch, all.length, all.rope, all.key());
        let of_head = |head: usize| {
            let mut grad_q = vec![0f32; length * key];
            let mut grad_kv = vec![0f32; length * (nope + value)];
            let mut grad_k_pe = vec![0f32; length * rope];
            let (q, k) = (all.queries(head), all.keys(head));
            let (q, k) = (all.matrix(&q), all.matrix(&k));
            let k_transposed = k.transposed().row_major();
            let k_transposed = Matrix::of(&k_transposed, key, length);
            let v_transposed = all.values(head, 0..length).transposed().row_major();
            let v_transposed = Matrix::of(&v_transposed, value, length);
            let normalisers = &normalisers[head * length..];
            let mut grad_k = vec![0f32; length * key];
            let mut grad_v = vec![0f32; length * value];
            let mut p = vec![0f32; BLOCK.min(length) * length];
            let mut ds = p.clone();
            for block in pieces(length, BLOCK) {
                let (rows, keys) = (block.len(), block.end);
                let (p, ds) = (&mut p[..rows * keys], &mut ds[..rows * keys]);
                let (q, k) = (q.rows(block.clone()), k.rows(0..keys));
                let grad = all.of_head(grad, head, block.clone(), value, 0..value);
                multiply(q, k_transposed.columns(0..keys), p, Into::Replace);
                multiply(grad, v_transposed.columns(0..keys), ds, Into::Replace);
                let both = p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys));
                for ((p, ds), query) in both.zip(block.clone()) {
                    let seen = all.visible(head, query);
                    vectorized!({
                        probabilities(p, seen.clone(), normalisers[query]);
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
            vectorized!(
                for (position, row) in grad_q.chunks_exact_mut(key).enumerate() {
                    all.turn_back(position, &mut row[nope..]);
                    row.iter_mut().for_each(|x| *x *= scale as f32);
                }
            );
            for (position, out) in grad_kv.chunks_exact_mut(nope + value).enumerate() {
                out[..nope].copy_from_slice(&grad_k[position * key..][..nope]);
                out[nope..].copy_from_slice(&grad_v[position * value..][..value]);
            }
            for (position, out) in grad_k_pe.chunks_exact_mut(rope).enumerate() {
                out.copy_from_slice(&grad_k[position * key + nope..][..rope]);
            }
            [grad_q, grad_kv, grad_k_pe]
        };
        let grads: Vec<_> = (0..batch * heads).into_par_iter().map(of_head).collect();
        let [grad_q, grad_kv, grad_k_pe] = [0, 1, 2].map(|which| {
            grads
                .iter()
                .map(|grads| &grads[which][..])
                .collect::<Vec<_>>()
        });
        let grad_q = all.side_by_side(&grad_q, key);
        let grad_kv = all.side_by_side(&grad_kv, nope + value);
        let grad_k_pe = all.turned_back_sum(&grad_k_pe);
        [
            float_tensor(grad_q, [batch, length, heads * key]),
            float_tensor(grad_kv, [batch, length, heads * (nope + value)]),
            float_tensor(grad_k_pe, [batch, length, rope]),
        ]
    }
}

/// The inputs with their elements next to each other.
struct Contiguous([FlexFloat; 5]);

impl Contiguous {
    fn of(inputs: &Inputs<Flex>) -> Self {
        let tensors = [
            &inputs.q,
            &inputs.kv,
            &inputs.k_pe,
            &inputs.cos,
            &inputs.sin,
        ];
        Self(tensors.map(|tensor| contiguous(tensor.clone())))
    }
}

/// The heads of all sequences, counted over both.
struct Heads<'a> {
    q: &'a [f32],
    kv: &'a [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    /// The shared part of the keys, rotated. `[B, T, R]`
    k_pe: Vec<f32>,
    first: Vec<usize>,
    batch: usize,
    length: usize,
    rope: usize,
    sizes: Sizes,
}

impl<'a> Heads<'a> {
    fn of(Contiguous(tensors): &'a Contiguous, inputs: &Inputs<Flex>) -> Self {
        let [batch, length, rope] = dims(&tensors[2]);
        let [q, kv, k_pe, cos, sin] = tensors.each_ref().map(elements::<f32>);
        let mut heads = Self {
            q,
            kv,
            cos,
            sin,
            k_pe: Vec::new(),
            first: indices(&inputs.first),
            batch,
            length,
            rope,
            sizes: inputs.sizes,
        };
        let turned = |part: usize, out: &mut [f32]| {
            out.copy_from_slice(&k_pe[part * ROWS * rope..][..out.len()]);
            for (row, out) in out.chunks_exact_mut(rope).enumerate() {
                heads.turn((part * ROWS + row) % length, out);
            }
        };
        heads.k_pe = by_parts(k_pe.len(), ROWS * rope, turned).0;
        heads
    }

    /// Numbers of a query or key, N + R.
    fn key(&self) -> usize {
        self.sizes.nope + self.rope
    }

    /// A head's rows of [`queries`](Self::queries) or [`keys`](Self::keys).
    fn matrix<'b>(&self, rows: &'b [f32]) -> Matrix<'b, f32> {
        Matrix::of(rows, self.length, self.key())
    }

    /// The scaled and rotated queries of a head. `[T, N + R]`
    fn queries(&self, head: usize) -> Vec<f32> {
        let (key, scale) = (self.key(), self.sizes.scale as f32);
        let mut out = vec![0f32; self.length * key];
        vectorized!(
            for (position, row) in out.chunks_exact_mut(key).enumerate() {
                let start = self.row(head, position) * key;
                for (out, &q) in row.iter_mut().zip(&self.q[start..start + key]) {
                    *out = q * scale;
                }
                self.turn(position, &mut row[self.sizes.nope..]);
            }
        );
        out
    }

    /// The keys of a head, rotated. `[T, N + R]`
    fn keys(&self, head: usize) -> Vec<f32> {
        let (key, nope, rope) = (self.key(), self.sizes.nope, self.rope);
        let width = nope + self.sizes.value;
        let sequence = head / self.sizes.heads;
        let mut out = vec![0f32; self.length * key];
        for (position, row) in out.chunks_exact_mut(key).enumerate() {
            let start = self.row(head, position) * width;
            row[..nope].copy_from_slice(&self.kv[start..start + nope]);
            let start = (sequence * self.length + position) * rope;
            row[nope..].copy_from_slice(&self.k_pe[start..start + rope]);
        }
        out
    }

    /// Values of some positions of a head.
    fn values(&self, head: usize, rows: Range<usize>) -> Matrix<'a, f32> {
        let nope = self.sizes.nope;
        let width = nope + self.sizes.value;
        self.of_head(self.kv, head, rows, width, nope..width)
    }

    /// Some columns of some positions of a head in `[B, T, H width]`.
    fn of_head<'b>(
        &self,
        elements: &'b [f32],
        head: usize,
        rows: Range<usize>,
        width: usize,
        columns: Range<usize>,
    ) -> Matrix<'b, f32> {
        let start = self.row(head, rows.start) * width + columns.start;
        let stride = self.sizes.heads * width;
        Matrix::strided(&elements[start..], rows.len(), columns.len(), stride)
    }

    /// Where a position of a head is, counted in heads of positions of sequences.
    #[inline(always)]
    fn row(&self, head: usize, position: usize) -> usize {
        let (sequence, head) = (head / self.sizes.heads, head % self.sizes.heads);
        (sequence * self.length + position) * self.sizes.heads + head
    }

    /// The keys that a query sees.
    fn visible(&self, head: usize, query: usize) -> Range<usize> {
        let sequence = head / self.sizes.heads % (self.first.len() / self.length);
        self.first[sequence * self.length + query]..query + 1
    }

    /// Rotates neighbouring pairs by the angles of a position.
    #[inline(always)]
    fn turn(&self, position: usize, row: &mut [f32]) {
        let start = position * (self.rope / 2);
        let angles = self.cos[start..].iter().zip(&self.sin[start..]);
        for (pair, (cos, sin)) in row.chunks_exact_mut(2).zip(angles) {
            let [real, imaginary] = [pair[0], pair[1]];
            pair[0] = real * cos - imaginary * sin;
            pair[1] = real * sin + imaginary * cos;
        }
    }

    /// The gradient of [`turn`](Self::turn), its transpose.
    #[inline(always)]
    fn turn_back(&self, position: usize, row: &mut [f32]) {
        let start = position * (self.rope / 2);
        let angles = self.cos[start..].iter().zip(&self.sin[start..]);
        for (pair, (cos, sin)) in row.chunks_exact_mut(2).zip(angles) {
            let [real, imaginary] = [pair[0], pair[1]];
            pair[0] = real * cos + imaginary * sin;
            pair[1] = imaginary * cos - real * sin;
        }
    }

    /// Heads of `[T, width]` as `[B, T, H width]`.
    fn side_by_side<E: AsRef<[f32]> + Sync>(&self, by_head: &[E], width: usize) -> Vec<f32> {
        let heads = self.sizes.heads;
        let size = ROWS * heads * width;
        let fill = |part: usize, out: &mut [f32]| {
            for (row, out) in out.chunks_exact_mut(heads * width).enumerate() {
                let (sequence, position) = self.position(part * ROWS + row);
                let by_head = &by_head[sequence * heads..];
                for (out, of_head) in out.chunks_exact_mut(width).zip(by_head) {
                    out.copy_from_slice(&of_head.as_ref()[position * width..][..width]);
                }
            }
        };
        by_parts(self.batch * self.length * heads * width, size, fill).0
    }

    /// Gradients of rotated keys, of each head `[T, R]`, summed over the heads and rotated back. `[B, T, R]`
    fn turned_back_sum(&self, by_head: &[&[f32]]) -> Vec<f32> {
        let (heads, rope) = (self.sizes.heads, self.rope);
        let fill = |part: usize, out: &mut [f32]| {
            for (row, out) in out.chunks_exact_mut(rope).enumerate() {
                let (sequence, position) = self.position(part * ROWS + row);
                for of_head in &by_head[sequence * heads..][..heads] {
                    let part = &of_head[position * rope..][..rope];
                    out.iter_mut().zip(part).for_each(|(out, x)| *out += x);
                }
                self.turn_back(position, out);
            }
        };
        by_parts(self.batch * self.length * rope, ROWS * rope, fill).0
    }

    /// The sequence and the position in it of a row of `[B, T]`.
    fn position(&self, row: usize) -> (usize, usize) {
        (row / self.length, row % self.length)
    }
}

/// Turns a row of scores into probabilities, zero where the query does not see.
#[inline(always)]
fn probabilities(row: &mut [f32], seen: Range<usize>, normaliser: f32) {
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
    for score in &mut row[seen] {
        *score = exp(*score - normaliser);
    }
}
