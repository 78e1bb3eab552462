//! FP8 arithmetic on CubeCL devices: quantisation by kernels everywhere, products by kernels on CUDA and by the reference
//! elsewhere.

use burn::{
    backend::{
        Cube,
        ops::FloatTensorOps,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor, activation::sigmoid},
};

use super::{
    Fp8Ops, Quantized,
    gated::{self, Fp8GatedOps, Gated},
    grouped::{Fp8GroupedGrad, Fp8GroupedOps, OneByOne},
    launch,
    linear::product,
    reference,
    tiles::{ScaleFormat, Tile},
};
use crate::{bf16::rounded, swiglu::swiglu};

impl Fp8Ops for Cube {
    fn fp8_quantize(
        x: FloatTensor<Self>,
        tile: Tile,
        format: ScaleFormat,
    ) -> (IntTensor<Self>, FloatTensor<Self>) {
        let quantized = match (tile, &x.meta.strides()[..]) {
            // A transposed view is read as it lies.
            (Tile::Row, &[1, across]) if across > 1 => {
                launch::quantize_transposed(Self::float_transpose(x), format)
            }
            _ => launch::quantize(x, tile, format),
        };
        quantized.unwrap_or_else(|problem| panic!("{problem}"))
    }

    fn fp8_matmul_nt(
        a_codes: IntTensor<Self>,
        a_scales: FloatTensor<Self>,
        b_codes: IntTensor<Self>,
        b_scales: FloatTensor<Self>,
        b_tile: Tile,
    ) -> FloatTensor<Self> {
        #[cfg(feature = "cuda")]
        if launch::is_cuda(&a_codes) {
            let (a, b) = ((a_codes, a_scales), (b_codes, b_scales));
            let product = launch::matmul_nt(a, b, b_tile, burn::tensor::DType::F32);
            return product.unwrap_or_else(|problem| panic!("{problem}"));
        }
        let quantized = |codes, scales, tile| Quantized {
            codes: Tensor::<2, Int>::from_primitive::<Self>(codes),
            scales: Tensor::from_primitive::<Self>(scales),
            tile,
        };
        let (a, b) = (
            quantized(a_codes, a_scales, Tile::Row),
            quantized(b_codes, b_scales, b_tile),
        );
        primitive(reference::matmul_nt(&a, &b))
    }

    fn fp8_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        product::<Self>(x, Self::float_transpose(weight), Tile::Block, format)
    }
}

impl Fp8GroupedOps for Cube {
    fn fp8_grouped_linear(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        #[cfg(feature = "cuda")]
        if launch::is_cuda(&x) {
            return on_cuda::product(x, Self::float_transpose(weights), counts, format)
                .unwrap_or_else(|problem| panic!("{problem}"));
        }
        let counts = &on_host(counts);
        OneByOne { counts, format }.product::<Self>(x, weights, false)
    }
}

impl Fp8GroupedGrad for Cube {
    fn fp8_grouped_input_grad(
        grad: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        #[cfg(feature = "cuda")]
        if launch::is_cuda(&grad) {
            return on_cuda::product(grad, weights, counts, format)
                .unwrap_or_else(|problem| panic!("{problem}"));
        }
        let counts = &on_host(counts);
        OneByOne { counts, format }.product::<Self>(grad, weights, true)
    }

    fn fp8_grouped_weight_grad(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        #[cfg(feature = "cuda")]
        if launch::is_cuda(&x) {
            return on_cuda::weight_grad(x, grad, counts, format)
                .unwrap_or_else(|problem| panic!("{problem}"));
        }
        let counts = &on_host(counts);
        OneByOne { counts, format }.weight_grad::<Self>(x, grad)
    }
}

impl Fp8GatedOps for Cube {
    fn fp8_gated_linear(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        recipe: gated::Recipe,
    ) -> FloatTensor<Self> {
        gated::forward::<Self>(gate, up, weights, counts, recipe)
    }
}

