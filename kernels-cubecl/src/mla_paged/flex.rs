//! Attention over pages on the CPU: parts of the rows and of the positions side by side on the threads, each page read
//! where it is.
//!
//! Scores are kept position by position, `[positions, lanes]`, where lanes are the rows and what fills a vector: so no product
//! needs a copy of its factors, transposed or with gaps filled.

use std::{array::from_fn, ops::Range};

use burn::{backend::Flex, tensor::Tensor};
use rayon::prelude::*;

use super::{Layout, Sizes, Span};
use crate::{
    flex::{FlexFloat, contiguous, elements, float_tensor},
    gemm::{Into, Matrix, WORTH, multiply},
    parts::pieces,
    vector::{LANES, exp, multiplies_and_adds, vectorized},
};

/// Rows (queries of heads) that are computed together: they share what is read of the cache, and their scores stay in
/// cache.
const ROWS: usize = 64;
/// Positions whose attention a task computes, in whole pages. Results of such pieces are put together in order.
const PIECE: usize = 256;

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
    let threads = rayon::current_num_threads();
    let mut first_row = 0;
    layout.spans.iter().flat_map(move |span| {
        let start = first_row;
        first_row += span.length;
        // A few positions give the threads no pieces to share; then they share the heads.
        let share = match span.end().div_ceil(PIECE) < threads {
            true => heads.div_ceil(threads),
            false => heads,
        };
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

impl Part<'_> {
    fn rows(&self) -> usize {
        self.heads.len() * self.queries.len()
    }

    fn lanes(&self) -> usize {
        self.rows().next_multiple_of(LANES)
    }

    /// The positions that a row sees.
    fn seen(&self, row: usize) -> usize {
        self.span.start + self.queries.start + row % self.queries.len() + 1
    }

    /// The positions that the last row sees.
    fn end(&self) -> usize {
        self.span.start + self.queries.end
    }
}

struct Inputs<'a> {
    q_nope: &'a [f32],
    q_pe: &'a [f32],
    kv_b: &'a [f32],
    cache: &'a [f32],
    page: usize,
    sizes: Sizes,
}

/// Attention of some rows to some positions.
struct Attended {
    /// The rows' highest scores.
    highest: Vec<f32>,
    /// Sums of weights relative to these.
    sums: Vec<f32>,
    /// Sums of weighted latents. `[rows, C]`
    latents: Vec<f32>,
}

impl Attended {
    /// Both over one set of positions.
    fn with(mut self, other: Self) -> Self {
        let width = self.latents.len() / self.sums.len();
        let of_rows = self.latents.chunks_exact_mut(width);
        let others = other.latents.chunks_exact(width);
        for (row, (latents, others)) in of_rows.zip(others).enumerate() {
            let highest = self.highest[row].max(other.highest[row]);
            let [own, its] = [self.highest[row], other.highest[row]].map(|of| exp(of - highest));
            self.highest[row] = highest;
            self.sums[row] = own * self.sums[row] + its * other.sums[row];
            for (own_latent, its_latent) in latents.iter_mut().zip(others) {
                *own_latent = own * *own_latent + its * its_latent;
            }
        }
        self
    }
}

