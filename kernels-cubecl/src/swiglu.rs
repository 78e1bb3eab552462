//! The gate of SwiGLU: `silu(gate) * up` with `silu(x) = x sigmoid(x)`.
//!
//! Native on Flex for f32: one pass forward and one backward, which recomputes the sigmoid.

use burn::{
    backend::{
        Autodiff, Dispatch, Flex,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::FloatTensor,
    },
    tensor::{Tensor, activation::silu},
};

use crate::{
    flex::{contiguous, elements, float_tensor, is_native_f32},
    parts::{by_parts, two_by_parts},
    vector::{sigmoid, vectorized},
};

/// Elements per task: enough work to be worth handing to another thread.
const CHUNK: usize = 1 << 14;

/// `silu(gate) * up`, elementwise.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    if is_native_f32(&gate.device(), gate.dtype()) {
        Tensor::from_dispatch(Dispatch::gate(gate.into_dispatch(), up.into_dispatch()))
    } else {
        reference(gate, up)
    }
}

fn reference<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    silu(gate) * up
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait SwigluOps: burn::backend::Backend {
    fn gate(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// The gradients of [`SwigluOps`], on backends without autodiff.
pub(crate) trait SwigluGrad: burn::backend::Backend {
    fn gate_grad(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl SwigluOps for Flex {
    fn gate(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let (gate, up) = (contiguous(gate), contiguous(up));
        let shape = gate.layout().shape().clone();
        let (gate, up) = (elements::<f32>(&gate), elements::<f32>(&up));
        let (out, _) = by_parts(gate.len(), CHUNK, |part, out: &mut [f32]| {
            let part = part * CHUNK..part * CHUNK + out.len();
            vectorized!(self::gate(&gate[part.clone()], &up[part.clone()], out));
        });
        float_tensor(out, shape)
    }
}

impl SwigluGrad for Flex {
    fn gate_grad(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (grad, gate, up) = (contiguous(grad), contiguous(gate), contiguous(up));
        let shape = gate.layout().shape().clone();
        let (grad, gate, up) = (
            elements::<f32>(&grad),
            elements::<f32>(&gate),
            elements::<f32>(&up),
        );
        let fill = |part: usize, grad_gate: &mut [f32], grad_up: &mut [f32]| {
            let part = part * CHUNK..part * CHUNK + grad_up.len();
            grad_up.copy_from_slice(&grad[part.clone()]);
            let inputs = gate[part.clone()].iter().zip(&up[part]);
            vectorized!({
                let outputs = grad_gate.iter_mut().zip(&mut *grad_up);
                for ((&gate, &up), (grad_gate, grad_up)) in inputs.clone().zip(outputs) {
                    [_, *grad_gate, *grad_up] = gate_and_grads(gate, up, *grad_up);
                }
            });
        };
        let [grad_gate, grad_up] = two_by_parts(gate.len(), CHUNK, fill);
        (
            float_tensor(grad_gate, shape.clone()),
            float_tensor(grad_up, shape),
        )
    }
}

/// `out = silu(gate) * up`, in a loop that [`vectorized`] compiles.
#[inline(always)]
pub(crate) fn gate(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate * sigmoid(gate) * up;
    }
}

/// `silu(gate) * up` and its gradients with respect to both, given that of the result.
#[inline(always)]
pub(crate) fn gate_and_grads(gate: f32, up: f32, grad: f32) -> [f32; 3] {
    let s = sigmoid(gate);
    let silu = gate * s;
    [
        silu * up,
        grad * up * s * (1.0 + gate * (1.0 - s)),
        grad * silu,
    ]
}

#[derive(Debug)]
struct Gate;

impl<B: SwigluOps + SwigluGrad> Backward<B, 2> for Gate {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (gate, up) = ops.state;
        let (grad_gate, grad_up) = B::gate_grad(grad, gate, up);
        for (node, grad) in ops.parents.into_iter().zip([grad_gate, grad_up]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

impl<B: SwigluOps + SwigluGrad, C: CheckpointStrategy> SwigluOps for Autodiff<B, C> {
    fn gate(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        match Gate
            .prepare::<C>([gate.node(), up.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (gate, up) = (gate.into_primitive(), up.into_primitive());
                let output = B::gate(gate.clone(), up.clone());
                prep.finish((gate, up), output)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::gate(gate.into_primitive(), up.into_primitive()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;

    #[test]
    fn native_agrees_with_reference() {
        let device = Device::flex().autodiff();
        // More than one chunk, and a tail.
        let random = || {
            Tensor::<2>::random([3, 7001], Distribution::Normal(0.0, 4.0), &device).require_grad()
        };
        let (gate, up) = (random(), random());
        let run = |out: Tensor<2>| {
            let grads = out.clone().powi_scalar(2).sum().backward();
            [
                out.into_data(),
                gate.grad(&grads).unwrap().into_data(),
                up.grad(&grads).unwrap().into_data(),
            ]
        };
        let native = run(swiglu(gate.clone(), up.clone()));
        let expected = run(reference(gate.clone(), up.clone()));
        for (native, expected) in native.iter().zip(&expected) {
            native.assert_approx_eq(expected, Tolerance::<f32>::rel_abs(1e-5, 1e-5));
        }
    }
}
