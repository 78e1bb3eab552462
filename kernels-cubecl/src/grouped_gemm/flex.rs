//! Grouped matrix product on the CPU: segments side by side on the threads, each one product of the gemm crate.

use std::ops::Range;

use burn::backend::{
    Flex,
    tensor::{FloatTensor, IntTensor},
};

use super::{GroupedGemmGrad, GroupedGemmOps};
use crate::{
    flex::{FlexInt, Scalar, contiguous, dims, elements, float_tensor, indices, with_scalar},
    gemm::{Matrix, multiply_fresh},
    parts::{by_rows, zeroed},
};

impl GroupedGemmOps for Flex {
    fn segment_matmul(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([rows, _], [_, k, n]) = (dims(&x), dims(&weights));
        let (x, weights, segments) = (contiguous(x), contiguous(weights), segments(&counts, rows));
        with_scalar!(x, T => {
            let weight = |e| Matrix::of(&elements::<T>(&weights)[e * k * n..], k, n);
            float_tensor(by_segment(elements::<T>(&x), [k, n], &segments, weight), [rows, n])
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
        let (grad, weights, segments) = (
            contiguous(grad),
            contiguous(weights),
            segments(&counts, rows),
        );
        with_scalar!(grad, T => {
            let weight = |e| Matrix::of(&elements::<T>(&weights)[e * k * n..], k, n).transposed();
            float_tensor(by_segment(elements::<T>(&grad), [n, k], &segments, weight), [rows, k])
        })
    }

    fn segment_matmul_weight_grad(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([rows, k], [_, n], [experts]) = (dims(&x), dims(&grad), dims(&counts));
        let (x, grad, segments) = (contiguous(x), contiguous(grad), segments(&counts, rows));
        with_scalar!(x, T => {
            let (x, grad) = (elements::<T>(&x), elements::<T>(&grad));
            let [out] = by_rows(&vec![k; experts], [n], |expert, [out]| {
                let rows = &segments[expert];
                let x = Matrix::of(&x[rows.start * k..], rows.len(), k).transposed();
                let grad = Matrix::of(&grad[rows.start * n..], rows.len(), n);
                [multiply_fresh(x, grad, out)]
            });
            float_tensor(out, [experts, k, n])
        })
    }
}

/// `y_e = x_e M_e` for every segment, where `weight(e)` is `M_e`, `inner` by `width`; zero behind the last.
fn by_segment<'a, T: Scalar>(
    x: &[T],
    [inner, width]: [usize; 2],
    segments: &[Range<usize>],
    weight: impl Fn(usize) -> Matrix<'a, T> + Sync,
) -> Vec<T> {
    let rows: Vec<usize> = segments.iter().map(Range::len).collect();
    let [out] = by_rows(&rows, [width], |expert, [out]| {
        if expert + 1 == segments.len() {
            return [zeroed(out)];
        }
        let x = Matrix::of(&x[segments[expert].start * inner..], rows[expert], inner);
        [multiply_fresh(x, weight(expert), out)]
    });
    out
}

/// Where the segments of the experts are, and the rows behind them up to `rows`.
pub(crate) fn segments(counts: &FlexInt, rows: usize) -> Vec<Range<usize>> {
    let mut starts = vec![0];
    for count in indices(counts) {
        starts.push(starts[starts.len() - 1] + count);
    }
    starts.push(rows);
    starts.windows(2).map(|pair| pair[0]..pair[1]).collect()
}
