//! Attention over the latent cache on CubeCL devices, split over the length of the cache (flash-decoding).
//!
//! The queries of a sequence are T H rows, a row one head of one token. A cube of [`attend`] has sixteen rows and one
//! chunk of the cache, which it goes through in tiles of 128 positions: scores by products from shared memory, in which
//! the latents are loaded once for all rows; the softmax as it goes, with the highest score so far; then the weighted
//! sum, in which a unit has some channels of all rows, so that it alone reads their latents. [`merge`] adds up the
//! chunks of a row.
//!
//! A chunk that no row sees writes nothing and is not read by [`merge`], which knows as much from the length. Sums are
//! in single precision and in an order that depends on shapes alone. There are no plane operations, so planes may have
//! any size, and there is no arithmetic with infinities, whatever a shading language says about them.

use cubecl::prelude::*;

/// Units of a cube.
pub(super) const UNITS: usize = 128;
/// Rows of a cube of [`attend`].
pub(super) const ROWS: usize = 16;
/// Positions of a tile, of which chunks are multiples.
pub(super) const KEYS: usize = 128;
/// Channels that are in shared memory at once.
const DEPTH: usize = 16;
/// Rows, and positions, whose scores a unit has.
const EACH: usize = 4;
/// Units that share their rows. Their positions are this far apart.
const ACROSS: usize = KEYS / EACH;
/// Distances in shared memory that spread what neighbouring units write over the banks. That of rows keeps four of them
/// together, to be read at once.
const KEY_PITCH: usize = KEYS + 2;
const ROW_PITCH: usize = ROWS + 4;
/// Below every score.
pub(super) const LOWEST: f32 = f32::MIN;

/// What the kernels are specialised for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Widths {
    /// H
    pub(super) heads: usize,
    /// C
    pub(super) latent: usize,
    /// R
    pub(super) rope: usize,
}

/// Rows and positions of a tile of scores, counted over all sequences.
#[derive(CubeType)]
struct Tile {
    first_row: usize,
    end_row: usize,
    first_key: usize,
    end_key: usize,
}

