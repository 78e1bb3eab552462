//! Causal attention of many heads over whole sequences, for training.

mod backward;
mod flex;

use burn::{
    backend::{
        Dispatch, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Bool, Int, Tensor, activation::softmax},
};

use crate::flex::is_native_f32;

/// Position t sees the positions `first[t]..=t` of its sequence: `softmax(q k^T) v` over them.
///
/// Queries come scaled. Native on Flex for f32: blocks of queries against the keys that they can see, with the
/// scores in cache and never as a tensor; the backward pass recomputes them from the saved normalisers.
///
/// # Shapes
/// - `q`, `k`: `[B, T, H, D]`
/// - `v`: `[B, T, H, V]`
/// - `first`: `[B, T]`, or `[1, T]` where all sequences have the same; at most t
/// - result: `[B, T, H, V]`
pub fn causal_attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    first: Tensor<2, Int>,
) -> Tensor<4> {
    if is_native_f32(&q.device(), q.dtype()) {
        let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
        Tensor::from_dispatch(Dispatch::attend(q, k, v, first.into_dispatch()))
    } else {
        reference(q, k, v, first)
    }
}

fn reference(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, first: Tensor<2, Int>) -> Tensor<4> {
    let (q, k, v) = (q.swap_dims(1, 2), k.swap_dims(1, 2), v.swap_dims(1, 2)); // [B, H, T, D]
    let scores = q.matmul(k.transpose()); // [B, H, T, T]
    let shape = scores.dims();
    let hidden = hidden(first).expand(shape);
    softmax(scores.mask_fill(hidden, f32::NEG_INFINITY), 3)
        .matmul(v)
        .swap_dims(1, 2)
}

/// Which keys a query does not see, `[B or 1, 1, T, T]`.
fn hidden(first: Tensor<2, Int>) -> Tensor<4, Bool> {
    let [batch, length] = first.dims();
    let shape = [batch, 1, length, length];
    let position = Tensor::<1, Int>::arange(0..length as i64, &first.device());
    let key = position.clone().reshape([1, 1, 1, length]).expand(shape);
    let query = position.reshape([1, 1, length, 1]).expand(shape);
    let first = first.reshape([batch, 1, length, 1]).expand(shape);
    key.clone().greater(query).bool_or(key.lower(first))
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait AttentionOps: burn::backend::Backend {
    fn attend(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        first: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// Inputs of an attention and the normaliser of each row, `[B H, T]`.
#[derive(Clone, Debug)]
pub(crate) struct Saved<B: burn::backend::Backend> {
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    first: IntTensor<B>,
    normalisers: FloatTensor<B>,
}

/// The gradients of [`AttentionOps`], on backends without autodiff.
pub(crate) trait AttentionGrad: burn::backend::Backend {
    fn attend_saving(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        first: IntTensor<Self>,
    ) -> (FloatTensor<Self>, Saved<Self>);

    /// With respect to `q`, `k` and `v`.
    fn attend_grad(grad: FloatTensor<Self>, saved: Saved<Self>) -> [FloatTensor<Self>; 3];
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};

    use super::*;

    #[test]
    fn native_agrees_with_reference() {
        let device = Device::flex().autodiff();
        // Below, at and above the block of 64 queries; sequences in one piece and cut into documents.
        for (batch, length, heads, cut) in [
            (1, 1, 1, 0),
            (2, 63, 3, 0),
            (3, 64, 2, 10),
            (2, 150, 2, 37),
            (2, 130, 1, 0),
        ] {
            let random = |width| {
                Tensor::<4>::random(
                    [batch, length, heads, width],
                    Distribution::Normal(0.0, 1.0),
                    &device,
                )
                .require_grad()
            };
            // Queries come scaled, as attention has them.
            let q = (random(12) * 12f64.powf(-0.5)).detach().require_grad();
            let (k, v, mask) = (random(12), random(7), random(7).detach());
            let rows = if cut > 0 { batch } else { 1 };
            let first: Vec<i32> = (0..rows * length)
                .map(|at| if cut > 0 { at % length / cut * cut } else { 0 })
                .collect();
            let first =
                Tensor::<2, Int>::from_data(TensorData::new(first, [rows, length]), &device);
            let run = |out: Tensor<4>| {
                let grads = (out.clone() * mask.clone()).sum().backward();
                let grad = |t: &Tensor<4>| t.grad(&grads).unwrap().into_data();
                [out.into_data(), grad(&q), grad(&k), grad(&v)]
            };
            let native = run(causal_attention(
                q.clone(),
                k.clone(),
                v.clone(),
                first.clone(),
            ));
            let expected = run(reference(q.clone(), k.clone(), v.clone(), first));
            for (native, expected) in native.iter().zip(&expected) {
                native.assert_approx_eq(expected, Tolerance::<f32>::rel_abs(1e-5, 2e-5));
            }
        }
    }
}
