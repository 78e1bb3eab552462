//! Root mean square normalisation over the last dimension.
//!
//! Native on Flex for f32: one pass per row forward and one backward. Memory bound: under gradient checkpointing the
//! backward pass computes the result again.

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
    tensor::Tensor,
};

use crate::{
    flex::{contiguous, dims, elements, float_tensor, is_native_f32},
    parts::by_parts,
    vector::{sum, vectorized},
};

/// Rows per task. The weight's gradient is summed per task and then over tasks in order, so it does not depend on
/// the number of threads.
const ROWS: usize = 64;

/// `x / sqrt(mean(x^2) + epsilon) * weight`.
///
/// # Shapes
/// - `x`: `[..., D]`, as the result
/// - `weight`: `[D]`
pub fn rms_norm<const N: usize>(x: Tensor<N>, weight: Tensor<1>, epsilon: f64) -> Tensor<N> {
    if is_native_f32(&x.device(), x.dtype()) {
        let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
        Tensor::from_dispatch(Dispatch::normalise(x, weight, epsilon))
    } else {
        reference(x, weight, epsilon)
    }
}

fn reference<const N: usize>(x: Tensor<N>, weight: Tensor<1>, epsilon: f64) -> Tensor<N> {
    let mean_square = x.clone().square().mean_dim(N - 1);
    x * (mean_square + epsilon).sqrt().recip() * weight.unsqueeze()
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait RmsNormOps: burn::backend::Backend {
    fn normalise(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self>;
}

/// The gradients of [`RmsNormOps`], on backends without autodiff.
pub(crate) trait RmsNormGrad: burn::backend::Backend {
    /// With respect to `x` and to `weight`.
    fn normalise_grad(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl RmsNormOps for Flex {
    fn normalise(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let (x, weight) = (contiguous(x), contiguous(weight));
        let shape = x.layout().shape().clone();
        let (x, weight) = (elements::<f32>(&x), elements::<f32>(&weight));
        let width = weight.len();
        let size = ROWS * width;
        let (out, _) = by_parts(x.len(), size, |part, out: &mut [f32]| {
            let x = &x[part * size..][..out.len()];
            vectorized!({
                for (out, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                    let scale = inverse_rms(x, epsilon);
                    for i in 0..width {
                        out[i] = x[i] * scale * weight[i];
                    }
                }
            });
        });
        float_tensor(out, shape)
    }
}

impl RmsNormGrad for Flex {
    /// With r = 1 / sqrt(mean(x^2) + epsilon) and y = x r w:
    /// dx = r (g w) - x r^3 / D sum(g w x), dw = sum over rows of g x r.
    fn normalise_grad(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        epsilon: f64,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [width] = dims(&weight);
        let (grad, x, weight) = (contiguous(grad), contiguous(x), contiguous(weight));
        let shape = x.layout().shape().clone();
        let (grad, x, weight) = (
            elements::<f32>(&grad),
            elements::<f32>(&x),
            elements::<f32>(&weight),
        );
        let size = ROWS * width;
        let (grad_x, partial) = by_parts(x.len(), size, |part, grad_x: &mut [f32]| {
            let (grad, x) = (&grad[part * size..], &x[part * size..]);
            let mut grad_weight = vec![0f32; width];
            vectorized!({
                let rows = grad.chunks_exact(width).zip(x.chunks_exact(width));
                for (grad_x, (grad, x)) in grad_x.chunks_exact_mut(width).zip(rows) {
                    let scale = inverse_rms(x, epsilon);
                    for i in 0..width {
                        grad_x[i] = grad[i] * weight[i];
                        grad_weight[i] += grad[i] * x[i] * scale;
                    }
                    let along = crate::vector::dot(grad_x, x) * scale * scale / width as f32;
                    for i in 0..width {
                        grad_x[i] = scale * (grad_x[i] - x[i] * along);
                    }
                }
            });
            grad_weight
        });
        let mut grad_weight = vec![0f32; width];
        for part in partial {
            for (sum, part) in grad_weight.iter_mut().zip(part) {
                *sum += part;
            }
        }
        (
            float_tensor(grad_x, shape),
            float_tensor(grad_weight, [width]),
        )
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f64) -> f32 {
    let mean = sum(x, |x| x * x) / x.len() as f32;
    1.0 / (mean + epsilon as f32).sqrt()
}

#[derive(Debug)]
struct Normalise;

impl<B: RmsNormOps + RmsNormGrad> Backward<B, 2> for Normalise {
    type State = (NodeId, NodeId, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, kept: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (x, weight, epsilon) = ops.state;
        let (x, weight) = (
            kept.retrieve_node_output(x),
            kept.retrieve_node_output(weight),
        );
        let (grad_x, grad_weight) = B::normalise_grad(grad, x, weight, epsilon);
        for (node, grad) in ops.parents.into_iter().zip([grad_x, grad_weight]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// The forward pass in the backward pass.
#[derive(Debug)]
struct Again<B> {
    x: NodeId,
    weight: NodeId,
    epsilon: f64,
    backend: PhantomData<B>,
}

impl<B: RmsNormOps> RetroForward for Again<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let (x, weight) = (states.get_state(&self.x), states.get_state(&self.weight));
        states.save(out, B::normalise(x, weight, self.epsilon));
    }
}

impl<B: RmsNormOps + RmsNormGrad, C: CheckpointStrategy> RmsNormOps for Autodiff<B, C> {
    fn normalise(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        epsilon: f64,
    ) -> FloatTensor<Self> {
        let again = Again::<B> {
            x: x.id(),
            weight: weight.id(),
            epsilon,
            backend: PhantomData,
        };
        match Normalise
            .prepare::<C>([x.node(), weight.node()])
            .memory_bound()
            .retro_forward(again)
            .parents([&x, &weight])
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&weight), epsilon);
                let (x, weight) = (x.into_primitive(), weight.into_primitive());
                prep.finish(state, B::normalise(x, weight, epsilon))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::normalise(
                x.into_primitive(),
                weight.into_primitive(),
                epsilon,
            )),
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
        for (rows, width) in [(1, 1), (5, 17), (131, 48)] {
            let random = |rows, width| {
                Tensor::<2>::random([rows, width], Distribution::Normal(0.0, 2.0), &device)
            };
            let x = random(rows, width).require_grad();
            let weight = random(1, width).reshape([width]).detach().require_grad();
            let mask = random(rows, width);
            let run = |out: Tensor<2>| {
                let grads = (out.clone() * mask.clone()).sum().backward();
                [
                    out.into_data(),
                    x.grad(&grads).unwrap().into_data(),
                    weight.grad(&grads).unwrap().into_data(),
                ]
            };
            let native = run(rms_norm(x.clone(), weight.clone(), 0.01));
            let expected = run(reference(x.clone(), weight.clone(), 0.01));
            for (native, expected) in native.iter().zip(&expected) {
                native.assert_approx_eq(expected, Tolerance::<f32>::rel_abs(1e-5, 2e-5));
            }
        }
    }
}
