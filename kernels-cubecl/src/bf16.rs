//! Rounding to BF16 and back, for layers that compute in BF16 with sums in single precision on any device.
//!
//! Native on Flex and on CubeCL devices for f32, whether or not the device has the type. Memory bound: under gradient
//! checkpointing the backward pass rounds again.

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
    cube::is_native_f32_or_flex,
    flex::{contiguous, elements, float_tensor},
    parts::by_parts,
    vector::vectorized,
    weight_grad,
};

/// Elements per task.
const CHUNK: usize = 1 << 14;

/// The numbers of BF16 that are nearest to the elements, the even one of two, in the type of `x`. Its gradient is rounded
/// the same way: that of an activation.
pub fn rounded<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_native_f32_or_flex(&x.device(), x.dtype()) {
        return Tensor::from_dispatch(Dispatch::round_bf16(x.into_dispatch(), true));
    }
    let dtype = x.dtype();
    x.cast(DType::BF16).cast(dtype)
}

/// As [`rounded`] with the gradient as it is: that of a weight, which is summed and kept in single precision.
pub fn rounded_weight<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_native_f32_or_flex(&x.device(), x.dtype()) {
        return Tensor::from_dispatch(Dispatch::round_bf16(x.into_dispatch(), false));
    }
    let rounded = x.clone().detach().cast(DType::BF16).cast(x.dtype());
    // The difference is exact, and so is the sum.
    let difference = rounded - x.clone().detach();
    x + difference
}

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
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
            vectorized!({
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

#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod on_cube {
    use burn::{
        backend::{Cube, TensorMetadata, tensor::FloatTensor},
        tensor::DType,
    };
    use cubecl::prelude::*;

    use super::Bf16Ops;
    use crate::cube::{address, contiguous, empty};

    /// [`super::round`] of every element, by its bits: most shading languages have no BF16.
    #[cube(launch, address_type = "dynamic")]
    fn round(x: &[f32], out: &mut [f32]) {
        if ABSOLUTE_POS < out.len() {
            let bits = u32::reinterpret(x[ABSOLUTE_POS]);
            let rounded = (bits + 0x7fffu32 + ((bits >> 16u32) & 1u32)) & 0xffff_0000u32;
            let is_nan = bits & 0x7fff_ffffu32 > 0x7f80_0000u32;
            out[ABSOLUTE_POS] = f32::reinterpret(select(is_nan, bits, rounded));
        }
    }

    impl Bf16Ops for Cube {
        fn round_bf16(x: FloatTensor<Self>, _: bool) -> FloatTensor<Self> {
            let x = contiguous(x);
            let out = empty(&x, x.shape(), DType::F32);
            let elements = x.shape().num_elements();
            if elements > 0 {
                let dim = CubeDim::new(&x.client, elements);
                let client = x.client.clone();
                round::launch(
                    &client,
                    cubecl::calculate_cube_count_elemwise(&client, elements, dim),
                    dim,
                    address(&[&x, &out]),
                    x.into_buffer_arg(),
                    out.clone().into_buffer_arg(),
                );
            }
            out
        }
    }
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
    use burn::tensor::{Device, bf16};

    use super::*;

    #[test]
    fn every_kind_of_number_is_rounded_as_by_the_half_crate() {
        for value in every_kind() {
            let (found, expected) = (round(value), bf16::from_f32(value).to_f32());
            assert!(
                found == expected || found.is_nan() && expected.is_nan(),
                "{value:e}: {found:e}, expected {expected:e}"
            );
        }
    }

    /// All upper halves, with lower halves below, at and above a tie.
    fn every_kind() -> impl Iterator<Item = f32> {
        let lower = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let upper = (0..=u16::MAX).map(|upper| u32::from(upper) << 16);
        upper.flat_map(move |upper| lower.map(|lower| f32::from_bits(upper | lower)))
    }

    #[test]
    fn gradients_of_activations_are_rounded_and_those_of_weights_are_not() {
        gradients_on(&Device::flex().autodiff());
        let wide = Tensor::<1>::from_data([1.0 + 2f64.powi(-12)], (&Device::flex(), DType::F64));
        for round in [rounded, rounded_weight] {
            assert_eq!(round(wide.clone()).into_scalar::<f64>(), 1.0);
        }
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn on_wgpu_every_kind_of_number_is_rounded_as_on_the_cpu() {
        let device = crate::cube::wgpu();
        gradients_on(&device.clone().autodiff());
        // Numbers below the smallest normal one may be zeros there, and nothing is held to NaN's bits.
        let numbers: Vec<f32> = every_kind()
            .filter(|number| number.is_normal() || number.is_infinite() || *number == 0.0)
            .collect();
        let on = |device| rounded(Tensor::<1>::from_data(&numbers[..], device)).into_data();
        on(&device).assert_eq(&on(&Device::flex()), true);
        let nan = rounded(Tensor::<1>::from_data([f32::NAN], &device));
        assert!(nan.into_scalar::<f32>().is_nan());
        let none = rounded(Tensor::<2>::zeros([0, 3], &device));
        assert_eq!(none.dims(), [0, 3]);
    }

    fn gradients_on(device: &Device) {
        let exact = 1.0 + 2f32.powi(-12);
        let grad = |round: fn(Tensor<1>) -> Tensor<1>| {
            let x = Tensor::<1>::from_data([exact], device).require_grad();
            let y = round(x.clone());
            let factor = Tensor::<1>::from_data([exact], device);
            let grads = (y.clone() * factor).sum().backward();
            (
                y.into_scalar::<f32>(),
                x.grad(&grads).expect("reached").into_scalar::<f32>(),
            )
        };
        assert_eq!(grad(rounded), (1.0, 1.0));
        assert_eq!(grad(rounded_weight), (1.0, exact));
    }
}
