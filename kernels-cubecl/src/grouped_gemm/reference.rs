//! Grouped matrix product in plain tensor operations.

use burn::tensor::{Int, Tensor};

/// See [`super::grouped_matmul`]. Reads `counts` on the host.
pub(super) fn grouped_matmul(
    x: Tensor<2>,
    weights: Tensor<3>,
    counts: Tensor<1, Int>,
) -> Tensor<2> {
    let [_, _, n] = weights.dims();
    let mut start = 0;
    let mut outputs = Vec::new();
    for (expert, count) in counts.into_data().iter::<i64>().enumerate() {
        let end = start + count as usize;
        if end > start {
            let weight = weights.clone().narrow(0, expert, 1).squeeze_dim::<2>(0);
            outputs.push(x.clone().narrow(0, start, end - start).matmul(weight));
        }
        start = end;
    }
    if outputs.is_empty() {
        return Tensor::zeros([0, n], &x.device());
    }
    Tensor::cat(outputs, 0)
}
