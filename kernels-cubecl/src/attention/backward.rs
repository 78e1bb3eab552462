//! The gradients of causal attention.

use burn::backend::{
    Autodiff,
    autodiff::{
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};

use super::{AttentionGrad, AttentionOps, Inputs, Sizes};

#[derive(Debug)]
struct Attend;

impl<B: AttentionOps + AttentionGrad> Backward<B, 3> for Attend {
    type State = (Inputs<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (inputs, normalisers) = ops.state;
        let all = B::attend_grad(grad, &inputs, normalisers);
        for (node, grad) in ops.parents.into_iter().zip(all) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

impl<B: AttentionOps + AttentionGrad, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn attend(
        q: FloatTensor<Self>,
        kv: FloatTensor<Self>,
        k_pe: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        first: IntTensor<Self>,
        sizes: Sizes,
    ) -> FloatTensor<Self> {
        let nodes = [q.node(), kv.node(), k_pe.node()];
        let inputs = Inputs::<B> {
            q: q.into_primitive(),
            kv: kv.into_primitive(),
            k_pe: k_pe.into_primitive(),
            cos: cos.into_primitive(),
            sin: sin.into_primitive(),
            first,
            sizes,
        };
        let (output, normalisers) = B::attend_saving(&inputs);
        match Attend.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((inputs, normalisers), output),
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }
}
