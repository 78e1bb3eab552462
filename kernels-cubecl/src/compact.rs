//! Weights that are held in BF16 or FP8 and multiplied with activations in single precision, on the CPU.
//!
//! A decoding step reads every weight that it uses once, and what it reads is what it costs. Numbers are widened in
//! registers, so that sums are those of single precision: only the weights are rounded.
//!
//! A matrix is stored in panels of 128 columns, each of which lies in memory as it is read.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData, bf16};

use crate::{
    few_rows::{Weights, add_few_rows},
    flex::is_native_f32,
    fp8::{
        ScaleFormat, TILE, Tile,
        tiles::{quantize, scales},
    },
    gemm::{Into, Matrix, multiply},
    parts::{Panel, by_panels},
    permute::Permutation,
};

/// How weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompactFormat {
    /// BF16: 2 bytes each.
    Bf16,
    /// E4M3 with a scale per block of 128 x 128, as in checkpoints: 1 byte each.
    Fp8,
}

impl CompactFormat {
    /// Whether weights on this device can be held so.
    ///
    /// # Errors
    /// A device other than the CPU.
    pub fn check(self, device: &Device) -> Result<(), NotCompact> {
        self.check_type(device, DType::F32)
    }

    fn check_type(self, device: &Device, dtype: DType) -> Result<(), NotCompact> {
        if is_native_f32(device, dtype) {
            return Ok(());
        }
        Err(NotCompact {
            format: self,
            dtype,
            device: format!("{device:?}"),
        })
    }
}

/// Weights that cannot be held so.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("weights in {format:?}: need F32 on the CPU, found {dtype:?} on {device}")]
pub struct NotCompact {
    format: CompactFormat,
    dtype: DType,
    device: String,
}

/// Matrices of one size, in a compact format.
#[derive(Clone, Debug)]
pub struct CompactMatrices {
    storage: Storage,
    shape: [usize; 3], // E, K, N
    device: Device,
}

#[derive(Clone, Debug)]
enum Storage {
    Bf16(Arc<[u16]>),
    Fp8 {
        codes: Arc<[u8]>,
        scales: Arc<[f32]>,
    }, // scales [E, ceil(K / 128), ceil(N / 128)]
}

impl CompactMatrices {
    /// Rounds weights to the format, to the nearest.
    ///
    /// # Shapes
    /// - `weights`: `[E, K, N]`
    ///
    /// # Errors
    /// Weights that are not in single precision on the CPU.
    pub fn new(weights: Tensor<3>, format: CompactFormat) -> Result<Self, NotCompact> {
        let (device, shape) = (weights.device(), weights.dims());
        format.check_type(&device, weights.dtype())?;
        let data = weights.into_data();
        let values = data
            .as_slice::<f32>()
            .expect("single precision, as checked");
        let [_, inner, columns] = shape;
        let storage = match format {
            CompactFormat::Bf16 => {
                let rounded = values.iter().map(|&value| bf16::from_f32(value).to_bits());
                Storage::Bf16(in_panels(&rounded.collect::<Vec<_>>(), shape).into())
            }
            CompactFormat::Fp8 => {
                let mut codes = Vec::with_capacity(values.len());
                let mut all = Vec::new();
                for matrix in values.chunks_exact((inner * columns).max(1)) {
                    let scales = scales(matrix, columns, Tile::Block, ScaleFormat::Float32);
                    codes.extend(quantize(matrix, columns, Tile::Block, &scales));
                    all.extend(scales);
                }
                Storage::Fp8 {
                    codes: in_panels(&codes, shape).into(),
                    scales: all.into(),
                }
            }
        };
        Ok(Self {
            storage,
            shape,
            device,
        })
    }

