//! E4M3 codes with one scale per tile of a row-major matrix: pure functions on slices.
//!
//! Sizes need not be multiples of a tile's: the tiles at the edges are smaller and have scales of their own.

use super::e4m3::{MAX, decoded, encode};
use crate::vector::vectorized;

/// Rows and columns of a block, columns of a row's tile.
pub const TILE: usize = 128;

/// The elements that share a scale (report section 3.3.2, figure 7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// 1 x 128, for activations and gradients. A scale is that of a largest magnitude of at least 1e-4, as upstream.
    Row,
    /// 128 x 128, for weights.
    Block,
}

/// The numbers that a scale may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScaleFormat {
    /// Any: the tile's largest magnitude becomes 448 exactly.
    #[default]
    Float32,
    /// The next power of two (ue8m0): dividing by it and multiplying with it round nothing.
    PowerOfTwo,
}

impl Tile {
    /// Rows and columns of the tile.
    pub fn dims(self) -> [usize; 2] {
        match self {
            Self::Row => [1, TILE],
            Self::Block => [TILE, TILE],
        }
    }

    /// Rows and columns of the scales of a matrix with these rows and columns.
    pub fn scale_shape(self, [rows, columns]: [usize; 2]) -> [usize; 2] {
        let [down, across] = self.dims();
        [rows.div_ceil(down), columns.div_ceil(across)]
    }

    /// The smallest of the largest magnitudes that scales are made for.
    pub(super) fn floor(self) -> f32 {
        match self {
            Self::Row => 1e-4,
            Self::Block => 0.0,
        }
    }

    /// The scale of a tile with this largest magnitude: that over 448, or the next power of two. A tile of zeros (or of
    /// numbers too small for a scale) has 1; one with an element that is not finite has NaN.
    pub fn scale(self, largest: f32, format: ScaleFormat) -> f32 {
        let scale = largest.max(self.floor()) / MAX;
        if !largest.is_finite() {
            f32::NAN
        } else if scale == 0.0 {
            1.0
        } else {
            match format {
                ScaleFormat::Float32 => scale,
                ScaleFormat::PowerOfTwo => next_power_of_two(scale),
            }
        }
    }
}

/// The least normal power of two that is not below a positive number.
fn next_power_of_two(value: f32) -> f32 {
    const MANTISSA: u32 = (1 << 23) - 1;
    let value = value.max(f32::MIN_POSITIVE);
    f32::from_bits((value.to_bits() + MANTISSA) & !MANTISSA)
}

/// The largest magnitude, NaN if there is one: bits without the sign are in the order of the magnitudes, and those of NaN
/// above all.
#[inline(always)]
pub(super) fn largest(values: &[f32]) -> f32 {
    let bits = values.iter().map(|value| value.to_bits() & 0x7fff_ffff);
    f32::from_bits(bits.fold(0, u32::max))
}

/// The scales of a matrix, row-major.
///
/// # Panics
/// If `columns` is 0.
pub fn scales(values: &[f32], columns: usize, tile: Tile, format: ScaleFormat) -> Vec<f32> {
    let [down, _] = tile.dims();
    let [_, across] = tile.scale_shape([0, columns]);
    let mut scales = Vec::with_capacity(across * (values.len() / columns).div_ceil(down));
    for rows in values.chunks(down * columns) {
        let start = scales.len();
        scales.resize(start + across, 0f32);
        for row in rows.chunks(columns) {
            for (magnitude, tile) in scales[start..].iter_mut().zip(row.chunks(TILE)) {
                *magnitude = largest(&[*magnitude, vectorized!(largest(tile))]);
            }
        }
        for scale in &mut scales[start..] {
            *scale = tile.scale(*scale, format);
        }
    }
    scales
}

/// The codes of a matrix divided by its scales; those of a tile whose scale is NaN are NaN.
///
/// # Panics
/// If `columns` is 0 or `scales` are not those of such a matrix.
pub fn quantize(values: &[f32], columns: usize, tile: Tile, scales: &[f32]) -> Vec<u8> {
    by_tile(values, columns, tile, scales, |&value, scale| {
        encode(value / scale)
    })
}

/// The matrix that codes and scales stand for: their products in single precision.
///
/// # Panics
/// If `columns` is 0 or `scales` are not those of such a matrix.
pub fn dequantize(codes: &[u8], columns: usize, tile: Tile, scales: &[f32]) -> Vec<f32> {
    let decoded = decoded();
    by_tile(codes, columns, tile, scales, |&code, scale| {
        decoded[usize::from(code)] * scale
    })
}

/// Applies `convert` to every element with the scale of its tile.
pub(super) fn by_tile<A, B>(
    elements: &[A],
    columns: usize,
    tile: Tile,
    scales: &[f32],
    convert: impl Fn(&A, f32) -> B,
) -> Vec<B> {
    let [down, _] = tile.dims();
    let [height, across] = tile.scale_shape([elements.len() / columns, columns]);
    assert_eq!(scales.len(), height * across, "one scale per tile");
    let mut converted = Vec::with_capacity(elements.len());
    for (row, elements) in elements.chunks(columns).enumerate() {
        let scales = &scales[row / down * across..][..across];
        for (tile, &scale) in elements.chunks(TILE).zip(scales) {
            vectorized!(converted.extend(tile.iter().map(|element| convert(element, scale))));
        }
    }
    converted
}
