//! A linear layer whose products are computed in FP8 (report section 3.3.1, figure 6).

use std::marker::PhantomData;

use burn::{
    backend::{
        Autodiff, AutodiffBackend, Dispatch,
        autodiff::{
            NodeId,
            checkpoint::{
                base::Checkpointer, retro_forward::RetroForward, state::BackwardStates,
                strategy::CheckpointStrategy,
            },
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        tensor::{FloatTensor, IntTensor},
    },
    tensor::Tensor,
};

use super::{Fp8Ops, ScaleFormat, Tile, is_native_f32_or_flex, matmul_nt, quantize};
use crate::weight_grad::{Lift, Weight};

/// `x W` with operands quantised on the way: `x` in rows' tiles, `W` in blocks.
///
/// Its gradients are FP8 products too: `dx = dy W^T` with `dy` in rows' tiles, `dW = x^T dy` with both in tiles along
/// the rows that are summed. `format` is that of the scales of `x` and `dy`; those of `W` are any numbers. The gradients
/// are those of the unquantised product at the quantised operands: rounding
/// itself counts as the identity.
///
/// For f32 on Flex and on CubeCL devices; elsewhere only the forward pass, through [`quantize`] and [`matmul_nt`].
///
/// # Shapes
/// - `x`: `[M, K]`, `weight`: `[K, N]`
/// - result: `[M, N]`
///
/// # Panics
/// If inner sizes differ, or if gradients are asked for where there are none.
pub fn linear(x: Tensor<2>, weight: Tensor<2>, format: ScaleFormat) -> Tensor<2> {
    let ([_, inner], [other, _]) = (x.dims(), weight.dims());
    assert_eq!(inner, other, "inner sizes differ");
    if is_native_f32_or_flex(&x.device(), x.dtype()) {
        return Tensor::from_dispatch(Dispatch::fp8_linear(
            x.into_dispatch(),
            weight.into_dispatch(),
            format,
        ));
    }
    assert!(
        !x.device().is_autodiff(),
        "gradients of FP8 products are computed in f32, not in {:?}",
        x.dtype()
    );
    let dtype = x.dtype();
    let x = quantize(x, Tile::Row, format);
    let weight = quantize(weight.transpose(), Tile::Block, ScaleFormat::Float32);
    matmul_nt(&x, &weight).cast(dtype)
}

/// `a b^T`, quantised first; `format` is that of the scales of rows' tiles.
pub(super) fn product<B: Fp8Ops>(
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    b_tile: Tile,
    format: ScaleFormat,
) -> FloatTensor<B> {
    let b_format = match b_tile {
        Tile::Row => format,
        Tile::Block => ScaleFormat::Float32,
    };
    let (a_codes, a_scales) = B::fp8_quantize(a, Tile::Row, format);
    let (b_codes, b_scales) = B::fp8_quantize(b, b_tile, b_format);
    B::fp8_matmul_nt(a_codes, a_scales, b_codes, b_scales, b_tile)
}

#[derive(Debug)]
struct Linear;

impl<B: Fp8Ops + Lift> Backward<B, 2> for Linear {
    type State = (NodeId, NodeId, ScaleFormat);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, kept: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let weight_grad = Weight::of(&ops, 1);
        let (x, weight, format) = ops.state;
        let [x_node, _] = ops.parents;
        let x = kept.retrieve_node_output(x);
        let weight = kept.retrieve_node_output(weight);
        if let Some(weight_grad) = weight_grad {
            let grad = grad.clone();
            weight_grad.register::<B>(grads, move || {
                let (x, grad) = (B::float_transpose(x), B::float_transpose(grad));
                product::<B>(x, grad, Tile::Row, format)
            });
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, product::<B>(grad, weight, Tile::Block, format));
        }
    }
}

/// The forward pass in the backward pass, under gradient checkpointing.
#[derive(Debug)]
struct Again<B> {
    x: NodeId,
    weight: NodeId,
    format: ScaleFormat,
    backend: PhantomData<B>,
}

impl<B: Fp8Ops> RetroForward for Again<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let (x, weight) = (states.get_state(&self.x), states.get_state(&self.weight));
        states.save(out, B::fp8_linear(x, weight, self.format));
    }
}

impl<B: Fp8Ops + Lift, C: CheckpointStrategy> Fp8Ops for Autodiff<B, C> {
    fn fp8_quantize(
        x: FloatTensor<Self>,
        tile: Tile,
        format: ScaleFormat,
    ) -> (IntTensor<Self>, FloatTensor<Self>) {
        let (codes, scales) = B::fp8_quantize(x.into_primitive(), tile, format);
        (codes, constant::<B, C>(scales))
    }

    fn fp8_matmul_nt(
        a_codes: IntTensor<Self>,
        a_scales: FloatTensor<Self>,
        b_codes: IntTensor<Self>,
        b_scales: FloatTensor<Self>,
        b_tile: Tile,
    ) -> FloatTensor<Self> {
        constant::<B, C>(B::fp8_matmul_nt(
            a_codes,
            a_scales.into_primitive(),
            b_codes,
            b_scales.into_primitive(),
            b_tile,
        ))
    }

    fn fp8_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        let again = Again::<B> {
            x: x.id(),
            weight: weight.id(),
            format,
            backend: PhantomData,
        };
        match Linear
            .prepare::<C>([x.node(), weight.node()])
            .memory_bound()
            .retro_forward(again)
            .parents([&x, &weight])
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&weight), format);
                let (x, weight) = (x.into_primitive(), weight.into_primitive());
                prep.finish(state, B::fp8_linear(x, weight, format))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::fp8_linear(
                x.into_primitive(),
                weight.into_primitive(),
                format,
            )),
        }
    }
}

/// A tensor that gradients do not reach.
fn constant<B: Fp8Ops, C: CheckpointStrategy>(
    tensor: FloatTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    Autodiff::<B, C>::from_inner(tensor)
}
