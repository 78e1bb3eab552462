//! Launches of the kernels for CubeCL devices.

use burn::{
    backend::{
        Cube,
        ops::FloatTensorOps,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, FloatDType},
};
use cubecl::prelude::*;

use super::{GroupLimit, RouteOps, RoutingOps, Weighting, kernel};
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

/// A unit per expert, as far as every device has them.
fn cube_for(experts: usize) -> CubeDim {
    CubeDim::new_1d((experts as u32).next_power_of_two().clamp(32, 256))
}
