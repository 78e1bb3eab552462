//! Rounding to BF16 and back, for layers that compute in BF16 with sums in single precision on any device.
//!
//! Native on Flex for f32. Memory bound: under gradient checkpointing the backward pass rounds again.

use std::marker::PhantomData;

use burn::{
    backend::{
        Autodiff, Dispatch, Flex,
        autodiff::{
            NodeId,
            checkpoint::{
                base::Checkpointer, retro_forward::RetroForward, state::BackwardStates,
                strategy::CheckpointStrategy,
            },
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::FloatTensor,
    },
    tensor::{DType, Tensor},
};

use crate::{
    flex::{contiguous, elements, float_tensor, is_native_f32},
    parts::by_parts,
    vector::vectorized,
    weight_grad,
};

/// Elements per task.
const CHUNK: usize = 1 << 14;

/// The numbers of BF16 that are nearest to the elements, the even one of two, in the type of `x`. Its gradient is rounded
/// the same way: that of an activation.
pub fn rounded<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_native_f32(&x.device(), x.dtype()) {
        return Tensor::from_dispatch(Dispatch::round_bf16(x.into_dispatch(), true));
    }
    let dtype = x.dtype();
    x.cast(DType::BF16).cast(dtype)
}

/// As [`rounded`] with the gradient as it is: that of a weight, which is summed and kept in single precision.
pub fn rounded_weight<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_native_f32(&x.device(), x.dtype()) {
        return Tensor::from_dispatch(Dispatch::round_bf16(x.into_dispatch(), false));
    }
    let rounded = x.clone().detach().cast(DType::BF16).cast(x.dtype());
    // The difference is exact, and so is the sum.
    let difference = rounded - x.clone().detach();
    x + difference
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait Bf16Ops: burn::backend::Backend {
    fn round_bf16(x: FloatTensor<Self>, gradient: bool) -> FloatTensor<Self>;
}

impl Bf16Ops for Flex {
    fn round_bf16(x: FloatTensor<Self>, _: bool) -> FloatTensor<Self> {
        let x = contiguous(x);
        let shape = x.layout().shape().clone();
        let values = elements::<f32>(&x);
        let (out, _) = by_parts(values.len(), CHUNK, |part, out: &mut [f32]| {
            let values = &values[part * CHUNK..][..out.len()];
            vectorized(|| {
                for (out, &value) in out.iter_mut().zip(values) {
                    *out = round(value);
                }
            });
        });
        float_tensor(out, shape)
    }
}

/// Adds half of the last place, or just less before an even number, and cuts. What is beyond the largest number becomes
/// infinite, NaN stays.
#[inline(always)]
pub(crate) fn round(value: f32) -> f32 {
    let bits = value.to_bits();
    let rounded = f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
    if value.is_nan() { value } else { rounded }
}

#[derive(Debug)]
struct Round;

impl<B: Bf16Ops> Backward<B, 1> for Round {
    type State = bool;

    fn backward(self, ops: Ops<bool, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [node] = ops.parents;
        if let Some(node) = node {
            if !ops.state && weight_grad::hand_on(ops.node.id, node.id) {
                return;
            }
            let grad = grads.consume::<B>(&ops.node);
            let grad = match ops.state {
                true => B::round_bf16(grad, true),
                false => grad,
            };
            grads.register::<B>(node.id, grad);
        }
    }
}

/// The forward pass in the backward pass.
#[derive(Debug)]
struct Again<B> {
    x: NodeId,
    backend: PhantomData<B>,
}

impl<B: Bf16Ops> RetroForward for Again<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let x = states.get_state(&self.x);
        states.save(out, B::round_bf16(x, true));
    }
}

impl<B: Bf16Ops, C: CheckpointStrategy> Bf16Ops for Autodiff<B, C> {
    fn round_bf16(x: FloatTensor<Self>, gradient: bool) -> FloatTensor<Self> {
        let again = Again::<B> {
            x: x.id(),
            backend: PhantomData,
        };
        match Round
            .prepare::<C>([x.node()])
            .memory_bound()
            .retro_forward(again)
            .parents([&x])
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                prep.finish(gradient, B::round_bf16(x.into_primitive(), gradient))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::round_bf16(x.into_primitive(), gradient)),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData, bf16};

    use super::*;

    #[test]
    fn every_kind_of_number_is_rounded_as_by_the_half_crate() {
        // All upper halves, with lower halves below, at and above a tie.
        for upper in 0..=u16::MAX {
            for lower in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                let (found, expected) = (round(value), bf16::from_f32(value).to_f32());
                assert!(
                    found == expected || found.is_nan() && expected.is_nan(),
                    "{value:e}: {found:e}, expected {expected:e}"
                );
            }
        }
    }

    #[test]
    fn gradients_of_activations_are_rounded_and_those_of_weights_are_not() {
        let device = Device::flex().autodiff();
        let exact = 1.0 + 2f32.powi(-12);
        let grad = |round: fn(Tensor<1>) -> Tensor<1>| {
            let x = Tensor::<1>::from_data([exact], &device).require_grad();
            let y = round(x.clone());
            let factor = Tensor::<1>::from_data([exact], &device);
            let grads = (y.clone() * factor).sum().backward();
            (
                y.into_scalar::<f32>(),
                x.grad(&grads).expect("reached").into_scalar::<f32>(),
            )
        };
        assert_eq!(grad(rounded), (1.0, 1.0));
        assert_eq!(grad(rounded_weight), (1.0, exact));
        let wide = Tensor::<1>::from_data(
            TensorData::from([f64::from(exact)]),
            (&Device::flex(), DType::F64),
        );
        for round in [rounded, rounded_weight] {
            assert_eq!(round(wide.clone()).into_scalar::<f64>(), 1.0);
        }
    }
}
