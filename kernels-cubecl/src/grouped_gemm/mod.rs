//! One matrix product per expert over contiguous segments of rows.

mod backward;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod flex;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) mod kernel;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) mod launch;
pub(crate) mod reference;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod tensor_cores;
#[cfg(test)]
mod tests;

use burn::{
    backend::{
        Dispatch, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};

/// Multiplies segment `e` of the rows of `x` with matrix `e` of `weights`: `y_e = x_e W_e`.
///
/// Segments follow each other in order of `e`, `counts[e]` rows each; empty segments are allowed. Rows behind the last
/// segment are of no matrix: zero in the result. Native on Flex for f32 and f64, and on CubeCL devices for f32, f16 and
/// bf16 with sums in single precision, where `counts` stay on the device; the reference reads them on the host. On CUDA
/// devices of compute capability 8.0 and later bf16 is multiplied by tensor cores if K and N are multiples of eight and
/// both operands start at a multiple of 16 bytes, and so are the products of its gradients.
///
/// # Shapes
/// - `x`: `[S, K]`, `weights`: `[E, K, N]`, `counts`: `[E]` with a sum of at most S
/// - result: `[S, N]`
///
/// # Panics
/// If sizes do not fit each other, or types.
pub fn grouped_matmul(x: Tensor<2>, weights: Tensor<3>, counts: Tensor<1, Int>) -> Tensor<2> {
    let ([_, k], [experts, inner, _], [segments]) = (x.dims(), weights.dims(), counts.dims());
    assert!(
        k == inner && experts == segments,
        "x {:?}, weights {:?} and counts {:?} do not fit",
        x.dims(),
        weights.dims(),
        counts.dims()
    );
    assert!(
        x.dtype() == weights.dtype(),
        "x in {:?} with weights in {:?}",
        x.dtype(),
        weights.dtype()
    );
    let (device, dtype) = (x.device(), x.dtype());
    let on_cube = experts <= MOST_EXPERTS && crate::cube::is_native(&device, dtype);
    if on_cube || crate::flex::is_native(&device, dtype) {
        Tensor::from_dispatch(Dispatch::segment_matmul(
            x.into_dispatch(),
            weights.into_dispatch(),
            counts.into_dispatch(),
        ))
    } else {
        reference::grouped_matmul(x, weights, counts)
    }
}

/// What the kernels for CubeCL devices serve: the sizes of all segments are in shared memory, of which every device has
/// 16 KiB.
const MOST_EXPERTS: usize = 4096;

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub(crate) trait GroupedGemmOps: burn::backend::Backend {
    fn segment_matmul(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// The gradients of [`GroupedGemmOps`], on backends without autodiff.
pub(crate) trait GroupedGemmGrad: crate::weight_grad::Lift {
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
