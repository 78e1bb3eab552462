//! The gradient of the routing weights. The choice is a constant.
//!
//! With s the affinities of the chosen, Z their sum (plus the constant that keeps it from zero) and f the scale, the
//! weights are w_j = f s_j / Z, and so ds_j = (f / Z) (dw_j - sum_i dw_i s_i / Z); without normalisation ds_j = f dw_j.
//! From there dlogit = ds s (1 - s), at the places of the chosen and zero elsewhere.

use burn::{
    backend::{
        Autodiff, TensorMetadata,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{FloatDType, IndexingUpdateOp},
};

use super::{GroupLimit, RouteOps, Weighting};

#[derive(Debug)]
struct Weigh;

impl<B: RouteOps> Backward<B, 1> for Weigh {
    type State = (FloatTensor<B>, IntTensor<B>, Weighting);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (logits, chosen, weighting) = ops.state;
        let [node] = ops.parents;
        let Some(node) = node else {
            return;
        };
        let (shape, dtype, device) = (logits.shape(), logits.dtype(), logits.device());
        let single = |tensor| B::float_cast(tensor, FloatDType::F32);
        let affinity = B::sigmoid(single(B::float_gather(1, logits, chosen.clone()))); // [T, K]
        let grad = B::float_mul_scalar(single(grad), weighting.scale.into());
        let grad = if weighting.normalised {
            let sum = B::float_add_scalar(
                B::float_sum_dim(affinity.clone(), 1),
                super::SMALLEST_SUM.into(),
            ); // [T, 1]
            let mean = B::float_div(
                B::float_sum_dim(B::float_mul(grad.clone(), affinity.clone()), 1),
                sum.clone(),
            );
            B::float_div(B::float_sub(grad, mean), sum)
        } else {
            grad
        };
        let slope = B::sigmoid_backward(affinity, grad); // [T, K]
        let zeros = B::float_zeros(shape, &device, FloatDType::F32);
        let grad = B::float_scatter(1, zeros, chosen, slope, IndexingUpdateOp::Add);
        grads.register::<B>(node.id, B::float_cast(grad, dtype.into()));
    }
}

impl<B: RouteOps, C: CheckpointStrategy> RouteOps for Autodiff<B, C> {
    fn choose_and_weigh(
        logits: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        limit: GroupLimit,
        weighting: Weighting,
    ) -> (IntTensor<Self>, FloatTensor<Self>) {
        let bias = bias.into_primitive();
        match Weigh
            .prepare::<C>([logits.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let logits = logits.into_primitive();
                let (chosen, weights) = B::choose_and_weigh(logits.clone(), bias, limit, weighting);
                let weights = prep.finish((logits, chosen.clone(), weighting), weights);
                (chosen, weights)
            }
            OpsKind::UnTracked(prep) => {
                let (chosen, weights) =
                    B::choose_and_weigh(logits.into_primitive(), bias, limit, weighting);
                (chosen, prep.finish(weights))
            }
        }
    }
}
