//! Moving tokens into expert order and back.

mod backward;
mod flex;
mod reference;

use burn::{
    backend::{
        Dispatch, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};

/// Where each of the `T * K` (token, choice) pairs stands when they are sorted by expert.
///
/// Pairs of the same expert keep their order, so results do not depend on the device.
#[derive(Clone, Debug)]
pub struct Permutation {
    /// The pair `token * K + choice` at each row in expert order. `[S]`, S = T K.
    pub order: Tensor<1, Int>,
    /// The row in expert order of each pair; the inverse of `order`. `[T, K]`
    pub slots: Tensor<2, Int>,
    /// Rows of each expert, its load. `[E]`
    pub counts: Tensor<1, Int>,
}

impl Permutation {
    /// Sorts pairs by expert. Native on Flex.
    ///
    /// # Shapes
    /// - `chosen`: `[T, K]`, expert indices below `experts`
    pub fn by_expert(chosen: Tensor<2, Int>, experts: usize) -> Self {
        let dims = chosen.dims();
        let (order, slots, counts) = if crate::flex::is_flex(&chosen.device()) {
            let (order, slots, counts) = Dispatch::sort_by_expert(chosen.into_dispatch(), experts);
            (
                Tensor::from_dispatch(order),
                Tensor::<1, Int>::from_dispatch(slots),
                Tensor::from_dispatch(counts),
            )
        } else {
            reference::sort_by_expert(chosen, experts)
        };
        Self {
            order,
            slots: slots.reshape(dims),
            counts,
        }
    }

    /// Tokens and choices per token, `[T, K]`.
    pub fn dims(&self) -> [usize; 2] {
        self.slots.dims()
    }
}

/// Copies each token's row to its places in expert order. Native on Flex for f32 and f64.
///
/// # Shapes
/// - `x`: `[T, D]`
/// - result: `[S, D]`
pub fn permute(x: Tensor<2>, permutation: &Permutation) -> Tensor<2> {
    if crate::flex::is_native(&x.device(), x.dtype()) {
        Tensor::from_dispatch(Dispatch::permute_rows(
            x.into_dispatch(),
            permutation.order.clone().into_dispatch(),
            permutation.slots.clone().into_dispatch(),
        ))
    } else {
        reference::permute(x, permutation)
    }
}

/// Sums each token's rows back from expert order, weighted: the inverse movement of [`permute`].
/// Native on Flex for f32 and f64.
///
/// # Shapes
/// - `y`: `[S, D]`
/// - `weights`: `[T, K]`
/// - result: `[T, D]`
pub fn combine(y: Tensor<2>, weights: Tensor<2>, permutation: &Permutation) -> Tensor<2> {
    if crate::flex::is_native(&y.device(), y.dtype()) {
        Tensor::from_dispatch(Dispatch::combine_rows(
            y.into_dispatch(),
            weights.into_dispatch(),
            permutation.order.clone().into_dispatch(),
            permutation.slots.clone().into_dispatch(),
        ))
    } else {
        reference::combine(y, weights, permutation)
    }
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait PermuteOps: burn::backend::Backend {
    fn sort_by_expert(
        chosen: IntTensor<Self>,
        experts: usize,
    ) -> (IntTensor<Self>, IntTensor<Self>, IntTensor<Self>);

    fn permute_rows(
        x: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    fn combine_rows(
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// The gradients of [`PermuteOps`], on backends without autodiff.
pub(crate) trait PermuteGrad: burn::backend::Backend {
    /// The gradient of `permute_rows`: each token's sum of its rows' gradients.
    fn permute_rows_grad(grad: FloatTensor<Self>, slots: IntTensor<Self>) -> FloatTensor<Self>;

    /// The gradients of `combine_rows` with respect to `y` and to `weights`.
    fn combine_rows_grad(
        grad: FloatTensor<Self>,
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};
    use proptest::prelude::*;

    use super::*;

    fn chosen(values: &[i32], k: usize) -> Tensor<2, Int> {
        Tensor::from_data(
            TensorData::new(values.to_vec(), [values.len() / k, k]),
            &Device::flex().autodiff(),
        )
    }

    fn list<const D: usize>(tensor: Tensor<D, Int>) -> Vec<i32> {
        tensor.into_data().iter::<i32>().collect()
    }

    #[test]
    fn sorts_pairs_by_expert_and_keeps_their_order() {
        let permutation = Permutation::by_expert(chosen(&[2, 0, 0, 2, 3, 2], 2), 5);
        assert_eq!(list(permutation.order), [1, 2, 0, 3, 5, 4]);
        assert_eq!(list(permutation.slots), [2, 0, 1, 3, 5, 4]);
        assert_eq!(list(permutation.counts), [2, 0, 3, 1, 0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// The native version and its hand-written backward against the reference and Burn's autodiff.
        #[test]
        fn native_agrees_with_reference(
            (experts, k, picks) in (1usize..6, 1usize..4).prop_flat_map(|(experts, k)| (
                Just(experts), Just(k), (1usize..9).prop_flat_map(move |tokens| {
                    prop::collection::vec(0..experts as i32, tokens * k)
                })
            ))
        ) {
            let device = Device::flex().autodiff();
            let pairs = chosen(&picks, k);
            let permutation = Permutation::by_expert(pairs.clone(), experts);
            let (order, slots, counts) = reference::sort_by_expert(pairs, experts);
            prop_assert_eq!(list(permutation.order.clone()), list(order));
            prop_assert_eq!(list(permutation.slots.clone()), list(slots));
            prop_assert_eq!(list(permutation.counts.clone()), list(counts));

            let [tokens, k] = permutation.dims();
            let random = |rows, columns| {
                Tensor::<2>::random([rows, columns], Distribution::Default, &device).require_grad()
            };
            let (x, weights, mask) = (random(tokens, 3), random(tokens, k), random(tokens, 3));
            let run = |native: bool| {
                let rows = if native { permute(x.clone(), &permutation) } else { reference::permute(x.clone(), &permutation) };
                let y = rows.clone() * rows;
                let out = if native {
                    combine(y, weights.clone(), &permutation)
                } else {
                    reference::combine(y, weights.clone(), &permutation)
                };
                let grads = (out.clone() * mask.clone().detach()).sum().backward();
                (out, x.grad(&grads).unwrap(), weights.grad(&grads).unwrap())
            };
            let (native, reference) = (run(true), run(false));
            let close = Tolerance::<f32>::absolute(1e-5);
            native.0.into_data().assert_approx_eq(&reference.0.into_data(), close);
            native.1.into_data().assert_approx_eq(&reference.1.into_data(), close);
            native.2.into_data().assert_approx_eq(&reference.2.into_data(), close);
        }
    }
}
