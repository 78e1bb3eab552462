//! Grouped matrix product on the CPU: segments side by side on the threads, each one product of the gemm crate.

use std::ops::Range;

use burn::backend::{
    Flex,
    tensor::{FloatTensor, IntTensor},
};
use rayon::prelude::*;

use super::{GroupedGemmGrad, GroupedGemmOps};
use crate::flex::{
    FlexInt, Scalar, contiguous, dims, elements, float_tensor, indices, with_scalar,
};

impl GroupedGemmOps for Flex {
    fn segment_matmul(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([rows, _], [_, k, n]) = (dims(&x), dims(&weights));
        let (x, weights, segments) = (contiguous(x), contiguous(weights), segments(&counts));
        with_scalar!(x, T => {
            let weight = |e| Matrix::of(&elements::<T>(&weights)[e * k * n..], k, n);
            float_tensor(by_segment(elements::<T>(&x), (k, n), &segments, weight), [rows, n])
        })
    }
}

impl GroupedGemmGrad for Flex {
    fn segment_matmul_input_grad(
        grad: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([rows, _], [_, k, n]) = (dims(&grad), dims(&weights));
        let (grad, weights, segments) = (contiguous(grad), contiguous(weights), segments(&counts));
        with_scalar!(grad, T => {
            let weight = |e| Matrix::of(&elements::<T>(&weights)[e * k * n..], k, n).transposed();
            float_tensor(by_segment(elements::<T>(&grad), (n, k), &segments, weight), [rows, k])
        })
    }

    fn segment_matmul_weight_grad(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([_, k], [_, n]) = (dims(&x), dims(&grad));
        let (x, grad, segments) = (contiguous(x), contiguous(grad), segments(&counts));
        with_scalar!(x, T => {
            let (x, grad) = (elements::<T>(&x), elements::<T>(&grad));
            let mut out = vec![T::ZERO; segments.len() * k * n];
            out.par_chunks_exact_mut(k * n).zip(&segments).for_each(|(out, rows)| {
                let x = Matrix::of(&x[rows.start * k..], rows.len(), k).transposed();
                multiply(x, Matrix::of(&grad[rows.start * n..], rows.len(), n), out);
            });
            float_tensor(out, [segments.len(), k, n])
        })
    }
}

/// `y_e = x_e M_e` for every segment, where `weight(e)` is `M_e`, `inner` by `width`.
fn by_segment<'a, T: Scalar>(
    x: &[T],
    (inner, width): (usize, usize),
    segments: &[Range<usize>],
    weight: impl Fn(usize) -> Matrix<'a, T> + Sync,
) -> Vec<T> {
    let rows = segments.last().map_or(0, |last| last.end);
    let mut out = vec![T::ZERO; rows * width];
    let mut tasks = Vec::with_capacity(segments.len());
    let mut rest = out.as_mut_slice();
    for (expert, segment) in segments.iter().enumerate() {
        let (mine, others) = rest.split_at_mut(segment.len() * width);
        tasks.push((expert, segment, mine));
        rest = others;
    }
    tasks.into_par_iter().for_each(|(expert, segment, out)| {
        multiply(
            Matrix::of(&x[segment.start * inner..], segment.len(), inner),
            weight(expert),
            out,
        );
    });
    out
}

fn segments(counts: &FlexInt) -> Vec<Range<usize>> {
    let mut start = 0;
    indices(counts)
        .into_iter()
        .map(|count| {
            let segment = start..start + count;
            start = segment.end;
            segment
        })
        .collect()
}

/// A matrix seen in a slice, row-major or transposed.
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    elements: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: isize,
    column_stride: isize,
}

impl<'a, T> Matrix<'a, T> {
    /// The first `rows * columns` of `elements`, row-major.
    fn of(elements: &'a [T], rows: usize, columns: usize) -> Self {
        let elements = &elements[..rows * columns];
        Self {
            elements,
            rows,
            columns,
            row_stride: columns as isize,
            column_stride: 1,
        }
    }

    fn transposed(self) -> Self {
        Self {
            elements: self.elements,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// `out = a b`, row-major, on the calling thread. An inner size of zero gives zeros.
fn multiply<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>, out: &mut [T]) {
    assert_eq!(a.columns, b.rows, "inner sizes differ");
    assert_eq!(out.len(), a.rows * b.columns, "the output has another size");
    if a.columns == 0 || out.is_empty() {
        return;
    }
    // SAFETY: `Matrix` covers rows * columns elements of its slice with its strides, and `out` has rows * columns
    // elements of its own; the three do not overlap because `out` is borrowed mutably.
    #[allow(unsafe_code, reason = "the gemm crate takes pointers and strides")]
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            b.columns as isize,
            false,
            a.elements.as_ptr(),
            a.column_stride,
            a.row_stride,
            b.elements.as_ptr(),
            b.column_stride,
            b.row_stride,
            T::ZERO,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