/// Writes, for every row and chunk, the highest score, the sum of `e^(score - highest)`, and the latents summed with
/// these weights.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn attend<F: Float, I: Int>(
    q_latent: &[F],      // [B, T, H, C]
    q_pe: &[F],          // [B, T, H, R]
    c_kv: &[F],          // [B, S, C]
    k_pe: &[F],          // [B, S, R]
    lengths: &[I],       // [B]
    sums: &mut [f32],    // [B, T, H, chunks, C]
    softmax: &mut [f32], // [B, T, H, chunks, 2]
    queries: usize,
    positions: usize,
    chunks: usize,
    chunk: usize,
    #[comptime] widths: Widths,
    #[define(F)] _float: ElemType,
    #[define(I)] _int: ElemType,
) {
    let heads = comptime!(widths.heads);
    let latent = comptime!(widths.latent);
    let rope = comptime!(widths.rope);
    let channels = comptime!(widths.latent.div_ceil(UNITS));
    let unit = UNIT_POS as usize;
    let rows = queries * heads;
    let tiles = rows.div_ceil(ROWS);
    let first_row = CUBE_POS % tiles * ROWS;
    let of_chunk = CUBE_POS / tiles % chunks;
    let batch = CUBE_POS / tiles / chunks;
    if batch >= lengths.len() {
        terminate!();
    }
    let length = i32::cast_from(lengths[batch]);
    let last_row = min(first_row + ROWS, rows) - 1;
    let start = of_chunk * chunk;
    let seen = visible(length, last_row / heads, queries, positions);
    let end = min(start + chunk, seen);
    if start >= end {
        terminate!();
    }

    let mut left = Shared::<[f32]>::new_slice(comptime!(DEPTH * ROW_PITCH));
    // Latents by channel, and then weights by position.
    let mut right = Shared::<[f32]>::new_slice(comptime!(KEYS * ROW_PITCH));
    let mut partial = Shared::<[f32]>::new_slice(comptime!(ACROSS * ROW_PITCH));
    let mut factors = Shared::<[f32]>::new_slice(ROWS);
    let mut maxima = Shared::<[f32]>::new_slice(ROWS);
    let mut sum = Array::<f32>::new(comptime!(ROWS * channels));
    #[unroll]
    for at in 0..comptime!(ROWS * channels) {
        sum[at] = 0.0;
    }
    // Of the row of the unit's number, for the first units.
    let mut highest = LOWEST.runtime();
    let mut total = 0.0f32;
    let own_row = unit / ACROSS * EACH;
    let own_key = unit % ACROSS;

    for tile_start in range_stepped(start, end, KEYS) {
        let tile = Tile {
            first_row: batch * rows + first_row,
            end_row: batch * rows + rows,
            first_key: batch * positions + tile_start,
            end_key: batch * positions + end,
        };
        let mut scores = Array::<f32>::new(comptime!(EACH * EACH));
        #[unroll]
        for at in 0..comptime!(EACH * EACH) {
            scores[at] = 0.0;
        }
        add_scores(
            q_latent,
            c_kv,
            &tile,
            &mut left,
            &mut right,
            &mut scores,
            latent,
        );
        add_scores(q_pe, k_pe, &tile, &mut left, &mut right, &mut scores, rope);

        let mut seen = Array::<usize>::new(EACH);
        #[unroll]
        for i in 0..EACH {
            let row = first_row + own_row + i;
            seen[i] = min(visible(length, row / heads, queries, positions), end);
            let mut best = LOWEST.runtime();
            #[unroll]
            for j in 0..EACH {
                if tile_start + own_key + j * ACROSS < seen[i] {
                    best = max(best, scores[i * EACH + j]);
                }
            }
            partial[own_key * ROW_PITCH + own_row + i] = best;
        }
        sync_cube();
        if unit < ROWS {
            let mut best = highest;
            for from in 0..ACROSS {
                best = max(best, partial[from * ROW_PITCH + unit]);
            }
            factors[unit] = (highest - best).exp();
            maxima[unit] = best;
            highest = best;
        }
        sync_cube();

        #[unroll]
        for i in 0..EACH {
            let best = maxima[own_row + i];
            let mut weights = 0.0f32;
            #[unroll]
            for j in 0..EACH {
                let key = own_key + j * ACROSS;
                let mut weight = 0.0f32;
                if tile_start + key < seen[i] {
                    weight = (scores[i * EACH + j] - best).exp();
                }
                weights += weight;
                right[key * ROW_PITCH + own_row + i] = weight;
            }
            partial[own_key * ROW_PITCH + own_row + i] = weights;
        }
        sync_cube();
        if unit < ROWS {
            let mut added = 0.0f32;
            for from in 0..ACROSS {
                added += partial[from * ROW_PITCH + unit];
            }
            total = total * factors[unit] + added;
        }
        #[unroll]
        for row in 0..ROWS {
            let factor = factors[row];
            #[unroll]
            for channel in 0..channels {
                sum[row * channels + channel] *= factor;
            }
        }
        for key in 0..min(KEYS, end - tile_start) {
            let first = (tile.first_key + key) * latent;
            let mut values = Array::<f32>::new(channels);
            #[unroll]
            for channel in 0..channels {
                let at = channel * UNITS + unit;
                values[channel] = 0.0;
                if at < latent {
                    values[channel] = f32::cast_from(c_kv[first + at]);
                }
            }
            #[unroll]
            for row in 0..ROWS {
                let weight = right[key * ROW_PITCH + row];
                #[unroll]
                for channel in 0..channels {
                    sum[row * channels + channel] += weight * values[channel];
                }
            }
        }
        sync_cube();
    }

    #[unroll]
    for row in 0..ROWS {
        if first_row + row < rows {
            let part = (batch * rows + first_row + row) * chunks + of_chunk;
            #[unroll]
            for channel in 0..channels {
                let at = channel * UNITS + unit;
                if at < latent {
                    sums[part * latent + at] = sum[row * channels + channel];
                }
            }
        }
    }
    if unit < ROWS && first_row + unit < rows {
        let part = (batch * rows + first_row + unit) * chunks + of_chunk;
        softmax[part * 2] = highest;
        softmax[part * 2 + 1] = total;
    }
}

