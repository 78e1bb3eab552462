//! A few rows times a matrix of weights in a compact format, which are widened on the way.
//!
//! Weights in single precision are left to the gemm crate, which is faster by half for one row.

use crate::{gemm::Matrix, vector::vectorized};

/// Rows of `width` weights.
#[derive(Clone, Copy)]
pub(crate) struct Weights<'a, S> {
    pub(crate) elements: &'a [S],
    pub(crate) width: usize,
}

/// Adds `x W` to `out`, row-major, on the calling thread. The order of a row's sums does not depend on the other rows.
///
/// # Panics
/// If sizes do not fit, or the elements of a row of `x` are not neighbours.
pub(crate) fn add_few_rows<S: Copy>(
    x: Matrix<'_, f32>,
    weights: Weights<'_, S>,
    widen: impl Fn(S) -> f32 + Copy,
    out: &mut [f32],
) {
    let mut out = out.chunks_exact_mut(weights.width);
    let mut first = 0;
    for rows in [8, 4, 2, 1] {
        while out.len() >= rows {
            match rows {
                8 => add::<8, S>(x, first, weights, widen, &mut out),
                4 => add::<4, S>(x, first, weights, widen, &mut out),
                2 => add::<2, S>(x, first, weights, widen, &mut out),
                _ => add::<1, S>(x, first, weights, widen, &mut out),
            }
            first += rows;
        }
    }
}

/// The next `R` rows, which share the widened weights.
fn add<'a, const R: usize, S: Copy>(
    x: Matrix<'_, f32>,
    first: usize,
    weights: Weights<'_, S>,
    widen: impl Fn(S) -> f32 + Copy,
    out: &mut impl Iterator<Item = &'a mut [f32]>,
) {
    let x: [&[f32]; R] = std::array::from_fn(|row| x.row(first + row));
    let mut out: [&mut [f32]; R] =
        std::array::from_fn(|_| out.next().expect("as many as are left"));
    let inner = x[0].len();
    let row = |k: usize| &weights.elements[k * weights.width..][..weights.width];
    vectorized!({
        let whole = inner / 4 * 4;
        for k in (0..whole).step_by(4) {
            let x = x.map(|x| [x[k], x[k + 1], x[k + 2], x[k + 3]]);
            let four = [row(k), row(k + 1), row(k + 2), row(k + 3)];
            add_four(&x, four, widen, &mut out);
        }
        for k in whole..inner {
            for (x, out) in x.iter().zip(&mut out) {
                for (out, &w) in out.iter_mut().zip(row(k)) {
                    *out += x[k] * widen(w);
                }
            }
        }
    });
}

/// Four rows of weights, each with its own factor for every row of the result.
#[inline(always)]
fn add_four<const R: usize, S: Copy>(
    x: &[[f32; 4]; R],
    [a, b, c, d]: [&[S]; 4],
    widen: impl Fn(S) -> f32,
    out: &mut [&mut [f32]; R],
) {
    let width = a.len();
    let (b, c, d) = (&b[..width], &c[..width], &d[..width]);
    let out = out.each_mut().map(|out| &mut out[..width]);
    for column in 0..width {
        let [a, b, c, d] = [a[column], b[column], c[column], d[column]].map(&widen);
        for row in 0..R {
            let x = x[row];
            let mut upper = x[0] * a;
            upper += x[1] * b;
            let mut lower = x[2] * c;
            lower += x[3] * d;
            upper += lower;
            out[row][column] += upper;
        }
    }
}
