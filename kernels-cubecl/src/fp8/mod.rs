//! FP8 arithmetic as the report trains with it (section 3.3): E4M3 numbers with one scale per tile of 1 x 128
//! (activations, gradients) or 128 x 128 (weights), and matrix products whose sums are promoted to single precision
//! every 128 elements.
//!
//! [`linear`] is what a layer calls: single precision in and out, quantised inside, all three of its products in FP8.
//! [`e4m3`] and [`tiles`] are the same numbers on slices, for files.

pub mod ablation;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod cube;
pub mod e4m3;
mod flex;
mod gated;
mod grouped;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) mod kernel;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod launch;
mod linear;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub mod native;
mod reference;
#[cfg(test)]
mod tests;
pub mod tiles;

use burn::{
    backend::{
        Dispatch, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, Device, Int, Tensor, TensorData},
};

use crate::cube::is_native_f32_or_flex;
pub use gated::gated_grouped_linear;
pub use grouped::{grouped_linear, segment_tile};
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) use launch::capability;
pub use linear::linear;
pub use tiles::{ScaleFormat, TILE, Tile};

/// A matrix in E4M3: an element is its code's number times its tile's scale.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// Codes, 0 to 255, in bytes where the device has them. `[R, C]`
    pub codes: Tensor<2, Int>,
    /// One per tile. `[R, ceil(C / 128)]`, or `[ceil(R / 128), ceil(C / 128)]` for blocks
    pub scales: Tensor<2>,
    /// What shares a scale.
    pub tile: Tile,
}

impl Quantized {
    /// A matrix of the given codes and scales, row-major.
    ///
    /// # Panics
    /// If their numbers are not those of a matrix of `shape`.
    pub fn new(
        codes: Vec<u8>,
        scales: Vec<f32>,
        shape: [usize; 2],
        tile: Tile,
        device: &Device,
    ) -> Self {
        let dtype = code_dtype(device);
        let codes = TensorData::new(codes, shape).convert_dtype(dtype);
        let scales = TensorData::new(scales, tile.scale_shape(shape));
        Self {
            codes: Tensor::from_data(codes, (device, dtype)),
            scales: Tensor::from_data(scales, (device, DType::F32)),
            tile,
        }
    }
}

/// Bytes where the device has them.
fn code_dtype(device: &Device) -> DType {
    if device.supports_dtype(DType::U8) {
        DType::U8
    } else {
        DType::I32
    }
}

/// Quantises a matrix.
///
/// A tile's scale is its largest magnitude over 448 ([`Tile::scale`] has the rules for zeros and for the formats); codes
/// are those nearest to `x / scale`, the even one of two. Tiles at the edges are smaller. A tile with an element that is
/// not finite has the scale NaN and NaN for every code, so that the fault is seen in all that is computed of it.
///
/// Not differentiable: a constant of the backward pass. Native for f32 on Flex and on CubeCL devices.
///
/// # Shapes
/// - `x`: `[R, C]`
///
/// # Panics
/// If `x` has no element.
pub fn quantize(x: Tensor<2>, tile: Tile, format: ScaleFormat) -> Quantized {
    assert!(
        x.shape().num_elements() > 0,
        "a matrix without elements has no tiles"
    );
    let x = x.detach();
    let (codes, scales) = if is_native_f32_or_flex(&x.device(), x.dtype()) {
        let (codes, scales) = Dispatch::fp8_quantize(x.into_dispatch(), tile, format);
        (Tensor::from_dispatch(codes), Tensor::from_dispatch(scales))
    } else {
        reference::quantize(x, tile, format)
    };
    Quantized {
        codes,
        scales,
        tile,
    }
}

/// The product `a b^T`, accumulated in single precision: the sum over each 128 of the inner size is multiplied with both
/// scales and added to the result (report section 3.3.2, figure 7b).
///
/// Not differentiable. Native on Flex; on CUDA one kernel for compute capability 9.0 and one for 8.9 and 12, and a panic
/// that says so on others.
///
/// # Shapes
/// - `a`: `[M, K]` in rows' tiles, `b`: `[N, K]` in rows' tiles or blocks
/// - result: `[M, N]`, single precision
///
/// # Panics
/// If inner sizes differ or `a` is in blocks.
pub fn matmul_nt(a: &Quantized, b: &Quantized) -> Tensor<2> {
    let ([_, inner], [_, other]) = (a.codes.dims(), b.codes.dims());
    assert_eq!(inner, other, "inner sizes differ");
    assert_eq!(
        a.tile,
        Tile::Row,
        "the left matrix is quantised in rows' tiles"
    );
    if is_native_f32_or_flex(&a.scales.device(), a.scales.dtype()) {
        Tensor::from_dispatch(Dispatch::fp8_matmul_nt(
            a.codes.clone().into_dispatch(),
            a.scales.clone().into_dispatch(),
            b.codes.clone().into_dispatch(),
            b.scales.clone().into_dispatch(),
            b.tile,
        ))
    } else {
        reference::matmul_nt(a, b)
    }
}

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub(crate) trait Fp8Ops: burn::backend::Backend {
    fn fp8_quantize(
        x: FloatTensor<Self>,
        tile: Tile,
        format: ScaleFormat,
    ) -> (IntTensor<Self>, FloatTensor<Self>);

    fn fp8_matmul_nt(
        a_codes: IntTensor<Self>,
        a_scales: FloatTensor<Self>,
        b_codes: IntTensor<Self>,
        b_scales: FloatTensor<Self>,
        b_tile: Tile,
    ) -> FloatTensor<Self>;

    /// Differentiable.
    fn fp8_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self>;
}
