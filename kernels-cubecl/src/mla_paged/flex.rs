//! Attention over pages on the CPU: groups of heads side by side on the threads, each page read where it is.

use std::ops::Range;

use burn::{backend::Flex, tensor::Tensor};
use rayon::prelude::*;

use super::{Layout, Sizes, Span};
use crate::{
    flex::{FlexFloat, contiguous, elements, float_tensor},
    gemm::{Into, Matrix, multiply},
    vector::{self, exp, max, vectorized},
};

/// Rows (queries of heads) that a task computes: enough for products of matrices, few enough that their scores stay in
/// cache.
const ROWS: usize = 64;

/// See [`super::mla_paged`].
pub(super) fn mla_paged(
    [q_nope, q_pe]: [Tensor<3>; 2],
    kv_b: Tensor<2>,
    cache: Tensor<2>,
    (layout, sizes): (&Layout, Sizes),
) -> Tensor<3> {
    let [q_nope, q_pe] = [q_nope, q_pe].map(primitive);
    let [kv_b, cache] = [kv_b, cache].map(primitive);
    let all = Inputs {
        q_nope: elements(&q_nope),
        q_pe: elements(&q_pe),
        kv_b: elements(&kv_b),
        cache: elements(&cache),
        page: layout.page,
        sizes,
    };
    let parts: Vec<Part<'_>> = parts(layout, sizes.heads).collect();
    let results: Vec<Vec<f32>> = parts.par_iter().map(|part| all.attend(part)).collect();

    let Sizes { heads, value, .. } = sizes;
    let mut out = vec![0f32; layout.rows() * heads * value];
    for (part, result) in parts.iter().zip(&results) {
        let mut rows = result.chunks_exact(value);
        for head in part.heads.clone() {
            for query in part.queries.clone() {
                let at = ((part.first_row + query) * heads + head) * value;
                let row = rows.next().expect("a row per head and query");
                out[at..at + value].copy_from_slice(row);
            }
        }
    }
    Tensor::from_primitive::<Flex>(float_tensor(out, [layout.rows(), heads, value]))
}

fn primitive<const D: usize>(tensor: Tensor<D>) -> FlexFloat {
    let tensor = tensor.try_into_primitive::<Flex>();
    contiguous(tensor.expect("a Flex tensor, as its device was asked"))
}

/// What a task computes: some queries of some heads of a sequence.
struct Part<'a> {
    span: &'a Span,
    /// The row of the sequence's first query.
    first_row: usize,
    heads: Range<usize>,
    queries: Range<usize>,
}

fn parts(layout: &Layout, heads: usize) -> impl Iterator<Item = Part<'_>> {
    let share = heads.div_ceil(rayon::current_num_threads());
    let mut first_row = 0;
    layout.spans.iter().flat_map(move |span| {
        let start = first_row;
        first_row += span.length;
        let several = (ROWS / span.length).clamp(1, share);
        pieces(heads, several).flat_map(move |heads| {
            pieces(span.length, ROWS).map(move |queries| Part {
                span,
                first_row: start,
                heads: heads.clone(),
                queries,
            })
        })
    })
}

fn pieces(length: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let starts = (0..length).step_by(size);
    starts.map(move |start| start..length.min(start + size))
}

struct Inputs<'a> {
    q_nope: &'a [f32],
    q_pe: &'a [f32],
    kv_b: &'a [f32],
    cache: &'a [f32],
    page: usize,
    sizes: Sizes,
}