impl Inputs<'_> {
    /// The result of a part, head by head. `[heads, queries, V]`
    fn attend(&self, part: &Part<'_>) -> Vec<f32> {
        let Sizes {
            nope,
            latent,
            value,
            ..
        } = self.sizes;
        let q = self.absorbed(part);
        let pages_of_piece = (PIECE / self.page).max(1);
        let pages: Vec<_> = pieces(part.end().div_ceil(self.page), pages_of_piece).collect();
        let pieces: Vec<_> = pages
            .into_par_iter()
            .map(|pages| self.attend_to(part, &q, pages))
            .collect();
        let attended = pieces.into_iter().reduce(Attended::with);
        let Attended {
            mut latents, sums, ..
        } = attended.expect("a row sees itself");
        for (row, sum) in latents.chunks_exact_mut(latent).zip(sums) {
            row.iter_mut().for_each(|x| *x /= sum);
        }

        let queries = part.queries.len();
        let mut out = vec![0f32; part.rows() * value];
        out.par_chunks_exact_mut(queries * value)
            .zip(latents.par_chunks_exact(queries * latent))
            .zip(part.heads.clone())
            .with_min_len(WORTH / (queries * latent * value + 1))
            .for_each(|((out, latents), head)| {
                let latents = Matrix::of(latents, queries, latent);
                let w_uv = self.up(head, nope..nope + value);
                multiply(latents, w_uv, out, Into::Replace);
            });
        out
    }

    /// What the part's rows are multiplied with, the cached entries of positions: `q W_UK` and `q_pe`. `[C + R, lanes]`
    fn absorbed(&self, part: &Part<'_>) -> Vec<f32> {
        let Sizes {
            nope, rope, latent, ..
        } = self.sizes;
        let (queries, rows) = (part.queries.len(), part.rows());
        let mut q_latent = vec![0f32; rows * latent];
        q_latent
            .par_chunks_exact_mut(queries * latent)
            .zip(part.heads.clone())
            .with_min_len(WORTH / (queries * latent * nope + 1))
            .for_each(|(out, head)| {
                let q = self.queries(self.q_nope, part, head, nope);
                let w_uk = self.up(head, 0..nope).transposed();
                multiply(q, w_uk, out, Into::Replace);
            });
        let lanes = part.lanes();
        let mut q = vec![0f32; (latent + rope) * lanes];
        for row in 0..rows {
            let (head, query) = (row / queries, row % queries);
            let at = self.at(part, part.queries.start + query, part.heads.start + head) * rope;
            let q_pe = &self.q_pe[at..at + rope];
            let of_row = q_latent[row * latent..][..latent].iter().chain(q_pe);
            for (out, x) in q[row..].iter_mut().step_by(lanes).zip(of_row) {
                *out = *x;
            }
        }
        q
    }

    /// Attention of the part's rows to some of the pages.
    fn attend_to(&self, part: &Part<'_>, q: &[f32], pages: Range<usize>) -> Attended {
        let Sizes { rope, latent, .. } = self.sizes;
        let (rows, lanes) = (part.rows(), part.lanes());
        let positions = pages.start * self.page..part.end().min(pages.end * self.page);
        let mut scores = vec![0f32; positions.len() * lanes];
        let by_page = scores.chunks_mut(self.page * lanes);
        for (page, scores) in pages.clone().zip(by_page) {
            let entries = self.entries(part, page, scores.len() / lanes, latent + rope);
            if lanes == LANES && multiplies_and_adds() {
                vectorized!(narrow_product(entries, q, scores));
            } else {
                let q = Matrix::of(q, latent + rope, lanes);
                multiply(entries, q, scores, Into::Replace);
            }
        }
        let [highest, sums] = softmax(&mut scores, positions, part);
        let mut latents = vec![0f32; rows * latent];
        for (page, scores) in pages.zip(scores.chunks(self.page * lanes)) {
            let count = scores.len() / lanes;
            let weights = Matrix::strided(scores, count, rows, lanes).transposed();
            let entries = self.entries(part, page, count, latent);
            multiply(weights, entries, &mut latents, Into::Add);
        }
        Attended {
            highest,
            sums,
            latents,
        }
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

    /// What is cached of the first positions of a page, the first columns of it. A slot that was never written may hold
    /// anything.
    fn entries(
        &self,
        part: &Part<'_>,
        page: usize,
        count: usize,
        columns: usize,
    ) -> Matrix<'_, f32> {
        let width = self.sizes.latent + self.sizes.rope;
        let slot = part.span.pages[page] as usize * self.page;
        Matrix::strided(&self.cache[slot * width..], count, columns, width)
    }
}

