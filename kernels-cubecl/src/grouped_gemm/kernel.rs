//! Grouped matrix products on CubeCL devices: tiles in shared memory, sums in single precision.
//!
//! A cube computes a tile of the result. Where the segments are is known on the device alone, so that as many cubes
//! are launched as the worst case needs, and each finds its segment in `bounds` ([`segment_bounds`]).

use cubecl::prelude::*;

/// Rows and columns of a tile of the result.
pub(super) const TILE: usize = 64;
/// Elements of the sums that are in shared memory at once.
const DEPTH: usize = 16;
/// Units in each direction of a tile, and elements that each has in that direction.
pub(super) const UNITS: usize = 16;
const EACH: usize = TILE / UNITS;

/// Writes where segments start, `E + 2` numbers in rows and as many in tiles of `tile` rows. After those of the experts comes one of
/// the rows that are no expert's, and the end. One cube.
#[cube(launch)]
pub(super) fn segment_bounds<I: Int>(
    counts: &[I],       // [E]
    bounds: &mut [u32], // [2, E + 2]
    rows: u32,
    #[comptime] experts: usize,
    #[comptime] tile: u32,
    #[define(I)] _dtype: ElemType,
) {
    let mut sizes = Shared::<[u32]>::new_slice(experts);
    for expert in range_stepped(UNIT_POS as usize, experts, UNITS * UNITS) {
        sizes[expert] = u32::cast_from(counts[expert]);
    }
    sync_cube();
    for segment in range_stepped(UNIT_POS as usize, experts + 2, UNITS * UNITS) {
        let mut start = 0u32;
        let mut tiles = 0u32;
        for earlier in 0..experts {
            if earlier < segment {
                start += sizes[earlier];
                tiles += sizes[earlier].div_ceil(tile);
            }
        }
        if segment > experts {
            tiles += (rows - start).div_ceil(tile);
            start = rows;
        }
        bounds[segment] = start;
        bounds[experts + 2 + segment] = tiles;
    }
}

/// The last segment whose first tile is not after `tile`: empty ones start with the segment behind them.
#[cube]
pub(crate) fn segment_of(bounds: &[u32], tile: u32) -> usize {
    let experts = bounds.len() / 2 - 2;
    let mut segment = 0;
    let mut after = experts + 1;
    while after - segment > 1 {
        let middle = (segment + after) / 2;
        if bounds[experts + 2 + middle] <= tile {
            segment = middle;
        } else {
            after = middle;
        }
    }
    segment
}

/// The first row of a tile in its segment, and the end of the segment's.
#[cube]
pub(crate) fn rows_of(
    bounds: &[u32],
    segment: usize,
    tile: u32,
    #[comptime] height: usize,
) -> (usize, usize) {
    let tiles_before = bounds[bounds.len() / 2 + segment];
    let first = bounds[segment] + (tile - tiles_before) * height as u32;
    (first as usize, bounds[segment + 1] as usize)
}

/// `out_e = x_e W_e`, or `x_e W_e^T` with `transposed`; zero for rows that are no expert's.
#[cube(launch, address_type = "dynamic")]
pub(super) fn segment_matmul<F: Float>(
    x: &[F],        // [R, inner]
    weights: &[F],  // [E, inner, width], transposed [E, width, inner]
    bounds: &[u32], // [2, E + 2]
    out: &mut [F],  // [R, width]
    inner: usize,
    width: usize,
    #[comptime] transposed: bool,
    #[define(F)] _dtype: ElemType,
) {
    let experts = bounds.len() / 2 - 2;
    let tile = CUBE_POS_X;
    if tile >= bounds[2 * experts + 3] {
        terminate!();
    }
    let segment = segment_of(bounds, tile);
    let (first, end) = rows_of(bounds, segment, tile, TILE);
    let first_column = CUBE_POS_Y as usize * TILE;

    let mut left = Shared::<[f32]>::new_slice(DEPTH * TILE);
    let mut right = Shared::<[f32]>::new_slice(DEPTH * TILE);
    let mut sums = zeros(EACH * EACH);
    if segment < experts {
        let matrix = segment * inner * width;
        for depth in range_stepped(0, inner, DEPTH) {
            for at in range_stepped(UNIT_POS as usize, DEPTH * TILE, UNITS * UNITS) {
                // Neighbouring units read neighbouring elements.
                let along = at % DEPTH;
                let across = at / DEPTH;
                let mut value = 0.0f32;
                if first + across < end && depth + along < inner {
                    value = f32::cast_from(x[(first + across) * inner + depth + along]);
                }
                left[along * TILE + across] = value;

                let mut value = 0.0f32;
                if transposed {
                    if first_column + across < width && depth + along < inner {
                        let row = matrix + (first_column + across) * inner;
                        value = f32::cast_from(weights[row + depth + along]);
                    }
                    right[along * TILE + across] = value;
                } else {
                    let k = at / TILE;
                    let column = at % TILE;
                    if depth + k < inner && first_column + column < width {
                        let row = matrix + (depth + k) * width;
                        value = f32::cast_from(weights[row + first_column + column]);
                    }
                    right[at] = value;
                }
            }
            sync_cube();
            add_products(&mut left, &mut right, &mut sums);
            sync_cube();
        }
    }
    write_tile(&sums, out, first, end, first_column, width);
}