impl Inputs<'_> {
    /// The result of a part, head by head. `[heads, queries, V]`
    fn attend(&self, part: &Part<'_>) -> Vec<f32> {
        let Sizes {
            nope,
            rope,
            latent,
            value,
            ..
        } = self.sizes;
        let (queries, rows) = (part.queries.len(), part.heads.len() * part.queries.len());
        let mut q_latent = vec![0f32; rows * latent];
        let mut q_pe = vec![0f32; rows * rope];
        let of_heads = q_latent.chunks_exact_mut(queries * latent);
        for (head, out) in part.heads.clone().zip(of_heads) {
            let q = self.queries(self.q_nope, part, head, nope);
            let w_uk = self.up(head, 0..nope);
            multiply(q, w_uk.transposed(), out, Into::Replace);
        }
        let mut of_rows = q_pe.chunks_exact_mut(rope.max(1));
        for head in part.heads.clone() {
            for query in part.queries.clone() {
                if let Some(out) = of_rows.next() {
                    let at = self.at(part, query, head) * rope;
                    out.copy_from_slice(&self.q_pe[at..at + rope]);
                }
            }
        }

        let seen = part.span.start + part.queries.end;
        let pages = seen.div_ceil(self.page);
        let (q, q_pe) = (
            Matrix::of(&q_latent, rows, latent),
            Matrix::of(&q_pe, rows, rope),
        );
        let mut scores = vec![0f32; rows * pages * self.page];
        let by_page = scores.chunks_exact_mut(rows * self.page);
        for (page, scores) in (0..pages).zip(by_page) {
            multiply(
                q,
                self.latents(part, page).transposed(),
                scores,
                Into::Replace,
            );
            if rope > 0 {
                multiply(q_pe, self.keys(part, page).transposed(), scores, Into::Add);
            }
        }
        let sums = self.softmax(&mut scores, part);
        let mut attended = vec![0f32; rows * latent];
        for (page, scores) in scores.chunks_exact(rows * self.page).enumerate() {
            // A slot that was never written may hold anything, and zero times what is not a number is none.
            let valid = self.page.min(seen - page * self.page);
            let weights = Matrix::strided(scores, rows, valid, self.page);
            let latents = self.latents(part, page).rows(0..valid);
            multiply(weights, latents, &mut attended, Into::Add);
        }
        for (row, sum) in attended.chunks_exact_mut(latent).zip(sums) {
            row.iter_mut().for_each(|x| *x /= sum);
        }

        let mut out = vec![0f32; rows * value];
        let of_heads = attended.chunks_exact(queries * latent);
        let results = out.chunks_exact_mut(queries * value);
        for ((head, attended), out) in part.heads.clone().zip(of_heads).zip(results) {
            let attended = Matrix::of(attended, queries, latent);
            multiply(
                attended,
                self.up(head, nope..nope + value),
                out,
                Into::Replace,
            );
        }
        out
    }

    /// Scores to weights relative to the row's highest; the sums of weights. What a query does not see has none.
    fn softmax(&self, scores: &mut [f32], part: &Part<'_>) -> Vec<f32> {
        let queries = part.queries.len();
        let rows = part.heads.len() * queries;
        let sum_of_row = |row: usize| {
            let seen = part.span.start + part.queries.start + row % queries + 1;
            let chunk = |page: usize| {
                let start = (page * rows + row) * self.page;
                let visible = self.page.min(seen.saturating_sub(page * self.page));
                (start..start + visible, start + visible..start + self.page)
            };
            let pages = scores.len() / (rows * self.page);
            let highest = (0..pages)
                .map(|page| vectorized(|| max(&scores[chunk(page).0])))
                .fold(f32::NEG_INFINITY, f32::max);
            let mut total = 0.0;
            for (visible, hidden) in (0..pages).map(chunk) {
                total += vectorized(|| {
                    let visible = &mut scores[visible];
                    for score in &mut *visible {
                        *score = exp(*score - highest);
                    }
                    vector::sum(visible, |weight| weight)
                });
                scores[hidden].fill(0.0);
            }
            total
        };
        (0..rows).map(sum_of_row).collect()
    }

    fn at(&self, part: &Part<'_>, query: usize, head: usize) -> usize {
        (part.first_row + query) * self.sizes.heads + head
    }

    /// The part's queries of one head. `[queries, width]`
    fn queries<'a>(
        &self,
        all: &'a [f32],
        part: &Part<'_>,
        head: usize,
        width: usize,
    ) -> Matrix<'a, f32> {
        let from = self.at(part, part.queries.start, head) * width;
        let stride = self.sizes.heads * width;
        Matrix::strided(&all[from..], part.queries.len(), width, stride)
    }

    /// Columns of a head of `kv_b`. `[C, columns]`
    fn up(&self, head: usize, columns: Range<usize>) -> Matrix<'_, f32> {
        let width = self.sizes.nope + self.sizes.value;
        let from = head * width + columns.start;
        let stride = self.sizes.heads * width;
        Matrix::strided(&self.kv_b[from..], self.sizes.latent, columns.len(), stride)
    }

    /// The latents of a page. `[page, C]`
    fn latents(&self, part: &Part<'_>, page: usize) -> Matrix<'_, f32> {
        self.columns(part, page, 0, self.sizes.latent)
    }

    /// The shared keys of a page. `[page, R]`
    fn keys(&self, part: &Part<'_>, page: usize) -> Matrix<'_, f32> {
        self.columns(part, page, self.sizes.latent, self.sizes.rope)
    }

    fn columns(&self, part: &Part<'_>, page: usize, from: usize, count: usize) -> Matrix<'_, f32> {
        let width = self.sizes.latent + self.sizes.rope;
        let slot = part.span.pages[page] as usize * self.page;
        Matrix::strided(&self.cache[slot * width + from..], self.page, count, width)
    }
}
