//! Which tiles of rows of a grouped product are of which expert, found on the device.

use cubecl::prelude::*;

use super::TILE;

/// Units of a cube.
pub(crate) const UNITS: u32 = 128;

/// The expert of each tile of 128 rows: as many experts' segments end before it or where it starts. Segments are
/// `counts` rows, padded to a multiple of 128; tiles behind the last have the number of experts.
#[cube(launch)]
pub(crate) fn tile_experts<I: Int>(
    counts: &[I],             // [E]
    tile_experts: &mut [u32], // [ceil(S / 128)]
    #[define(I)] _dtype: ElemType,
) {
    let tile = ABSOLUTE_POS;
    if tile >= tile_experts.len() {
        terminate!();
    }
    let mut end = 0u32;
    let mut expert = 0u32;
    #[allow(
        clippy::needless_range_loop,
        reason = "kernels have no iterators over slices"
    )]
    for at in 0..counts.len() {
        end += u32::cast_from(counts[at]).div_ceil(TILE);
        expert += u32::cast_from(end <= tile as u32);
    }
    tile_experts[tile] = expert;
}

/// The first tile of each expert's segment, and of what follows the last: segments as for [`tile_experts`].
#[cube(launch)]
pub(crate) fn segment_starts<I: Int>(
    counts: &[I],       // [E]
    starts: &mut [u32], // [E + 1]
    #[define(I)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= starts.len() {
        terminate!();
    }
    let mut start = 0u32;
    #[allow(
        clippy::needless_range_loop,
        reason = "kernels have no iterators over slices"
    )]
    for at in 0..ABSOLUTE_POS {
        start += u32::cast_from(counts[at]).div_ceil(TILE);
    }
    starts[ABSOLUTE_POS] = start;
}
