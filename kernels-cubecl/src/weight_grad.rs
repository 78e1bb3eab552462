//! Gradients of weights that are put off: W of a backward pass in two parts (report, section 3.2.1).
//!
//! What a linear layer's backward pass computes for its weight, `x^T dy`, is needed by nobody before the optimizer step.
//! Within [`put_off`] these products, of plain, grouped and FP8 layers, are kept with their factors instead of computed;
//! [`Products::compute`] does the same products later, so that the gradients are the same bit for bit.

use std::{cell::RefCell, collections::BTreeMap};

use burn::{
    backend::{
        Autodiff, Backend, Flex,
        autodiff::{NodeId, grads::Gradients, ops::Ops},
        tensor::FloatTensor,
    },
    tensor::{DispatchTensor, Tensor},
};

thread_local! {
    /// Backward passes run on the thread that asks for them. `None` outside [`put_off`].
    static KEPT: RefCell<Option<Vec<Product>>> = const { RefCell::new(None) };
}

/// A product that is not computed yet.
struct Product {
    /// The weight's node in the graph.
    weight: u64,
    compute: Box<dyn FnOnce() -> DispatchTensor>,
}

/// Products that are not computed yet, with what they need.
#[derive(Default)]
pub struct Products(Vec<Product>);

/// Gradients by the weight that they are of.
pub struct WeightGradients(BTreeMap<u64, DispatchTensor>);

/// Runs a backward pass whose products for weights are returned instead of computed. Its gradients lack those of these
/// weights, which must be parameters or their rounding by [`rounded_weight`](crate::bf16::rounded_weight).
pub fn put_off<R>(backward: impl FnOnce() -> R) -> (R, Products) {
    let outer = KEPT.replace(Some(Vec::new()));
    let result = backward();
    let kept = KEPT.replace(outer);
    (result, Products(kept.expect("set before")))
}

impl Products {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Does what was put off, in its order.
    pub fn compute(self) -> WeightGradients {
        let mut gradients = BTreeMap::new();
        for product in self.0 {
            let gradient = (product.compute)();
            let sum = match gradients.remove(&product.weight) {
                // As the backward pass adds them up. Sizes are of no interest to an addition.
                Some(earlier) => {
                    let [new, earlier] = [gradient, earlier].map(Tensor::<1>::from_dispatch);
                    (new + earlier).into_dispatch()
                }
                None => gradient,
            };
            gradients.insert(product.weight, sum);
        }
        WeightGradients(gradients)
    }
}

impl WeightGradients {
    /// The gradient of a parameter, if it is among them.
    pub fn remove<const D: usize>(&mut self, parameter: &Tensor<D>) -> Option<Tensor<D>> {
        let gradient = self.0.remove(&node(parameter)?)?;
        Some(Tensor::from_dispatch(gradient))
    }

