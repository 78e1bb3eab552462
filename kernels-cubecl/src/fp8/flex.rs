//! FP8 arithmetic on the CPU: codes exactly as on a GPU, products through single-precision matrix products of the
//! decoded numbers, which hold them exactly.

use burn::{
    backend::{
        Flex,
        ops::FloatTensorOps,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::TensorData,
};
use rayon::prelude::*;

use super::{
    Fp8Ops,
    e4m3::decoded,
    gated::{self, Fp8GatedOps, Gated},
    grouped::{Fp8GroupedGrad, Fp8GroupedOps, OneByOne},
    linear::product,
    tiles::{ScaleFormat, TILE, Tile, quantize, scales},
};
use crate::{
    bf16::Bf16Ops,
    flex::{FlexInt, contiguous, dims, elements, float_tensor, indices},
    gemm::{Into, Matrix, multiply},
    swiglu::{SwigluGrad, SwigluOps},
    vector::vectorized,
};

/// Rows of a matrix per task.
const ROWS: usize = TILE;

impl Fp8Ops for Flex {
    fn fp8_quantize(
        x: FloatTensor<Self>,
        tile: Tile,
        format: ScaleFormat,
    ) -> (IntTensor<Self>, FloatTensor<Self>) {
        let x = contiguous(x);
        let [rows, columns] = dims(&x);
        let (codes, factors): (Vec<Vec<u8>>, Vec<Vec<f32>>) = elements::<f32>(&x)
            .par_chunks(ROWS * columns)
            .map(|values| {
                let factors = scales(values, columns, tile, format);
                (quantize(values, columns, tile, &factors), factors)
            })
            .unzip();
        let codes = TensorData::new(codes.concat(), [rows, columns]);
        let factors = float_tensor(factors.concat(), tile.scale_shape([rows, columns]));
        (FlexInt::from_data(codes), factors)
    }

    fn fp8_matmul_nt(
        a_codes: IntTensor<Self>,
        a_scales: FloatTensor<Self>,
        b_codes: IntTensor<Self>,
        b_scales: FloatTensor<Self>,
        b_tile: Tile,
    ) -> FloatTensor<Self> {
        let ([rows, inner], [columns, _]) = (dims(&a_codes), dims(&b_codes));
        let (a, b) = (numbers(a_codes), numbers(b_codes));
        let (a_scales, b_scales) = (contiguous(a_scales), contiguous(b_scales));
        let (a_scales, b_scales) = (elements::<f32>(&a_scales), elements::<f32>(&b_scales));
        let tiles = inner.div_ceil(TILE);
        let [b_rows, _] = b_tile.dims();
        // Scales of the columns of the result, one row per tile of the inner size.
        let b_scales: Vec<f32> = (0..tiles * columns)
            .map(|at| b_scales[at % columns / b_rows * tiles + at / columns])
            .collect();
        let mut out = vec![0f32; rows * columns];
        let chunks = out.par_chunks_mut(ROWS * columns).enumerate();
        chunks.for_each(|(chunk, out)| {
            let first = chunk * ROWS;
            let height = out.len() / columns;
            let mut partial = vec![0f32; out.len()];
            for tile in 0..tiles {
                let start = tile * TILE;
                let length = TILE.min(inner - start);
                let a = Matrix::strided(&a[first * inner + start..], height, length, inner);
                let b = Matrix::strided(&b[start..], columns, length, inner).transposed();
                multiply(a, b, &mut partial, Into::Replace);
                let b_scales = &b_scales[tile * columns..][..columns];
                let rows = out.chunks_mut(columns).zip(partial.chunks(columns));
                for (row, (out, partial)) in rows.enumerate() {
                    let a_scale = a_scales[(first + row) * tiles + tile];
                    vectorized!({
                        for ((out, &partial), &b_scale) in out.iter_mut().zip(partial).zip(b_scales)
                        {
                            *out += partial * a_scale * b_scale;
                        }
                    });
                }
            }
        });
        float_tensor(out, [rows, columns])
    }

    fn fp8_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        product::<Self>(x, Self::float_transpose(weight), Tile::Block, format)
    }
}

impl Fp8GroupedOps for Flex {
    fn fp8_grouped_linear(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        let counts = &indices(&counts);
        OneByOne { counts, format }.product::<Self>(x, weights, false)
    }
}

impl Fp8GroupedGrad for Flex {
    fn fp8_grouped_input_grad(
        grad: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        let counts = &indices(&counts);
        OneByOne { counts, format }.product::<Self>(grad, weights, true)
    }

    fn fp8_grouped_weight_grad(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        counts: IntTensor<Self>,
        format: ScaleFormat,
    ) -> FloatTensor<Self> {
        let counts = &indices(&counts);
        OneByOne { counts, format }.weight_grad::<Self>(x, grad)
    }
}

impl Fp8GatedOps for Flex {
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

impl Gated for Flex {
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, bf16: bool) -> FloatTensor<Self> {
        let hidden = Self::gate(gate, up);
        match bf16 {
            true => Self::round_bf16(hidden, true),
            false => hidden,
        }
    }

    fn gated_grad(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        bf16: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let grad = match bf16 {
            true => Self::round_bf16(grad, true),
            false => grad,
        };
        Self::gate_grad(grad, gate, up)
    }

    fn numbers_of_rows(codes: IntTensor<Self>, scales: FloatTensor<Self>) -> FloatTensor<Self> {
        let [rows, columns] = dims(&codes);
        let (mut numbers, scales) = (numbers(codes), contiguous(scales));
        let tiles = numbers
            .par_chunks_mut(columns.max(1))
            .zip(elements::<f32>(&scales).par_chunks(columns.div_ceil(TILE).max(1)));
        tiles.for_each(|(row, scales)| {
            for (tile, scale) in row.chunks_mut(TILE).zip(scales) {
                tile.iter_mut().for_each(|number| *number *= scale);
            }
        });
        float_tensor(numbers, [rows, columns])
    }
}

/// The number of every code, row-major.
fn numbers(codes: IntTensor<Flex>) -> Vec<f32> {
    let codes = if codes.is_contiguous() {
        codes
    } else {
        codes.to_contiguous()
    };
    let decoded = decoded();
    let codes = codes.as_slice::<u8>().expect("codes are bytes on the CPU");
    let number = |&code: &u8| decoded[usize::from(code)];
    codes.par_iter().with_min_len(1 << 14).map(number).collect()
}
