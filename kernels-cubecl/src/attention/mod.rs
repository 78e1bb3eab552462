//! Causal attention of many heads over whole sequences, with keys and values from a latent (MLA), for training.

mod backward;
mod flex;
mod reference;
#[cfg(test)]
mod tests;

use burn::{
    backend::{
        Dispatch, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};

use crate::{flex::is_native_f32, rope::Rotation};

/// `softmax(scale q k^T) v` in every head, where position t sees the positions `first[t]..=t` of its sequence.
///
/// Takes what the projections make, as it lies: of each head's query N numbers without position and R to be rotated, of
/// each head's key N numbers and V of its value, and R numbers to be rotated that all heads' keys share.
///
/// Native on Flex for f32: blocks of queries against the keys that they can see, with rotated queries, keys and scores
/// in cache and never as tensors; the backward pass recomputes them from the saved normalisers.
///
/// # Shapes
/// - `q`: `[B, T, H (N + R)]`, `kv`: `[B, T, H (N + V)]`, `k_pe`: `[B, T, R]`
/// - `rotation`: of T positions
/// - `first`: `[B, T]`, or `[1, T]` where all sequences have the same; at most t
/// - result: `[B, T, H V]`
///
/// # Panics
/// If sizes do not fit each other, or R is zero.
pub fn causal_attention(
    q: Tensor<3>,
    kv: Tensor<3>,
    k_pe: Tensor<3>,
    rotation: &Rotation,
    sizes: Sizes,
    first: Tensor<2, Int>,
) -> Tensor<3> {
    let [batch, length, rope] = k_pe.dims();
    assert!(
        rope > 0
            && q.dims() == [batch, length, sizes.heads * (sizes.nope + rope)]
            && kv.dims() == [batch, length, sizes.heads * (sizes.nope + sizes.value)]
            && rotation.dims() == [length, rope / 2]
            && [[1, length], [batch, length]].contains(&first.dims()),
        "q {:?}, kv {:?}, k_pe {:?}, a rotation of {:?} and first {:?} do not fit {sizes:?}",
        q.dims(),
        kv.dims(),
        k_pe.dims(),
        rotation.dims(),
        first.dims()
    );
    if !is_native_f32(&q.device(), q.dtype()) {
        return reference::causal_attention(q, kv, k_pe, rotation, sizes, first);
    }
    Tensor::from_dispatch(Dispatch::attend(
        q.into_dispatch(),
        kv.into_dispatch(),
        k_pe.into_dispatch(),
        rotation.cos.clone().into_dispatch(),
        rotation.sin.clone().into_dispatch(),
        first.into_dispatch(),
        sizes,
    ))
}

/// How the heads divide what the projections make.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    /// Heads, H.
    pub heads: usize,
    /// Of a head's query and key, the numbers without position, N.
    pub nope: usize,
    /// Of a head's value, V.
    pub value: usize,
    /// Factor of the scores.
    pub scale: f64,
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait AttentionOps: burn::backend::Backend {
    fn attend(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        first: IntTensor<Self>,
        sizes: Sizes,
    ) -> FloatTensor<Self>;
}

/// Inputs of an attention.
#[derive(Clone, Debug)]
pub(crate) struct Inputs<B: burn::backend::Backend> {
    q: FloatTensor<B>,
    kv: FloatTensor<B>,
    k_pe: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    first: IntTensor<B>,
    sizes: Sizes,
}

/// The gradients of [`AttentionOps`], on backends without autodiff.
pub(crate) trait AttentionGrad: burn::backend::Backend {
    /// The result and the normaliser of each row, `[B H, T]`.
    fn attend_saving(inputs: &Inputs<Self>) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// With respect to `q`, `kv` and `k_pe`.
    fn attend_grad(
        grad: FloatTensor<Self>,
        inputs: &Inputs<Self>,
        normalisers: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3];
}
