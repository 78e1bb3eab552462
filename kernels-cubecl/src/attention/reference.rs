//! Causal attention in plain tensor operations.

use burn::tensor::{Bool, Int, Tensor, activation::softmax};

use super::Sizes;
use crate::rope::Rotation;

/// See [`super::causal_attention`].
pub(super) fn causal_attention(
    q: Tensor<3>,
    kv: Tensor<3>,
    k_pe: Tensor<3>,
    rotation: &Rotation,
    Sizes {
        heads,
        nope,
        value,
        scale,
    }: Sizes,
    first: Tensor<2, Int>,
) -> Tensor<3> {
    let [batch, length, rope] = k_pe.dims();
    let q = (q * scale).reshape([batch, length, heads, nope + rope]);
    let kv = kv.reshape([batch, length, heads, nope + value]);
    let q_pe = rotation.rotate(q.clone().narrow(3, nope, rope));
    let k_pe = rotation
        .rotate(k_pe.reshape([batch, length, 1, rope]))
        .expand([batch, length, heads, rope]);
    let q = Tensor::cat(vec![q.narrow(3, 0, nope), q_pe], 3).swap_dims(1, 2); // [B, H, T, N + R]
    let k = Tensor::cat(vec![kv.clone().narrow(3, 0, nope), k_pe], 3).swap_dims(1, 2);
    let v = kv.narrow(3, nope, value).swap_dims(1, 2);
    let scores = q.matmul(k.transpose()); // [B, H, T, T]
    let hidden = hidden(first).expand(scores.dims());
    softmax(scores.mask_fill(hidden, f32::NEG_INFINITY), 3)
        .matmul(v)
        .swap_dims(1, 2)
        .reshape([batch, length, heads * value])
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