impl Gated for Cube {
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, bf16: bool) -> FloatTensor<Self> {
        let hidden = swiglu(matrix(gate), matrix(up));
        primitive(if bf16 { rounded(hidden) } else { hidden })
    }

    fn gated_grad(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        bf16: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (grad, gate, up) = (matrix(grad), matrix(gate), matrix(up));
        let grad = if bf16 { rounded(grad) } else { grad };
        let s = sigmoid(gate.clone());
        let of_up = grad.clone() * gate.clone() * s.clone();
        let slope = gate * (s.clone().neg() + 1.0) + 1.0;
        (primitive(grad * up * s * slope), primitive(of_up))
    }

    fn numbers_of_rows(codes: IntTensor<Self>, scales: FloatTensor<Self>) -> FloatTensor<Self> {
        primitive(reference::dequantize(&Quantized {
            codes: Tensor::<2, Int>::from_primitive::<Self>(codes),
            scales: matrix(scales),
            tile: Tile::Row,
        }))
    }
}

fn matrix(primitive: FloatTensor<Cube>) -> Tensor<2> {
    Tensor::from_primitive::<Cube>(primitive)
}

fn primitive(matrix: Tensor<2>) -> FloatTensor<Cube> {
    matrix
        .try_into_primitive::<Cube>()
        .expect("computed on the device of its operands")
}

/// Reads what a device without kernels for groups does not need itself.
fn on_host(counts: IntTensor<Cube>) -> Vec<usize> {
    let counts = Tensor::<1, Int>::from_primitive::<Cube>(counts).into_data();
    counts.iter::<i64>().map(|count| count as usize).collect()
}

#[cfg(feature = "cuda")]
mod on_cuda {
    use burn::{
        backend::ops::PadMode,
        tensor::{DType, Shape, Slice},
    };
    use burn_cubecl::tensor::CubeTensor;

    use super::*;
    use crate::{cube::contiguous, flex::dims, fp8::tiles::TILE};

    /// `x_e B_e^T` with `matrices` B `[E, N, K]`, any strides. Where N is not a multiple of a block's, zeros fill it up.
    pub(super) fn product(
        x: CubeTensor,
        matrices: CubeTensor,
        counts: CubeTensor,
        format: ScaleFormat,
    ) -> Result<CubeTensor, launch::Unsupported> {
        let ([rows, _], [experts, n, k]) = (dims(&x), dims(&matrices));
        let blocks = n.next_multiple_of(TILE);
        let matrices = match blocks == n {
            true => contiguous(matrices),
            false => {
                let padding = [(0, 0), (0, blocks - n), (0, 0)];
                Cube::float_pad(matrices, &padding, PadMode::Constant(0.0))
            }
        };
        let matrices = Cube::float_reshape(matrices, Shape::new([experts * blocks, k]));
        let a = launch::quantize(x, Tile::Row, format)?;
        let b = launch::quantize(matrices, Tile::Block, ScaleFormat::Float32)?;
        let y = launch::grouped_matmul_nt(a, b, counts, DType::F32)?;
        let inside = [Slice::from(0..rows), Slice::from(0..n)];
        Ok(match blocks == n {
            true => y,
            false => Cube::float_slice(y, &inside),
        })
    }

    /// `x_e^T dy_e`.
    pub(super) fn weight_grad(
        x: CubeTensor,
        grad: CubeTensor,
        counts: CubeTensor,
        format: ScaleFormat,
    ) -> Result<CubeTensor, launch::Unsupported> {
        let ([_, k], [_, n], [experts]) = (dims(&x), dims(&grad), dims(&counts));
        let a = launch::quantize_transposed(x, format)?;
        let b = launch::quantize_transposed(grad, format)?;
        let all = launch::segments_matmul_nt(a, b, counts, DType::F32)?;
        Ok(Cube::float_reshape(all, Shape::new([experts, k, n])))
    }
}
