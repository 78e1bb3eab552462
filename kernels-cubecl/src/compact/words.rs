//! Compact matrices in the memory of a CubeCL device, which needs neither BF16 nor bytes for them.
//!
//! Four columns that follow each other are one word of E4M3 or two of BF16, the first in the lowest bits. A row that ends
//! within four has zeros behind it.

use burn::{
    backend::{
        Dispatch, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, Device, Int, Tensor, TensorData},
};

use super::{
    CompactFormat,
    panels::{to_bf16, to_fp8},
};
use crate::{grouped_gemm::grouped_matmul, linear::linear};

/// Rows per matrix up to which reading the compact weights again for every eight of them costs less than making them wide.
const FEW: usize = 64;

/// Columns of a word or two.
pub(super) const QUAD: usize = 4;

/// E matrices of `[K, N]`.
#[derive(Clone, Debug)]
pub(super) struct Words {
    words: Tensor<1, Int>, // [E, K, ceil(N / 4), 1 or 2]
    scales: Tensor<1>,     // [E, ceil(K / 128), ceil(N / 128)]; of BF16 one that nobody reads
    layout: Layout,
}

/// What the words are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(super) shape: [usize; 3], // E, K, N
    pub(super) format: CompactFormat,
}

impl Words {
    /// Rounds row-major matrices.
    pub(super) fn new(
        values: &[f32],
        shape: [usize; 3],
        format: CompactFormat,
        device: &Device,
    ) -> Self {
        let columns = shape[2].max(1);
        let (words, scales) = match format {
            CompactFormat::Bf16 => {
                let numbers = to_bf16(values);
                let rows = numbers.chunks_exact(columns);
                let quads = rows.flat_map(|row| row.chunks(QUAD)).flat_map(|quad| {
                    let number = |at: usize| u32::from(quad.get(at).copied().unwrap_or(0));
                    [0, 2].map(|at| number(at) | number(at + 1) << 16)
                });
                (quads.collect::<Vec<_>>(), vec![1.0])
            }
            CompactFormat::Fp8 => {
                let (codes, scales) = to_fp8(values, shape);
                let rows = codes.chunks_exact(columns);
                let quads = rows.flat_map(|row| row.chunks(QUAD)).map(|quad| {
                    let bytes = [0, 1, 2, 3].map(|at| quad.get(at).copied().unwrap_or(0));
                    u32::from_le_bytes(bytes)
                });
                (quads.collect(), scales)
            }
        };
        let (of_words, of_scales) = ([words.len()], [scales.len()]);
        Self {
            words: Tensor::from_data(TensorData::new(words, of_words), (device, DType::U32)),
            scales: Tensor::from_data(TensorData::new(scales, of_scales), (device, DType::F32)),
            layout: Layout { shape, format },
        }
    }

    /// Bytes in memory.
    pub(super) fn bytes(&self) -> usize {
        4 * (self.words.shape().num_elements() + self.scales.shape().num_elements())
    }

    /// `[E, K, N]`
    pub(super) fn widened(&self) -> Tensor<3> {
        let (words, scales) = (self.words.clone(), self.scales.clone());
        Tensor::from_dispatch(Dispatch::compact_widened(
            words.into_dispatch(),
            scales.into_dispatch(),
            self.layout,
        ))
    }

    pub(super) fn linear(&self, x: Tensor<2>) -> Tensor<2> {
        if x.dims()[0] > FEW {
            return linear(x, self.widened().squeeze_dim(0));
        }
        let (words, scales) = (self.words.clone(), self.scales.clone());
        Tensor::from_dispatch(Dispatch::compact_linear(
            x.into_dispatch(),
            words.into_dispatch(),
            scales.into_dispatch(),
            self.layout,
        ))
    }

    /// `most` is how many rows a segment may have.
    pub(super) fn grouped_linear(
        &self,
        x: Tensor<2>,
        counts: Tensor<1, Int>,
        most: usize,
    ) -> Tensor<2> {
        if most > FEW {
            return grouped_matmul(x, self.widened(), counts);
        }
        let (words, scales) = (self.words.clone(), self.scales.clone());
        Tensor::from_dispatch(Dispatch::compact_grouped_linear(
            x.into_dispatch(),
            words.into_dispatch(),
            scales.into_dispatch(),
            counts.into_dispatch(),
            most,
            self.layout,
        ))
    }
}

#[backend_extension(Cube)]
pub(crate) trait CompactOps: burn::backend::Backend {
    fn compact_widened(
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self>;

    fn compact_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self>;

    fn compact_grouped_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        counts: IntTensor<Self>,
        most: usize,
        layout: Layout,
    ) -> FloatTensor<Self>;
}
