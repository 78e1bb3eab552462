//! The gradients of the grouped matrix product.

use burn::backend::{
    Autodiff,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};

use super::{GroupedGemmGrad, GroupedGemmOps};
use crate::weight_grad::Weight;

#[derive(Debug)]
struct SegmentMatmul;

impl<B: GroupedGemmOps + GroupedGemmGrad> Backward<B, 2> for SegmentMatmul {
    type State = (FloatTensor<B>, FloatTensor<B>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let weight_grad = Weight::of(&ops, 1);
        let (x, weights, counts) = ops.state;
        let [x_node, _] = ops.parents;
        if let Some(weight_grad) = weight_grad {
            let (grad, counts) = (grad.clone(), counts.clone());
            weight_grad.register::<B>(grads, || B::segment_matmul_weight_grad(x, grad, counts));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::segment_matmul_input_grad(grad, weights, counts));
        }
    }
}

impl<B: GroupedGemmOps + GroupedGemmGrad, C: CheckpointStrategy> GroupedGemmOps for Autodiff<B, C> {
    fn segment_matmul(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        match SegmentMatmul
            .prepare::<C>([x.node(), weights.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (x, weights) = (x.into_primitive(), weights.into_primitive());
                let output = B::segment_matmul(x.clone(), weights.clone(), counts.clone());
                prep.finish((x, weights, counts), output)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::segment_matmul(
                x.into_primitive(),
                weights.into_primitive(),
                counts,
            )),
        }
    }
}
