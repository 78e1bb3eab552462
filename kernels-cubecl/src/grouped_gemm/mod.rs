//! One matrix product per expert over contiguous segments of rows.

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

/// Multiplies segment `e` of the rows of `x` with matrix `e` of `weights`: `y_e = x_e W_e`.
///
/// Segments follow each other in order of `e`, `counts[e]` rows each; empty segments are allowed. Native on Flex
/// for f32 and f64; the reference reads `counts` on the host.
///
/// # Shapes
/// - `x`: `[S, K]`, `weights`: `[E, K, N]`, `counts`: `[E]` with sum S
/// - result: `[S, N]`
///
/// # Panics
/// If sizes do not fit each other.
pub fn grouped_matmul(x: Tensor<2>, weights: Tensor<3>, counts: Tensor<1, Int>) -> Tensor<2> {
    let ([_, k], [experts, inner, _], [segments]) = (x.dims(), weights.dims(), counts.dims());
    assert!(
        k == inner && experts == segments,
        "x {:?}, weights {:?} and counts {:?} do not fit",
        x.dims(),
        weights.dims(),
        counts.dims()
    );
    if crate::flex::is_native(&x.device(), x.dtype()) {
        Tensor::from_dispatch(Dispatch::segment_matmul(
            x.into_dispatch(),
            weights.into_dispatch(),
            counts.into_dispatch(),
        ))
    } else {
        reference::grouped_matmul(x, weights, counts)
    }
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait GroupedGemmOps: burn::backend::Backend {
    fn segment_matmul(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// The gradients of [`GroupedGemmOps`], on backends without autodiff.
pub(crate) trait GroupedGemmGrad: burn::backend::Backend {
    /// The gradient with respect to `x`: `dx_e = dy_e W_e^T`.
    fn segment_matmul_input_grad(
        grad: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    /// The gradient with respect to `weights`: `dW_e = x_e^T dy_e`, zero for an empty segment.
    fn segment_matmul_weight_grad(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// The native version and its hand-written backward against the reference and Burn's autodiff.
        #[test]
        fn native_agrees_with_reference(
            counts in prop::collection::vec(prop_oneof![Just(0i32), 1i32..40], 1..6),
            k in 1usize..40,
            n in 1usize..40,
        ) {
            let device = Device::flex().autodiff();
            let rows = counts.iter().sum::<i32>() as usize;
            prop_assume!(rows > 0);
            let experts = counts.len();
            let x = Tensor::<2>::random([rows, k], Distribution::Default, &device).require_grad();
            let w = Tensor::<3>::random([experts, k, n], Distribution::Default, &device).require_grad();
            let mask = Tensor::<2>::random([rows, n], Distribution::Default, &device);
            let counts = Tensor::<1, Int>::from_data(TensorData::new(counts, [experts]), &device);
            let run = |native: bool| {
                let y = if native {
                    grouped_matmul(x.clone(), w.clone(), counts.clone())
                } else {
                    reference::grouped_matmul(x.clone(), w.clone(), counts.clone())
                };
                let grads = (y.clone() * mask.clone()).sum().backward();
                (y.into_data(), x.grad(&grads).unwrap().into_data(), w.grad(&grads).unwrap().into_data())
            };
            let (native, reference) = (run(true), run(false));
            // Sums of at most 200 products of numbers below one, in f32.
            let close = Tolerance::<f32>::absolute(1e-4);
            native.0.assert_approx_eq(&reference.0, close);
            native.1.assert_approx_eq(&reference.1, close);
            native.2.assert_approx_eq(&reference.2, close);
        }
    }
}
