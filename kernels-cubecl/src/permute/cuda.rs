//! What of these kernels is compiled without a device.

use burn::tensor::bf16;
use cubecl::{CompilationError, prelude::*};

use super::kernel::*;
use crate::cuda_source::{Kernels, Launch, buffer as b};

/// The programs of these kernels.
#[rustfmt::skip]
pub(crate) fn sources(kernels: &mut Kernels) -> Result<(), CompilationError> {
    let (half, int) = (bf16::elem_type_native(), i32::elem_type_native());
    let block = Launch::checked(CubeDim::new_1d(BLOCK as u32));
    let rows = Launch::checked(CubeDim::new_1d(256));
    let row = Launch::checked(CubeDim::new_1d(UNITS_PER_ROW as u32));
    kernels.add("count_blocks", block, |s, d, t| {
        count_blocks::CountBlocks::new(s, d, t, b(), b(), (), int)
    })?;
    kernels.add("sum_blocks", block, |s, d, t| {
        sum_blocks::SumBlocks::new(s, d, t, b(), b(), b(), b(), (), 256)
    })?;
    kernels.add("place_pairs", block, |s, d, t| {
        place_pairs::PlacePairs::new(s, d, t, b(), b(), b(), b(), b(), int)
    })?;
    kernels.add("permute_rows bf16x8", rows, |s, d, t| {
        permute_rows::PermuteRows::new(s, d, t, b(), b(), b(), (), (), 8, half, int)
    })?;
    kernels.add("permute_weighted_rows bf16x8", rows, |s, d, t| {
        permute_weighted_rows::PermuteWeightedRows::new(s, d, t, b(), b(), b(), b(), (), (), 8, half, int)
    })?;
    kernels.add("sum_rows bf16x8", rows, |s, d, t| {
        sum_rows::SumRows::new(s, d, t, b(), b(), b(), (), (), 8, half, int)
    })?;
    kernels.add("sum_weighted_rows bf16x8", rows, |s, d, t| {
        sum_weighted_rows::SumWeightedRows::new(s, d, t, b(), b(), b(), b(), (), (), 8, half, int)
    })?;
    kernels.add("row_products bf16x8", row, |s, d, t| {
        row_products::RowProducts::new(s, d, t, b(), b(), b(), b(), (), (), 8, half, int)
    })
}
