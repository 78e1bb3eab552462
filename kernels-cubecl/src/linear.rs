//! The product of activations with a matrix of weights.
//!
//! Native on Flex for f32 and f64: rows spread over the threads, and results that are not filled with zeros first.

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
    tensor::Tensor,
};

use crate::{
    flex::{FlexFloat, Scalar, dims, float_tensor, is_native, matrix, with_scalar},
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
        with_scalar!(x, T => multiply::<T>(&x, &weight))
    }
}

impl LinearGrad for Flex {
    fn linear_input_grad(grad: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        with_scalar!(grad, T => multiply::<T>(&grad, &weight.transpose(0, 1)))
    }

    fn linear_weight_grad(x: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        with_scalar!(x, T => multiply::<T>(&x.transpose(0, 1), &grad))
    }
}

fn multiply<T: Scalar>(a: &FlexFloat, b: &FlexFloat) -> FlexFloat {
    let ([rows, _], [_, columns]) = (dims(a), dims(b));
    float_tensor(product::<T>(matrix(a), matrix(b)), [rows, columns])
}

#[derive(Debug)]
struct LinearProduct;

impl<B: LinearOps + LinearGrad> Backward<B, 2> for LinearProduct {
    type State = (Option<FloatTensor<B>>, Option<FloatTensor<B>>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let weight_grad = Weight::of(&ops);
        let (x, weight) = ops.state;
        let [x_node, _] = ops.parents;
        if let (Some(weight_grad), Some(x)) = (weight_grad, x) {
            let grad = grad.clone();
            weight_grad.register::<B>(grads, || B::linear_weight_grad(x, grad));
        }
        if let (Some(node), Some(weight)) = (x_node, weight) {
            grads.register::<B>(node.id, B::linear_input_grad(grad, weight));
        }
    }
}

impl<B: LinearOps + LinearGrad, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn linear_product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let tracked = [x.is_tracked(), weight.is_tracked()];
        match LinearProduct
            .prepare::<C>([x.node(), weight.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (x, weight) = (x.into_primitive(), weight.into_primitive());
                let kept = (
                    tracked[1].then(|| x.clone()),
                    tracked[0].then(|| weight.clone()),
                );
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
        // One row, few columns, and enough of all that threads share the work.
        for [m, k, n] in [[1, 5, 3], [7, 1, 1], [300, 70, 129], [2, 600, 900]] {
            let random = |shape: [usize; 2]| {
                Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
            };
            let (x, weight, mask) = (random([m, k]), random([n, k]), random([m, n]).detach());
            let run = |multiply: fn(Tensor<2>, Tensor<2>) -> Tensor<2>| {
                // A view, as the weights of a tied output head are.
                let y = multiply(x.clone(), weight.clone().transpose());
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
    fn what_needs_no_gradient_has_none() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::ones([2, 3], &device);
        let weight = Tensor::<2>::ones([3, 2], &device).require_grad();
        let grads = linear(x.clone(), weight.clone()).sum().backward();
        assert!(x.grad(&grads).is_none() && weight.grad(&grads).is_some());
    }
}