/// Adds up the chunks of a row. One cube per row.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn merge<F: Float, I: Int>(
    sums: &[f32],    // [B, T, H, chunks, C]
    softmax: &[f32], // [B, T, H, chunks, 2]
    lengths: &[I],   // [B]
    out: &mut [F],   // [B, T, H, C]
    queries: usize,
    positions: usize,
    chunks: usize,
    chunk: usize,
    #[comptime] widths: Widths,
    #[define(F)] _float: ElemType,
    #[define(I)] _int: ElemType,
) {
    let heads = comptime!(widths.heads);
    let latent = comptime!(widths.latent);
    let row = CUBE_POS;
    let batch = row / heads / queries;
    if batch >= lengths.len() {
        terminate!();
    }
    let length = i32::cast_from(lengths[batch]);
    let seen = visible(length, row / heads % queries, queries, positions);
    let used = seen.div_ceil(chunk);
    let first = row * chunks;
    let mut highest = LOWEST.runtime();
    for part in first..first + used {
        highest = max(highest, softmax[part * 2]);
    }
    for at in range_stepped(UNIT_POS as usize, latent, UNITS) {
        let mut total = 0.0f32;
        let mut sum = 0.0f32;
        for part in first..first + used {
            let factor = (softmax[part * 2] - highest).exp();
            total += factor * softmax[part * 2 + 1];
            sum += factor * sums[part * latent + at];
        }
        let mut value = 0.0f32;
        if used > 0 {
            value = sum / total;
        }
        out[row * latent + at] = F::cast_from(value);
    }
}

/// How many positions query `query` of `queries` sees.
#[cube]
pub(super) fn visible(length: i32, query: usize, queries: usize, positions: usize) -> usize {
    let seen = length + (query + 1) as i32 - queries as i32;
    min(max(seen, 0i32) as usize, positions)
}

/// Adds the products of rows of `queries` and `keys`. A unit has four neighbouring rows and four positions that are
/// [`ACROSS`] apart.
#[cube]
fn add_scores<F: Float>(
    queries: &[F], // [rows, width]
    keys: &[F],    // [positions, width]
    tile: &Tile,
    left: &mut Shared<[f32]>,
    right: &mut Shared<[f32]>,
    scores: &mut Array<f32>,
    #[comptime] width: usize,
) {
    let unit = UNIT_POS as usize;
    for depth in range_stepped(0, width, DEPTH) {
        // Neighbouring units read neighbouring elements.
        #[unroll]
        for step in 0..comptime!(ROWS * DEPTH / UNITS) {
            let at = step * UNITS + unit;
            let along = at % DEPTH;
            let row = at / DEPTH;
            let mut value = 0.0f32;
            if tile.first_row + row < tile.end_row && depth + along < width {
                value = f32::cast_from(queries[(tile.first_row + row) * width + depth + along]);
            }
            left[along * ROW_PITCH + row] = value;
        }
        #[unroll]
        for step in 0..comptime!(KEYS * DEPTH / UNITS) {
            let at = step * UNITS + unit;
            let along = at % DEPTH;
            let key = at / DEPTH;
            let mut value = 0.0f32;
            if tile.first_key + key < tile.end_key && depth + along < width {
                value = f32::cast_from(keys[(tile.first_key + key) * width + depth + along]);
            }
            right[along * KEY_PITCH + key] = value;
        }
        sync_cube();
        for along in 0..DEPTH {
            let mut row = Array::<f32>::new(EACH);
            let mut key = Array::<f32>::new(EACH);
            #[unroll]
            for each in 0..EACH {
                row[each] = left[along * ROW_PITCH + unit / ACROSS * EACH + each];
                key[each] = right[along * KEY_PITCH + unit % ACROSS + each * ACROSS];
            }
            #[unroll]
            for i in 0..EACH {
                #[unroll]
                for j in 0..EACH {
                    scores[i * EACH + j] += row[i] * key[j];
                }
            }
        }
        sync_cube();
    }
}
