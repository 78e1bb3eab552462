//! Grouped matrix product on the CPU: segments side by side on the threads, each one product of the gemm crate.

use std::ops::Range;

use burn::backend::{
    Flex,
    tensor::{FloatTensor, IntTensor},
};

use super::{GroupedGemmGrad, GroupedGemmOps};
use crate::{
    flex::{FlexInt, Scalar, contiguous, dims, elements, float_tensor, indices, with_scalar},
    gemm::{Into, Matrix, multiply},
    parts::{by_parts, by_sizes},
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
            float_tensor(by_segment(elements::<T>(&x), [rows, k, n], &segments, weight), [rows, n])
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
            float_tensor(by_segment(elements::<T>(&grad), [rows, n, k], &segments, weight), [rows, k])
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
            let (out, _) = by_parts(segments.len() * k * n, k * n, |expert, out| {
                let rows = &segments[expert];
                let x = Matrix::of(&x[rows.start * k..], rows.len(), k).transposed();
                let grad = Matrix::of(&grad[rows.start * n..], rows.len(), n);
                multiply(x, grad, out, Into::Replace);
            });
            float_tensor(out, [segments.len(), k, n])
        })
    }
}

/// `y_e = x_e M_e` for every segment, where `weight(e)` is `M_e`, `inner` by `width`; zero behind the last.
fn by_segment<'a, T: Scalar>(
    x: &[T],
    [rows, inner, width]: [usize; 3],
    segments: &[Range<usize>],
    weight: impl Fn(usize) -> Matrix<'a, T> + Sync,
) -> Vec<T> {
    let behind = rows - segments.iter().map(Range::len).sum::<usize>();
    let sizes = segments.iter().map(Range::len).chain([behind]);
    let sizes: Vec<usize> = sizes.map(|rows| rows * width).collect();
    by_sizes(&sizes, |expert, out| {
        if let Some(segment) = segments.get(expert) {
            let x = Matrix::of(&x[segment.start * inner..], segment.len(), inner);
            multiply(x, weight(expert), out, Into::Replace);
        }
    })
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
