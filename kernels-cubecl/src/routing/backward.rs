//! The gradient of the routing weights. The choice is a constant.
//!
//! With s the affinities of the chosen, Z their sum (plus the constant that keeps it from zero) and f the scale, the
//! weights are w_j = f s_j / Z, and so ds_j = (f / Z) (dw_j - sum_i dw_i s_i / Z); without normalisation ds_j = f dw_j.
//! From there dlogit = ds s (1 - s), at the places of the chosen and zero elsewhere.

use burn::backend::{
    Autodiff,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};

use super::{GroupLimit, RouteGrad, RouteOps, Weighting};

#[derive(Debug)]
struct Weigh;

impl<B: RouteOps + RouteGrad> Backward<B, 1> for Weigh {
    type State = (FloatTensor<B>, IntTensor<B>, Weighting);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (logits, chosen, weighting) = ops.state;
        let [node] = ops.parents;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::weigh_grad(grad, logits, chosen, weighting));
        }
    }
}

impl<B: RouteOps + RouteGrad, C: CheckpointStrategy> RouteOps for Autodiff<B, C> {
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
