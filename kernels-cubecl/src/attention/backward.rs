//! The gradients of causal attention.

use burn::backend::{
    Autodiff,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, Ops, OpsKind},
    },
    tensor::{FloatTensor, IntTensor},
};

use super::{AttentionGrad, AttentionOps, Inputs, Sizes};

#[derive(Debug)]
struct Attend;

/// What the backward pass needs. Queries, keys and values are those of their nodes, which may compute them again.
#[derive(Clone, Debug)]
struct Kept<B: AttentionOps> {
    nodes: [NodeId; 3],
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    first: IntTensor<B>,
    sizes: Sizes,
    normalisers: FloatTensor<B>,
}

impl<B: AttentionOps + AttentionGrad> Backward<B, 3> for Attend {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Kept<B>, 3>, grads: &mut Gradients, others: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let kept = ops.state;
        let [q, kv, k_pe] = kept.nodes.map(|node| others.retrieve_node_output(node));
        let inputs = Inputs {
            q,
            kv,
            k_pe,
            cos: kept.cos,
            sin: kept.sin,
            first: kept.first,
            sizes: kept.sizes,
        };
        let all = B::attend_grad(grad, &inputs, kept.normalisers);
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
        let guards = [q.node(), kv.node(), k_pe.node()];
        let inputs = Inputs::<B> {
            q: q.primitive().clone(),
            kv: kv.primitive().clone(),
            k_pe: k_pe.primitive().clone(),
            cos: cos.into_primitive(),
            sin: sin.into_primitive(),
            first,
            sizes,
        };
        let (output, normalisers) = B::attend_saving(&inputs);
        match Attend.prepare::<C>(guards).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let kept = Kept::<B> {
                    nodes: [&q, &kv, &k_pe].map(|tensor| prep.checkpoint(tensor)),
                    cos: inputs.cos,
                    sin: inputs.sin,
                    first: inputs.first,
                    sizes,
                    normalisers,
                };
                prep.finish(kept, output)
            }
            OpsKind::UnTracked(prep) => prep.finish(output),
        }
    }
}
