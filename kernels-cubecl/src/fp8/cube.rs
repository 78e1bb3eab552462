//! FP8 arithmetic on CubeCL devices: quantisation by kernels everywhere, products by kernels on CUDA and by the reference
//! elsewhere.

use burn::{
    backend::{
        Cube,
        ops::FloatTensorOps,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};

use super::{
    Fp8Ops, Quantized, launch,
    linear::product,
    reference,
    tiles::{ScaleFormat, Tile},
};

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
        let matrix = |codes, scales, tile| Quantized {
            codes: Tensor::<2, Int>::from_primitive::<Self>(codes),
            scales: Tensor::from_primitive::<Self>(scales),
            tile,
        };
        let (a, b) = (
            matrix(a_codes, a_scales, Tile::Row),
            matrix(b_codes, b_scales, b_tile),
        );
        let product = reference::matmul_nt(&a, &b);
        product
            .try_into_primitive::<Self>()
            .expect("computed on the device of its operands")
    }

    fn fp8_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        product::<Self>(x, Self::float_transpose(weight), Tile::Block, format)
    }
}
