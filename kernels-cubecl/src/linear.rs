//! The product of activations with a matrix of weights.
//!
//! Native on Flex for f32 and f64: rows spread over the threads, and results that are not filled with zeros first. Under
//! gradient checkpointing the backward pass computes the product again: who asks for that has a reason.

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
    flex::{FlexFloat, Scalar, ascending, dims, float_tensor, is_native, matrix, with_scalar},
    gemm::product,
    weight_grad::{Lift, Weight},
};

/// `x W`.
///
/// # Shapes
/// - `x`: `[M, K]`, `weight`: `[K, N]`
/// - result: `[M, N]`
///
/// # Panics
/// If inner sizes differ, or types.
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    if !is_native(&x.device(), x.dtype()) {
        return x.matmul(weight);
    }
    assert!(
        x.dims()[1] == weight.dims()[0] && x.dtype() == weight.dtype(),
        "x {:?} in {:?} with a weight {:?} in {:?}",
        x.dims(),
        x.dtype(),
        weight.dims(),
        weight.dtype()
    );
    let (x, weight) = (x.into_dispatch(), weight.into_dispatch());
    Tensor::from_dispatch(Dispatch::linear_product(x, weight))
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait LinearOps: burn::backend::Backend {
    fn linear_product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// The gradients of [`LinearOps`], on backends without autodiff.
pub(crate) trait LinearGrad: Lift {
    /// `dx = dy W^T`
    fn linear_input_grad(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;

    /// `dW = x^T dy`
    fn linear_weight_grad(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl LinearOps for Flex {
    fn linear_product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        with_scalar!(x, T => multiply::<T>(x, weight))
    }
}

impl LinearGrad for Flex {
    fn linear_input_grad(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        with_scalar!(grad, T => multiply::<T>(grad, weight.transpose(0, 1)))
    }

    fn linear_weight_grad(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        with_scalar!(x, T => multiply::<T>(x.transpose(0, 1), grad))
    }
}

fn multiply<T: Scalar>(a: FlexFloat, b: FlexFloat) -> FlexFloat {
    let (a, b) = (ascending(a), ascending(b));
    let ([rows, _], [_, columns]) = (dims(&a), dims(&b));
    float_tensor(product::<T>(matrix(&a), matrix(&b)), [rows, columns])
}

#[derive(Debug)]
struct LinearProduct;

impl<B: LinearOps + LinearGrad> Backward<B, 2> for LinearProduct {
    /// Each where the other has a gradient.
    type State = [Option<NodeId>; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, kept: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let weight_grad = Weight::of(&ops, 1);
        let [x, weight] = ops.state;
        let [x_node, _] = ops.parents;
        if let (Some(weight_grad), Some(x)) = (weight_grad, x) {
            let (x, grad) = (kept.retrieve_node_output(x), grad.clone());
            weight_grad.register::<B>(grads, || B::linear_weight_grad(x, grad));
        }
        if let (Some(node), Some(weight)) = (x_node, weight) {
            let weight = kept.retrieve_node_output(weight);
            grads.register::<B>(node.id, B::linear_input_grad(grad, weight));
        }
    }
}

/// The forward pass in the backward pass.
#[derive(Debug)]
struct Again<B> {
    x: NodeId,
    weight: NodeId,
    backend: PhantomData<B>,
}

impl<B: LinearOps> RetroForward for Again<B> {
    fn forward(&self, states: &mut BackwardStates, out: NodeId) {
        let (x, weight) = (states.get_state(&self.x), states.get_state(&self.weight));
        states.save(out, B::linear_product(x, weight));
    }
}

impl<B: LinearOps + LinearGrad, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn linear_product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let again = Again::<B> {
            x: x.id(),
            weight: weight.id(),
            backend: PhantomData,
        };
        match LinearProduct
            .prepare::<C>([x.node(), weight.node()])
            .memory_bound()
            .retro_forward(again)
            .parents([&x, &weight])
            .stateful()
        {
            OpsKind::Tracked(mut prep) => {
                let kept = [
                    weight.is_tracked().then(|| prep.checkpoint(&x)),
                    x.is_tracked().then(|| prep.checkpoint(&weight)),
                ];
                let (x, weight) = (x.into_primitive(), weight.into_primitive());
                prep.finish(kept, B::linear_product(x, weight))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::linear_product(
                x.into_primitive(),
                weight.into_primitive(),
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
        // One row, few rows and columns, and enough of all that threads share the work; weights as they are, and a view,
        // as those of a tied output head are; in the last, views whose columns are so far apart that they are copied.
        let sizes = [
            [1, 5, 3],
            [7, 1, 1],
            [300, 70, 129],
            [2, 600, 900],
            [12, 130, 520],
            [15, 3, 40],
            [200, 600, 70],
        ];
        for ([m, k, n], tied) in sizes
            .into_iter()
            .flat_map(|sizes| [(sizes, false), (sizes, true)])
        {
            let random = |shape: [usize; 2]| {
                Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
            };
            let stored = if tied { [n, k] } else { [k, n] };
            let (x, weight, mask) = (random([m, k]), random(stored), random([m, n]).detach());
            let run = |multiply: fn(Tensor<2>, Tensor<2>) -> Tensor<2>| {
                let view = weight.clone();
                let y = multiply(x.clone(), if tied { view.transpose() } else { view });
                let grads = (y.clone() * mask.clone()).sum().backward();
                let grads = [&x, &weight].map(|of| of.grad(&grads).expect("reached").into_data());
                (y.into_data(), grads)
            };
            let (found, found_grads) = run(linear);
            let (expected, expected_grads) = run(Tensor::matmul);
            let close = Tolerance::<f32>::rel_abs(1e-5, 1e-4);
            found.assert_approx_eq(&expected, close);
            for (found, expected) in found_grads.iter().zip(&expected_grads) {
                found.assert_approx_eq(expected, close);
            }
        }
    }

    #[test]
    fn flipped_matrices_are_multiplied_as_others() {
        let of = |values: [[f32; 2]; 2]| Tensor::<2>::from_data(values, &Device::flex());
        let (x, weight) = (of([[1.0, 2.0], [3.0, 4.0]]), of([[5.0, 6.0], [7.0, 8.0]]));
        let found = linear(x.flip([0]), weight.flip([1])).into_data();
        assert_eq!(found, of([[50.0, 43.0], [22.0, 19.0]]).into_data());
    }

    #[test]
    fn what_needs_no_gradient_has_none() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::ones([2, 3], &device);
        let weight = Tensor::<2>::ones([3, 2], &device).require_grad();
        let grads = linear(x.clone(), weight.clone()).sum().backward();
        assert!(x.grad(&grads).is_none() && weight.grad(&grads).is_some());
    }
}