    /// E, K and N.
    pub fn dims(&self) -> [usize; 3] {
        self.shape
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::Bf16(numbers) => size_of_val(&**numbers),
            Storage::Fp8 { codes, scales } => size_of_val(&**codes) + size_of_val(&**scales),
        }
    }

    /// The numbers that are held.
    ///
    /// # Shapes
    /// - result: `[E, K, N]`
    pub fn widened(&self) -> Tensor<3> {
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
        let data = TensorData::new(values, self.shape);
        Tensor::from_data(data, (&self.device, DType::F32))
    }

    /// `x W` for a single matrix.
    ///
    /// # Shapes
    /// - `x`: `[M, K]`
    /// - result: `[M, N]`
    ///
    /// # Panics
    /// If there is more than one matrix, or `x` is of another size or type.
    pub fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        assert_eq!(self.shape[0], 1, "a single matrix");
        let rows = x.dims()[0];
        self.multiply(x, &[rows])
    }

    /// `x_e W_e` for the rows of each expert's segment; zero for rows of none.
    ///
    /// # Shapes
    /// - `x`: `[R, K]` in the given order
    /// - result: `[R, N]`
    ///
    /// # Panics
    /// If `x` or the order is of another size, or `x` of another type.
    pub fn grouped_linear(&self, x: Tensor<2>, order: &Permutation) -> Tensor<2> {
        let counts = order.rows.to_data();
        let counts: Vec<usize> = counts.iter::<i64>().map(|count| count as usize).collect();
        self.multiply(x, &counts)
    }

    fn multiply(&self, x: Tensor<2>, counts: &[usize]) -> Tensor<2> {
        let [matrices, inner, columns] = self.shape;
        let [rows, width] = x.dims();
        assert_eq!(width, inner, "inner sizes differ");
        assert_eq!(counts.len(), matrices, "as many segments as matrices");
        let device = x.device();
        let x = x.into_data();
        let x = x
            .as_slice::<f32>()
            .expect("activations in single precision");

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
        let out = by_panels([rows, columns], &panels, |at, out: &mut [f32]| {
            let panel = &panels[at];
            let x = &x[panel.rows.start * inner..panel.rows.end * inner];
            self.multiply_panel([matrices[at], panel.columns.start / TILE], x, out);
        });
        Tensor::from_data(TensorData::new(out, [rows, columns]), (&device, DType::F32))
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
        match &self.storage {
            Storage::Bf16(numbers) => {
                let elements = &numbers[at];
                let weights = Weights { elements, width };
                add_few_rows(Matrix::of(x, rows, inner), weights, widen_bf16, out);
            }
            Storage::Fp8 { codes, .. } => {
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
        match &self.storage {
            Storage::Bf16(numbers) => numbers[at].iter().map(|&bits| widen_bf16(bits)).collect(),
            Storage::Fp8 { codes, .. } => {
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
        match &self.storage {
            Storage::Bf16(_) => 1.0,
            Storage::Fp8 { scales, .. } => scales[(matrix * down + tile) * across + panel],
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

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Int, Tolerance};
    use proptest::prelude::*;

    use super::*;
    use crate::{fp8::e4m3, grouped_gemm::grouped_matmul};

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
    }

    #[test]
    fn every_code_is_widened_to_its_number() {
        for code in 0..=255u8 {
            if code & 0x7f != 0x7f {
                assert_eq!(widen_e4m3(code), e4m3::decode(code), "{code:#x}");
            }
        }
    }

    #[test]
    fn weights_are_rounded_to_nearest_and_nothing_else() {
        let weights = random([3, 200, 150]);
        let held = CompactMatrices::new(weights.clone(), CompactFormat::Bf16).unwrap();
        let expected = weights.clone().cast(DType::BF16).cast(DType::F32);
        assert_eq!(held.widened().into_data(), expected.into_data());
        assert_eq!(held.bytes(), 2 * 3 * 200 * 150);

        let held = CompactMatrices::new(weights.clone(), CompactFormat::Fp8).unwrap();
        // 2 x 2 blocks in each of three matrices.
        assert_eq!(held.bytes(), 3 * 200 * 150 + 3 * 4 * 4);
        let widened = held.widened();
        // Half of the last of four bits of the largest number, which is below 6.
        let worst = (widened.clone() - weights).abs().max().into_scalar::<f32>();
        assert!(worst < 6.0 / 28.0, "{worst}");
        // What was read from FP8 is held without another rounding.
        let again = CompactMatrices::new(widened.clone(), CompactFormat::Fp8).unwrap();
        assert_eq!(again.widened().into_data(), widened.into_data());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn products_are_those_of_the_widened_weights(
            counts in prop::collection::vec(prop_oneof![0usize..12, Just(40)], 1..4),
            inner in 1usize..300,
            columns in 1usize..300,
            behind in 0usize..2,
        ) {
            let rows = counts.iter().sum::<usize>() + behind;
            let (x, weights) = (random([rows.max(1), inner]), random([counts.len(), inner, columns]));
            for format in [CompactFormat::Bf16, CompactFormat::Fp8] {
                let held = CompactMatrices::new(weights.clone(), format).unwrap();
                let segments: Vec<i32> = counts.iter().map(|&count| count as i32).collect();
                let segments = Tensor::<1, Int>::from_data(&segments[..], &Device::flex());
                let expected = grouped_matmul(x.clone(), held.widened(), segments);
                let found = held.multiply(x.clone(), &counts);
                // Sums of 300 products of numbers of order one, in two orders.
                let close = Tolerance::<f32>::rel_abs(1e-4, 1e-4);
                found.into_data().assert_approx_eq(&expected.into_data(), close);
            }
        }
    }

    #[test]
    fn other_types_are_refused_by_name() {
        let weights = random([1, 2, 2]).cast(DType::F64);
        let error = CompactMatrices::new(weights, CompactFormat::Fp8).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("weights in Fp8: need F32 on the CPU, found F64"),
            "{error}"
        );
    }
}
