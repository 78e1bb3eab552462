//! Attention over the latent cache in plain tensor operations.

use burn::tensor::{DType, Int, Tensor, activation::softmax};

/// See [`super::mla_decode`].
pub(super) fn mla_decode(
    q_latent: Tensor<4>,
    q_pe: Tensor<4>,
    c_kv: Tensor<3>,
    k_pe: Tensor<3>,
    lengths: Tensor<1, Int>,
) -> Tensor<4> {
    let (device, dtype) = (q_latent.device(), q_latent.dtype());
    let [batch, queries, heads, latent] = q_latent.dims();
    let [_, positions, rope] = k_pe.dims();
    let at = |count: usize| Tensor::<1, Int>::arange(0..count as i64, &device);
    let (position, query) = (at(positions), at(queries));
    let lengths = lengths.cast(position.dtype());

    let empty = position
        .clone()
        .reshape([1, positions, 1])
        .expand([batch, positions, latent])
        .greater_equal(
            lengths
                .clone()
                .reshape([batch, 1, 1])
                .expand([batch, positions, latent]),
        );
    // Zero times what is not a number would be none.
    let c_kv = widened(c_kv).mask_fill(empty, 0.0);

    let seen = [batch, queries, heads, positions];
    let last = lengths.reshape([batch, 1, 1, 1]).expand(seen) - queries as i64
        + query.reshape([1, queries, 1, 1]).expand(seen);
    let hidden = position
        .reshape([1, 1, 1, positions])
        .expand(seen)
        .greater(last)
        .reshape([batch, queries * heads, positions]);

    let rows = |x: Tensor<4>, width| widened(x).reshape([batch, queries * heads, width]);
    let mut scores = rows(q_latent, latent).matmul(c_kv.clone().transpose()); // [B, T H, S]
    if rope > 0 {
        scores = scores + rows(q_pe, rope).matmul(widened(k_pe).transpose());
    }
    let weights = softmax(scores.mask_fill(hidden.clone(), f32::NEG_INFINITY), 2);
    // A softmax over nothing is not a number.
    let weights = weights.mask_fill(hidden, 0.0);
    weights
        .matmul(c_kv)
        .reshape([batch, queries, heads, latent])
        .cast(dtype)
}

/// Half precisions in single; double stays.
fn widened<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    match x.dtype() {
        DType::F32 | DType::F64 => x,
        _ => x.cast(DType::F32),
    }
}
