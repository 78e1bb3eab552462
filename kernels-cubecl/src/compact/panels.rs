//! Compact matrices in the memory of the host.
//!
//! A matrix is stored in panels of 128 columns, each of which lies in memory as it is read.

use std::sync::Arc;

use burn::tensor::bf16;

use super::CompactFormat;
use crate::{
    few_rows::{Weights, add_few_rows},
    fp8::{
        ScaleFormat, TILE, Tile,
        tiles::{quantize, scales},
    },
    gemm::{Into, Matrix, multiply},
    parts::{Panel, by_panels},
};

/// E matrices of `[K, N]`.
#[derive(Clone, Debug)]
pub(super) struct Panels {
    numbers: Numbers,
    shape: [usize; 3], // E, K, N
}

#[derive(Clone, Debug)]
enum Numbers {
    Bf16(Arc<[u16]>),
    Fp8 {
        codes: Arc<[u8]>,
        scales: Arc<[f32]>,
    }, // scales [E, ceil(K / 128), ceil(N / 128)]
}

impl Panels {
    /// Rounds row-major matrices.
    pub(super) fn new(values: &[f32], shape: [usize; 3], format: CompactFormat) -> Self {
        let numbers = match format {
            CompactFormat::Bf16 => Numbers::Bf16(in_panels(&to_bf16(values), shape).into()),
            CompactFormat::Fp8 => {
                let (codes, scales) = to_fp8(values, shape);
                Numbers::Fp8 {
                    codes: in_panels(&codes, shape).into(),
                    scales: scales.into(),
                }
            }
        };
        Self { numbers, shape }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::Bf16(numbers) => size_of_val(&**numbers),
            Numbers::Fp8 { codes, scales } => size_of_val(&**codes) + size_of_val(&**scales),
        }
    }

    /// The numbers, row-major.
    pub(super) fn widened(&self) -> Vec<f32> {
        let [matrices, inner, columns] = self.shape;
        let mut values = vec![0f32; matrices * inner * columns];
        for (matrix, values) in values
            .chunks_exact_mut((inner * columns).max(1))
            .enumerate()
        {
            for panel in 0..columns.div_ceil(TILE) {
                let (first, width) = (panel * TILE, TILE.min(columns - panel * TILE));
                let widened = self.panel(matrix, panel);
                for (row, numbers) in values.chunks_exact_mut(columns).zip(widened.chunks(width)) {
                    row[first..first + width].copy_from_slice(numbers);
                }
            }
        }
        values
    }

    /// `x_e W_e` for segments of `counts` rows each; zero for rows behind them.
    pub(super) fn multiply(&self, x: &[f32], rows: usize, counts: &[usize]) -> Vec<f32> {
        let [_, inner, columns] = self.shape;
        let (mut panels, mut matrices) = (Vec::new(), Vec::new());
        let mut first = 0;
        for (matrix, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            for start in (0..columns).step_by(TILE) {
                panels.push(Panel {
                    rows: first..first + count,
                    columns: start..columns.min(start + TILE),
                });
                matrices.push(matrix);
            }
            first += count;
        }
        assert!(first <= rows, "segments of {first} rows in {rows}");
        by_panels([rows, columns], &panels, |at, out: &mut [f32]| {
            let panel = &panels[at];
            let x = &x[panel.rows.start * inner..panel.rows.end * inner];
            self.multiply_panel([matrices[at], panel.columns.start / TILE], x, out);
        })
    }

    fn multiply_panel(&self, [matrix, panel]: [usize; 2], x: &[f32], out: &mut [f32]) {
        /// Rows from which on it pays to widen a panel before it is multiplied.
        const MANY: usize = 24;
        let [_, inner, _] = self.shape;
        let rows = x.len() / inner;
        if rows >= MANY {
            let numbers = self.panel(matrix, panel);
            let numbers = Matrix::of(&numbers, inner, out.len() / rows);
            return multiply(Matrix::of(x, rows, inner), numbers, out, Into::Replace);
        }
        let at = self.range(matrix, panel);
        let width = out.len() / rows;
        match &self.numbers {
            Numbers::Bf16(numbers) => {
                let elements = &numbers[at];
                let weights = Weights { elements, width };
                add_few_rows(Matrix::of(x, rows, inner), weights, widen_bf16, out);
            }
            Numbers::Fp8 { codes, .. } => {
                let mut sums = vec![0f32; out.len()];
                for (tile, codes) in codes[at].chunks(TILE * width).enumerate() {
                    let x = &x[tile * TILE..];
                    let x = Matrix::strided(x, rows, codes.len() / width, inner);
                    sums.fill(0.0);
                    let weights = Weights {
                        elements: codes,
                        width,
                    };
                    add_few_rows(x, weights, widen_e4m3, &mut sums);
                    let scale = self.scale(matrix, tile, panel);
                    for (out, sum) in out.iter_mut().zip(&sums) {
                        *out += sum * scale;
                    }
                }
            }
        }
    }

    /// The numbers of a panel, row-major. `[K, width]`
    fn panel(&self, matrix: usize, panel: usize) -> Vec<f32> {
        let at = self.range(matrix, panel);
        match &self.numbers {
            Numbers::Bf16(numbers) => numbers[at].iter().map(|&bits| widen_bf16(bits)).collect(),
            Numbers::Fp8 { codes, .. } => {
                let width = TILE.min(self.shape[2] - panel * TILE);
                let tiles = codes[at].chunks(TILE * width).enumerate();
                let numbers = tiles.flat_map(|(tile, codes)| {
                    let scale = self.scale(matrix, tile, panel);
                    codes.iter().map(move |&code| widen_e4m3(code) * scale)
                });
                numbers.collect()
            }
        }
    }

    /// Where the elements of a panel are.
    fn range(&self, matrix: usize, panel: usize) -> std::ops::Range<usize> {
        let [_, inner, columns] = self.shape;
        let start = matrix * inner * columns + panel * TILE * inner;
        start..start + TILE.min(columns - panel * TILE) * inner
    }

    fn scale(&self, matrix: usize, tile: usize, panel: usize) -> f32 {
        let [_, inner, columns] = self.shape;
        let [down, across] = Tile::Block.scale_shape([inner, columns]);
        match &self.numbers {
            Numbers::Bf16(_) => 1.0,
            Numbers::Fp8 { scales, .. } => scales[(matrix * down + tile) * across + panel],
        }
    }
}