/// `dW_e = x_e^T dy_e`, zero for an empty segment.
#[cube(launch, address_type = "dynamic")]
pub(super) fn segment_matmul_weight_grad<F: Float>(
    x: &[F],        // [R, height]
    grad: &[F],     // [R, width]
    bounds: &[u32], // [2, E + 2]
    out: &mut [F],  // [E, height, width]
    height: usize,
    width: usize,
    #[define(F)] _dtype: ElemType,
) {
    let expert = CUBE_POS_Z as usize;
    let start = bounds[expert] as usize;
    let end = bounds[expert + 1] as usize;
    let first_row = CUBE_POS_Y as usize * TILE;
    let first_column = CUBE_POS_X as usize * TILE;

    let mut left = Shared::<[f32]>::new_slice(DEPTH * TILE);
    let mut right = Shared::<[f32]>::new_slice(DEPTH * TILE);
    let mut sums = zeros(EACH * EACH);
    for depth in range_stepped(start, end, DEPTH) {
        for at in range_stepped(UNIT_POS as usize, DEPTH * TILE, UNITS * UNITS) {
            let k = depth + at / TILE;
            let row = first_row + at % TILE;
            let column = first_column + at % TILE;
            let mut value = 0.0f32;
            if k < end && row < height {
                value = f32::cast_from(x[k * height + row]);
            }
            left[at] = value;
            let mut value = 0.0f32;
            if k < end && column < width {
                value = f32::cast_from(grad[k * width + column]);
            }
            right[at] = value;
        }
        sync_cube();
        add_products(&mut left, &mut right, &mut sums);
        sync_cube();
    }
    let matrix = expert * height;
    write_tile(
        &sums,
        out,
        matrix + first_row,
        matrix + height,
        first_column,
        width,
    );
}

#[cube]
pub(crate) fn zeros(#[comptime] length: usize) -> Array<f32> {
    let mut sums = Array::<f32>::new(length);
    #[unroll]
    for at in 0..length {
        sums[at] = 0.0;
    }
    sums
}

/// Adds the product of `left`, transposed, and `right`. A unit has every sixteenth row and column of the tile.
#[cube]
fn add_products(left: &mut Shared<[f32]>, right: &mut Shared<[f32]>, sums: &mut Array<f32>) {
    for k in 0..DEPTH {
        let mut row = Array::<f32>::new(EACH);
        let mut column = Array::<f32>::new(EACH);
        #[unroll]
        for each in 0..EACH {
            row[each] = left[k * TILE + each * UNITS + UNIT_POS_Y as usize];
            column[each] = right[k * TILE + each * UNITS + UNIT_POS_X as usize];
        }
        #[unroll]
        for i in 0..EACH {
            #[unroll]
            for j in 0..EACH {
                sums[i * EACH + j] += row[i] * column[j];
            }
        }
    }
}

/// Writes what of the tile is before row `end` and column `width`.
#[cube]
fn write_tile<F: Float>(
    sums: &Array<f32>,
    out: &mut [F],
    first: usize,
    end: usize,
    first_column: usize,
    width: usize,
) {
    #[unroll]
    for i in 0..EACH {
        #[unroll]
        for j in 0..EACH {
            let row = first + i * UNITS + UNIT_POS_Y as usize;
            let column = first_column + j * UNITS + UNIT_POS_X as usize;
            if row < end && column < width {
                out[row * width + column] = F::cast_from(sums[i * EACH + j]);
            }
        }
    }
}
