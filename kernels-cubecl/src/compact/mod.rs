//! Weights that are held in BF16 or FP8 and multiplied with activations in single precision.
//!
//! A decoding step reads every weight that it uses once, and what it reads is what it costs. Numbers are widened in
//! registers, so that sums are those of single precision: only the weights are rounded.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod kernel;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod launch;
mod panels;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod words;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::{cube, permute::Permutation};
use panels::Panels;

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
    /// A device that is neither the CPU nor one of CubeCL.
    pub fn check(self, device: &Device) -> Result<(), NotCompact> {
        self.check_type(device, DType::F32)
    }

    fn check_type(self, device: &Device, dtype: DType) -> Result<(), NotCompact> {
        if cube::is_native_f32_or_flex(device, dtype) {
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
#[error("weights in {format:?}: need F32 on the CPU, wgpu or CUDA, found {dtype:?} on {device}")]
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
    Panels(Panels),
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    Words(Box<words::Words>),
}

impl CompactMatrices {
    /// Rounds weights to the format, to the nearest.
    ///
    /// # Shapes
    /// - `weights`: `[E, K, N]`
    ///
    /// # Errors
    /// Weights that are not in single precision, or on another device than the CPU and those of CubeCL.
    pub fn new(weights: Tensor<3>, format: CompactFormat) -> Result<Self, NotCompact> {
        let (device, shape) = (weights.device(), weights.dims());
        format.check_type(&device, weights.dtype())?;
        let data = weights.into_data();
        let values = data
            .as_slice::<f32>()
            .expect("single precision, as checked");
        let storage = match cube::is_cube(&device) {
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            true => Storage::Words(Box::new(words::Words::new(values, shape, format, &device))),
            _ => Storage::Panels(Panels::new(values, shape, format)),
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
            Storage::Panels(panels) => panels.bytes(),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            Storage::Words(words) => words.bytes(),
        }
    }

    /// The numbers that are held.
    ///
    /// # Shapes
    /// - result: `[E, K, N]`
    pub fn widened(&self) -> Tensor<3> {
        match &self.storage {
            Storage::Panels(panels) => {
                let data = TensorData::new(panels.widened(), self.shape);
                Tensor::from_data(data, (&self.device, DType::F32))
            }
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            Storage::Words(words) => words.widened(),
        }
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
        self.check(&x);
        let rows = x.dims()[0];
        match &self.storage {
            Storage::Panels(panels) => self.multiply(panels, x, &[rows]),
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            Storage::Words(words) => words.linear(x),
        }
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
        assert_eq!(
            order.rows.dims(),
            [self.shape[0]],
            "as many segments as matrices"
        );
        let [tokens, _] = order.dims();
        self.by_segment(x, order.rows.clone(), tokens)
    }

    /// `most` is how many rows a segment has at most, but for padding; the host, which knows their numbers, does not need it.
    fn by_segment(&self, x: Tensor<2>, counts: Tensor<1, Int>, most: usize) -> Tensor<2> {
        self.check(&x);
        match &self.storage {
            Storage::Panels(panels) => {
                let _ = most;
                let counts = counts.into_data();
                let counts = counts.iter::<i64>().map(|count| count as usize);
                self.multiply(panels, x, &counts.collect::<Vec<_>>())
            }
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            Storage::Words(words) => words.grouped_linear(x, counts, most),
        }
    }

    fn check(&self, x: &Tensor<2>) {
        assert_eq!(x.dims()[1], self.shape[1], "inner sizes differ");
        assert_eq!(x.dtype(), DType::F32, "activations in single precision");
    }

    fn multiply(&self, panels: &Panels, x: Tensor<2>, counts: &[usize]) -> Tensor<2> {
        let (rows, device, x) = (x.dims()[0], x.device(), x.into_data());
        let x = x.as_slice::<f32>().expect("single precision, as checked");
        let product = panels.multiply(x, rows, counts);
        let data = TensorData::new(product, [rows, self.shape[2]]);
        Tensor::from_data(data, (&device, DType::F32))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};
    use proptest::prelude::*;

    use super::*;
    #[cfg(feature = "wgpu")]
    use crate::fp8::TILE;
    use crate::grouped_gemm::grouped_matmul;

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
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
                let expected = grouped_matmul(x.clone(), held.widened(), segments.clone());
                let found = held.by_segment(x.clone(), segments, 40);
                // Sums of 300 products of numbers of order one, in two orders.
                let close = Tolerance::<f32>::rel_abs(1e-4, 1e-4);
                found.into_data().assert_approx_eq(&expected.into_data(), close);
            }
        }
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn on_wgpu_numbers_and_products_are_those_of_the_cpu() {
        let wgpu = crate::cube::wgpu();
        let on_wgpu = |x: &Tensor<2>| x.clone().to_device(&wgpu);
        // Sums in another order.
        let close = Tolerance::<f32>::rel_abs(1e-4, 1e-4);
        for (counts, [inner, columns]) in [
            (vec![1], [1, 1]),
            (vec![3], [130, 129]),
            (vec![70], [40, 6]),
            (vec![0, 1, 0, 1, 1], [300, 257]),
            (vec![2, 0, 9, 4], [129, 130]),
            (vec![0, 33, 70], [64, 31]),
            (vec![0, 0], [16, 16]),
        ] {
            let most = counts.iter().copied().max().unwrap_or(0);
            // Two rows behind the segments.
            let rows = counts.iter().sum::<usize>() + 2;
            let (x, weights) = (
                random([rows, inner]),
                random([counts.len(), inner, columns]),
            );
            let segments: Vec<i32> = counts.iter().map(|&count| count as i32).collect();
            let segments = |device: &Device| Tensor::<1, Int>::from_data(&segments[..], device);
            for format in [CompactFormat::Bf16, CompactFormat::Fp8] {
                let held = CompactMatrices::new(weights.clone(), format).unwrap();
                let there = weights.clone().to_device(&wgpu);
                let there = CompactMatrices::new(there, format).unwrap();
                assert_eq!(there.widened().into_data(), held.widened().into_data());
                let numbers = counts.len() * inner * columns.div_ceil(4) * 4;
                let blocks = inner.div_ceil(TILE) * columns.div_ceil(TILE);
                let expected = match format {
                    CompactFormat::Bf16 => 2 * numbers + 4,
                    CompactFormat::Fp8 => numbers + 4 * counts.len() * blocks,
                };
                assert_eq!(there.bytes(), expected);

                let expected = held.by_segment(x.clone(), segments(&Device::flex()), most);
                let found = there.by_segment(on_wgpu(&x), segments(&wgpu), most);
                found
                    .into_data()
                    .assert_approx_eq(&expected.into_data(), close);
                if counts.len() == 1 {
                    let expected = held.linear(x.clone()).into_data();
                    let found = there.linear(on_wgpu(&x)).into_data();
                    found.assert_approx_eq(&expected, close);
                }
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
                .starts_with("weights in Fp8: need F32 on the CPU, wgpu or CUDA, found F64"),
            "{error}"
        );
    }
}