/// `a b` where a row of `b` is one vector. Four rows of `a` at a time are one stream from memory: the gemm crate takes six
/// and twice as long.
#[inline(always)]
fn narrow_product(a: Matrix<'_, f32>, b: &[f32], out: &mut [f32]) {
    let ((b, _), (out, _)) = (b.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    let (fours, rest) = out.as_chunks_mut::<4>();
    let first = fours.len() * 4;
    for (part, out) in fours.iter_mut().enumerate() {
        *out = narrow_rows(from_fn(|row| a.row(part * 4 + row)), b);
    }
    for (row, out) in rest.iter_mut().enumerate() {
        [*out] = narrow_rows([a.row(first + row)], b);
    }
}

/// Some rows of [`narrow_product`].
#[inline(always)]
fn narrow_rows<const N: usize>(a: [&[f32]; N], b: &[[f32; LANES]]) -> [[f32; LANES]; N] {
    let a = a.map(|row| &row[..b.len()]);
    let mut sums = [[0f32; LANES]; N];
    for k in 0..b.len() {
        for row in 0..N {
            for lane in 0..LANES {
                sums[row][lane] = a[row][k].mul_add(b[k][lane], sums[row][lane]);
            }
        }
    }
    sums
}

/// Scores of positions, `[positions, lanes]`, to weights relative to the row's highest; these, and the sums of weights.
/// What a row does not see has none.
fn softmax(scores: &mut [f32], positions: Range<usize>, part: &Part<'_>) -> [Vec<f32>; 2] {
    /// Numbers that a loop goes over, at least: whole vectors of several positions.
    const WIDTH: usize = 64;
    let (rows, lanes) = (part.rows(), part.lanes());
    let hidden = part.seen(0).max(positions.start)..positions.end;
    for position in hidden {
        let start = (position - positions.start) * lanes;
        for (row, score) in scores[start..start + rows].iter_mut().enumerate() {
            if position >= part.seen(row) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
    let period = WIDTH.next_multiple_of(lanes);
    let highest = vectorized!(highest(scores, period));
    let mut highest = by_lane(&highest, lanes, f32::NEG_INFINITY, f32::max);
    // Where a row sees none of the positions, any number keeps the weights zero.
    let finite = highest.iter().map(|&of| of.max(f32::MIN));
    let of_lanes: Vec<f32> = finite.cycle().take(period).collect();
    let sums = vectorized!(weigh(scores, &of_lanes));
    let mut sums = by_lane(&sums, lanes, 0.0, |a, b| a + b);
    highest.truncate(rows);
    sums.truncate(rows);
    [highest, sums]
}

/// The highest of the numbers that are `period` apart.
#[inline(always)]
fn highest(scores: &[f32], period: usize) -> Vec<f32> {
    let mut highest = vec![f32::NEG_INFINITY; period];
    for scores in scores.chunks(period) {
        for (highest, &score) in highest.iter_mut().zip(scores) {
            *highest = if score > *highest { score } else { *highest };
        }
    }
    highest
}

/// Scores to weights relative to `highest`, which repeats itself; the sums of those that have the same.
#[inline(always)]
fn weigh(scores: &mut [f32], highest: &[f32]) -> Vec<f32> {
    let mut sums = vec![0f32; highest.len()];
    for scores in scores.chunks_mut(highest.len()) {
        for (score, (sum, highest)) in scores.iter_mut().zip(sums.iter_mut().zip(highest)) {
            *score = exp(*score - highest);
            *sum += *score;
        }
    }
    sums
}

/// Numbers that are `lanes` apart as one.
fn by_lane(values: &[f32], lanes: usize, start: f32, combine: fn(f32, f32) -> f32) -> Vec<f32> {
    let mut of_lanes = vec![start; lanes];
    for values in values.chunks_exact(lanes) {
        for (of_lane, &x) in of_lanes.iter_mut().zip(values) {
            *of_lane = combine(*of_lane, x);
        }
    }
    of_lanes
}
