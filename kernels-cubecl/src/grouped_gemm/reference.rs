//! Grouped matrix product in plain tensor operations.

use burn::tensor::{Int, Tensor};

/// See [`super::grouped_matmul`]. Reads `counts` on the host.
pub(super) fn grouped_matmul(
    x: Tensor<2>,
    weights: Tensor<3>,
    counts: Tensor<1, Int>,
) -> Tensor<2> {
    by_segment(x, weights, counts, Tensor::matmul)
}

/// The products of every segment with its matrix, computed by `multiply`. Reads `counts` on the host.
pub(crate) fn by_segment(
    x: Tensor<2>,
    weights: Tensor<3>,
    counts: Tensor<1, Int>,
    multiply: impl Fn(Tensor<2>, Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    let ([rows, _], [_, _, n]) = (x.dims(), weights.dims());
    let mut start = 0;
    let mut outputs = Vec::new();
    for (expert, count) in counts.into_data().iter::<i64>().enumerate() {
        let end = start + count as usize;
        if end > start {
            let weight = weights.clone().narrow(0, expert, 1).squeeze_dim::<2>(0);
            outputs.push(multiply(x.clone().narrow(0, start, end - start), weight));
        }
        start = end;
    }
    if start < rows || outputs.is_empty() {
        outputs.push(Tensor::zeros([rows - start, n], (&x.device(), x.dtype())));
    }
    Tensor::cat(outputs, 0)
}
