//! The gradients of the movement of tokens: each is the opposite movement.

use burn::backend::{
    Autodiff,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};

use super::{PermuteGrad, PermuteOps, Sorted};

#[derive(Debug)]
struct PermuteRows;

impl<B: PermuteOps + PermuteGrad> Backward<B, 1> for PermuteRows {
    type State = IntTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let [x] = ops.parents;
        if let Some(x) = x {
            grads.register::<B>(x.id, B::permute_rows_grad(grad, ops.state));
        }
    }
}

#[derive(Debug)]
struct CombineRows;

impl<B: PermuteOps + PermuteGrad> Backward<B, 2> for CombineRows {
    type State = (FloatTensor<B>, FloatTensor<B>, IntTensor<B>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (y, weights, order, slots) = ops.state;
        let (grad_y, grad_weights) = B::combine_rows_grad(grad, y, weights, order, slots);
        let [y, weights] = ops.parents;
        if let Some(y) = y {
            grads.register::<B>(y.id, grad_y);
        }
        if let Some(weights) = weights {
            grads.register::<B>(weights.id, grad_weights);
        }
    }
}

impl<B: PermuteOps + PermuteGrad, C: CheckpointStrategy> PermuteOps for Autodiff<B, C> {
    fn sort_by_expert(
        chosen: IntTensor<Self>,
        experts: usize,
        tile: usize,
    ) -> Sorted<IntTensor<Self>> {
        B::sort_by_expert(chosen, experts, tile)
    }

    fn permute_rows(
        x: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        match PermuteRows
            .prepare::<C>([x.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let output = B::permute_rows(x.into_primitive(), order, slots.clone());
                prep.finish(slots, output)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::permute_rows(x.into_primitive(), order, slots))
            }
        }
    }

    fn combine_rows(
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        match CombineRows
            .prepare::<C>([y.node(), weights.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (y, weights) = (y.into_primitive(), weights.into_primitive());
                let output =
                    B::combine_rows(y.clone(), weights.clone(), order.clone(), slots.clone());
                prep.finish((y, weights, order, slots), output)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::combine_rows(
                y.into_primitive(),
                weights.into_primitive(),
                order,
                slots,
            )),
        }
    }
}