/// Row-major matrices in panels of [`TILE`] columns.
fn in_panels<T: Copy>(values: &[T], [_, inner, columns]: [usize; 3]) -> Vec<T> {
    let mut panels = Vec::with_capacity(values.len());
    for matrix in values.chunks_exact((inner * columns).max(1)) {
        for first in (0..columns).step_by(TILE) {
            let width = TILE.min(columns - first);
            let rows = matrix.chunks_exact(columns);
            panels.extend(rows.flat_map(|row| &row[first..first + width]));
        }
    }
    panels
}

#[inline(always)]
fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The number of a code that is not NaN, whose exponent is 120 below that of single precision.
#[inline(always)]
fn widen_e4m3(code: u8) -> f32 {
    const SHIFT: f32 = f32::from_bits((127 + 120) << 23);
    let (sign, magnitude) = (u32::from(code & 0x80), u32::from(code & 0x7f));
    f32::from_bits(sign << 24 | magnitude << 20) * SHIFT
}

pub(super) fn to_bf16(values: &[f32]) -> Vec<u16> {
    let rounded = values.iter().map(|&value| bf16::from_f32(value).to_bits());
    rounded.collect()
}

/// Codes and scales of the blocks of each matrix.
pub(super) fn to_fp8(values: &[f32], [_, inner, columns]: [usize; 3]) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut all) = (Vec::with_capacity(values.len()), Vec::new());
    for matrix in values.chunks_exact((inner * columns).max(1)) {
        let scales = scales(matrix, columns, Tile::Block, ScaleFormat::Float32);
        codes.extend(quantize(matrix, columns, Tile::Block, &scales));
        all.extend(scales);
    }
    (codes, all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fp8::e4m3;

    #[test]
    fn every_code_is_widened_to_its_number() {
        for code in 0..=255u8 {
            if code & 0x7f != 0x7f {
                assert_eq!(widen_e4m3(code), e4m3::decode(code), "{code:#x}");
            }
        }
    }
}
