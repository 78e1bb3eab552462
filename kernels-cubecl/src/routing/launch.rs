//! Launches of the kernels for CubeCL devices.

use burn::{
    backend::{
        Cube, TensorMetadata,
        ops::{ActivationOps, FloatTensorOps},
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, FloatDType, IndexingUpdateOp},
};
use cubecl::prelude::*;

use super::{GroupLimit, RouteGrad, RouteOps, RoutingOps, Weighting, kernel};
use crate::{
    cube::{contiguous, elem, empty, grid},
    flex::dims,
};

impl RoutingOps for Cube {
    fn choose(choice: FloatTensor<Self>, limit: GroupLimit) -> IntTensor<Self> {
        let choice = contiguous(choice);
        let [tokens, experts] = dims(&choice);
        let chosen = empty(&choice, [tokens, limit.experts_per_token], DType::I32);
        if tokens > 0 {
            let (client, dim) = (choice.client.clone(), cube_for(experts));
            kernel::select_experts::launch(
                &client,
                grid(&client, tokens, dim),
                dim,
                choice.into_buffer_arg(),
                chosen.clone().into_buffer_arg(),
                experts,
                limit,
            );
        }
        chosen
    }
}

impl RouteOps for Cube {
    fn choose_and_weigh(
        logits: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        limit: GroupLimit,
        weighting: Weighting,
    ) -> (IntTensor<Self>, FloatTensor<Self>) {
        let logits = contiguous(logits);
        let bias = contiguous(Self::float_cast(bias, FloatDType::F32));
        let [tokens, experts] = dims(&logits);
        let shape = [tokens, limit.experts_per_token];
        let chosen = empty(&logits, shape, DType::I32);
        let weights = empty(&logits, shape, logits.dtype);
        if tokens > 0 {
            let (client, dim) = (logits.client.clone(), cube_for(experts));
            let dtype = elem(&logits);
            kernel::route::launch(
                &client,
                grid(&client, tokens, dim),
                dim,
                logits.into_buffer_arg(),
                bias.into_buffer_arg(),
                chosen.clone().into_buffer_arg(),
                weights.clone().into_buffer_arg(),
                weighting.scale as f32,
                weighting.normalised,
                experts,
                limit,
                dtype,
            );
        }
        (chosen, weights)
    }
}

impl RouteGrad for Cube {
    fn weigh_grad(
        grad: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        chosen: IntTensor<Self>,
        weighting: Weighting,
    ) -> FloatTensor<Self> {
        let (shape, dtype, device) = (logits.shape(), logits.dtype(), logits.device());
        let single = |tensor| Self::float_cast(tensor, FloatDType::F32);
        let affinity = Self::sigmoid(single(Self::float_gather(1, logits, chosen.clone()))); // [T, K]
        let grad = Self::float_mul_scalar(single(grad), weighting.scale.into());
        let grad = if weighting.normalised {
            let sum = Self::float_add_scalar(
                Self::float_sum_dim(affinity.clone(), 1),
                super::SMALLEST_SUM.into(),
            ); // [T, 1]
            let mean = Self::float_div(
                Self::float_sum_dim(Self::float_mul(grad.clone(), affinity.clone()), 1),
                sum.clone(),
            );
            Self::float_div(Self::float_sub(grad, mean), sum)
        } else {
            grad
        };
        let slope = Self::sigmoid_backward(affinity, grad); // [T, K]
        let zeros = Self::float_zeros(shape, &device, FloatDType::F32);
        let grad = Self::float_scatter(1, zeros, chosen, slope, IndexingUpdateOp::Add);
        Self::float_cast(grad, dtype.into())
    }
}

/// A unit per expert, as far as every device has them.
fn cube_for(experts: usize) -> CubeDim {
    CubeDim::new_1d((experts as u32).next_power_of_two().clamp(32, 256))
}