    /// Whether all were taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The number of a tensor's node in the graph.
fn node<const D: usize>(tensor: &Tensor<D>) -> Option<u64> {
    let on_flex = tensor.clone().try_into_primitive::<Autodiff<Flex>>();
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    let on_flex = on_flex.map(|tensor| tensor.id()).or_else(|_| {
        let tensor = tensor.clone();
        let tensor = tensor.try_into_primitive::<Autodiff<burn::backend::Cube>>();
        tensor.map(|tensor| tensor.id())
    });
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    let on_flex = on_flex.map(|tensor| tensor.id());
    on_flex.ok().map(|id| id.value)
}

/// A backend whose results can be had as tensors of any backend.
pub(crate) trait Lift: Backend {
    fn lift(tensor: FloatTensor<Self>) -> DispatchTensor;
}

impl Lift for Flex {
    fn lift(tensor: FloatTensor<Self>) -> DispatchTensor {
        Tensor::<1>::from_primitive::<Self>(tensor).into_dispatch()
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
impl Lift for burn::backend::Cube {
    fn lift(tensor: FloatTensor<Self>) -> DispatchTensor {
        Tensor::<1>::from_primitive::<Self>(tensor).into_dispatch()
    }
}

/// A weight of a layer's backward pass.
#[derive(Clone, Copy)]
pub(crate) struct Weight {
    node: NodeId,
    /// Whether it is a parameter or a view of one.
    can_wait: bool,
}

impl Weight {
    /// The weight that is this input of the layer, if it has a gradient.
    pub(crate) fn of<S, const N: usize>(ops: &Ops<S, N>, input: usize) -> Option<Self> {
        ops.parents[input].as_ref().map(|weight| Self {
            node: weight.id,
            can_wait: match weight.parents.as_slice() {
                [] => true,
                [parent] => parent.is_leaf,
                _ => false,
            },
        })
    }

    /// Registers its gradient, or puts it off where that is asked for.
    pub(crate) fn register<B: Lift>(
        self,
        grads: &mut Gradients,
        compute: impl FnOnce() -> FloatTensor<B> + 'static,
    ) {
        let now = KEPT.with_borrow_mut(|kept| match kept {
            Some(kept) if self.can_wait => {
                kept.push(Product {
                    weight: self.node.value,
                    compute: Box::new(|| B::lift(compute())),
                });
                None
            }
            _ => Some(compute),
        });
        if let Some(compute) = now {
            grads.register::<B>(self.node, compute());
        }
    }
}

/// For an operation that hands the gradient of `result` on to `weight` as it is: products that were put off for the one
/// are from now on for the other. Whether there are any.
pub(crate) fn hand_on(result: NodeId, weight: NodeId) -> bool {
    KEPT.with_borrow_mut(|kept| {
        let mut found = false;
        for product in kept.iter_mut().flatten() {
            if product.weight == result.value {
                product.weight = weight.value;
                found = true;
            }
        }
        found
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Int, TensorData};

    use super::*;
    use crate::{
        bf16::rounded_weight,
        fp8::{self, ScaleFormat},
        grouped_gemm::grouped_matmul,
        linear::linear,
        permute::Permutation,
    };

    type Layers = fn(Tensor<2>, &[Tensor<2>; 2], &Tensor<3>) -> Tensor<2>;

    fn counts(device: &Device) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::from([3, 0, 2]), device)
    }

    /// Plain, then grouped, then plain with the first weight again.
    fn plain(x: Tensor<2>, [a, b]: &[Tensor<2>; 2], experts: &Tensor<3>) -> Tensor<2> {
        let counts = counts(&x.device());
        let y = grouped_matmul(linear(x, a.clone()), experts.clone(), counts);
        linear(linear(y, b.clone()), a.clone())
    }

    fn in_bf16(x: Tensor<2>, [a, b]: &[Tensor<2>; 2], experts: &Tensor<3>) -> Tensor<2> {
        let round = |weight: &Tensor<2>| rounded_weight(weight.clone());
        let counts = counts(&x.device());
        let y = grouped_matmul(linear(x, round(a)), rounded_weight(experts.clone()), counts);
        linear(linear(y, round(b)), round(a))
    }

    fn in_fp8(x: Tensor<2>, [a, b]: &[Tensor<2>; 2], experts: &Tensor<3>) -> Tensor<2> {
        let format = ScaleFormat::Float32;
        let chosen = TensorData::from([[0], [0], [0], [2], [2]]);
        let order = Permutation::by_expert(Tensor::from_data(chosen, &x.device()), 3);
        let y = fp8::grouped_linear(
            fp8::linear(x, a.clone(), format),
            experts.clone(),
            &order,
            format,
        );
        fp8::linear(fp8::linear(y, b.clone(), format), a.clone(), format)
    }

    #[test]
    fn what_was_put_off_is_the_same_bit_for_bit() {
        let device = Device::flex().autodiff();
        for layers in [plain as Layers, in_bf16, in_fp8] {
            let spread = Distribution::Normal(0.0, 1.0);
            let matrix = || Tensor::<2>::random([4, 4], spread, &device).require_grad();
            let (x, matrices) = (
                Tensor::<2>::random([5, 4], spread, &device).require_grad(),
                [matrix(), matrix()],
            );
            let experts = Tensor::<3>::random([3, 4, 4], spread, &device).require_grad();
            let loss = || {
                layers(x.clone(), &matrices, &experts)
                    .powf_scalar(2.0)
                    .sum()
            };

            let expected = loss().backward();
            let (found, products) = put_off(|| loss().backward());
            assert_eq!(products.len(), 4);
            let input = |grads| x.grad(grads).expect("reached").into_data();
            assert_eq!(input(&found), input(&expected));
            assert!(matrices.iter().all(|weight| weight.grad(&found).is_none()));
            assert!(experts.grad(&found).is_none());

            let mut gradients = products.compute();
            for weight in &matrices {
                let found = gradients.remove(weight).expect("put off");
                let expected = weight.grad(&expected).expect("reached");
                assert_eq!(found.into_data(), expected.into_data());
            }
            let found = gradients.remove(&experts).expect("put off");
            let expected = experts.grad(&expected).expect("reached");
            assert_eq!(found.into_data(), expected.into_data());
            assert!(gradients.is_empty());
        }
    }
}
