//! FP8 arithmetic in plain tensor operations on single precision.

use burn::tensor::{DType, Int, Tensor, TensorData};

use super::{
    Quantized, code_dtype,
    e4m3::{MAX, decoded},
    tiles::{ScaleFormat, TILE, Tile},
};

/// See [`super::quantize`].
pub(super) fn quantize(
    x: Tensor<2>,
    tile: Tile,
    format: ScaleFormat,
) -> (Tensor<2, Int>, Tensor<2>) {
    let [rows, columns] = x.dims();
    let [down, across] = tile.dims();
    let [tile_rows, tile_columns] = tile.scale_shape([rows, columns]);
    let x = x.cast(DType::F32);
    let padding = [
        (0, tile_rows * down - rows),
        (0, tile_columns * across - columns),
    ];
    let magnitudes = x.clone().abs().pad(padding, 0.0);
    let finite = magnitudes.clone().lower_equal_elem(f32::MAX);
    let by_tile = |values: Tensor<2>| values.reshape([tile_rows, down, tile_columns, across]);
    // NaN is hidden from the maximum, in which backends differ.
    let largest = by_tile(magnitudes.mask_fill(finite.clone().bool_not(), 0.0))
        .max_dim(3)
        .max_dim(1); // [tile rows, 1, tile columns, 1]
    let sound = by_tile(finite.float()).min_dim(3).min_dim(1);
    let scales = largest.clamp_min(tile.floor()) / MAX;
    let scales = match format {
        ScaleFormat::Float32 => scales,
        ScaleFormat::PowerOfTwo => next_power_of_two(scales),
    };
    let scales = scales.clone().mask_fill(scales.equal_elem(0.0), 1.0);
    let scales = scales
        .mask_fill(sound.equal_elem(0.0), f32::NAN)
        .reshape([tile_rows, tile_columns]);
    let codes = encode(x / spread(scales.clone(), tile, [rows, columns]));
    let dtype = code_dtype(&codes.device());
    (codes.cast(dtype), scales)
}

/// The matrix that codes and scales stand for.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(super) fn dequantize(x: &Quantized) -> Tensor<2> {
    decode(x.codes.clone()) * spread(x.scales.clone(), x.tile, x.codes.dims())
}

/// The scale of every element of a matrix.
fn spread(scales: Tensor<2>, tile: Tile, [rows, columns]: [usize; 2]) -> Tensor<2> {
    let [tile_rows, tile_columns] = scales.dims();
    let [down, across] = tile.dims();
    scales
        .reshape([tile_rows, 1, tile_columns, 1])
        .expand([tile_rows, down, tile_columns, across])
        .reshape([tile_rows * down, tile_columns * across])
        .slice([0..rows, 0..columns])
}

/// The least power of two from 2^-126 up that is not below each element; 0 for 0.
///
/// Not through a logarithm, which backends round differently: a search over exponents, exact in every step.
fn next_power_of_two<const D: usize>(values: Tensor<D>) -> Tensor<D> {
    let mut power = values.zeros_like() + f32::MIN_POSITIVE;
    for step in [64, 64, 64, 32, 16, 8, 4, 2, 1] {
        let below = (power.clone() * 2f32.powi(step - 1)).lower(values.clone());
        power = power.clone().mask_where(below, power * 2f32.powi(step));
    }
    power.mask_fill(values.equal_elem(0.0), 0.0)
}

/// [`super::e4m3::encode`], elementwise.
fn encode(values: Tensor<2>) -> Tensor<2, Int> {
    let nan = values.clone().is_nan();
    // The reciprocal knows the sign of a zero.
    let negative = values.clone().recip().lower_elem(0.0).float() * 128.0;
    let magnitudes = values.abs().mask_fill(nan.clone(), 0.0).clamp_max(MAX);
    let mut octaves = magnitudes.zeros_like();
    let mut steps_per_one = magnitudes.zeros_like() + 512.0;
    for exponent in -5..=8 {
        let reached = magnitudes
            .clone()
            .greater_equal_elem(2f32.powi(exponent))
            .float();
        octaves = octaves + reached.clone();
        steps_per_one = steps_per_one * (reached * -0.5 + 1.0);
    }
    let steps = (magnitudes * steps_per_one).round();
    (octaves * 8.0 + steps + negative)
        .mask_fill(nan, 127.0)
        .int()
}

/// See [`super::matmul_nt`].
pub(super) fn matmul_nt(a: &Quantized, b: &Quantized) -> Tensor<2> {
    let ([rows, inner], [columns, _]) = (a.codes.dims(), b.codes.dims());
    let (a_values, b_values) = (decode(a.codes.clone()), decode(b.codes.clone()).transpose());
    let mut sum = Tensor::zeros([rows, columns], &a.scales.device());
    for (tile, start) in (0..inner).step_by(TILE).enumerate() {
        let length = TILE.min(inner - start);
        let product = a_values
            .clone()
            .narrow(1, start, length)
            .matmul(b_values.clone().narrow(0, start, length));
        let a_scales = a.scales.clone().narrow(1, tile, 1); // [M, 1]
        let b_scales = b.scales.clone().narrow(1, tile, 1);
        let b_scales = match b.tile {
            Tile::Row => b_scales,
            Tile::Block => b_scales
                .repeat_dim(1, TILE)
                .reshape([-1, 1])
                .narrow(0, 0, columns),
        }; // [N, 1]
        sum = sum + product * a_scales * b_scales.transpose();
    }
    sum
}

/// What each code stands for.
fn decode(codes: Tensor<2, Int>) -> Tensor<2> {
    let shape = codes.dims();
    let table = Tensor::<1>::from_data(TensorData::from(decoded()), &codes.device());
    let codes = codes.cast(DType::I32).reshape([-1]);
    table.select(0, codes).reshape(shape)
}
