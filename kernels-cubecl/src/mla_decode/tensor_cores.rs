//! Attention over the latent cache on the tensor cores of NVIDIA GPUs (sm_80 and later), in bf16.
//!
//! A cube has some rows, heads of tokens, and one chunk of the cache. Its queries stay in shared memory. The chunk
//! comes in tiles of positions, copied while the tile before is computed where there is room for two. A tile is there
//! once and is both operands: its latents and rotated parts are the keys of the scores, its latents alone the values of
//! the sums.
//!
//! - Scores: a warp has sixteen rows and a part of the positions. The highest score of a row is found within the warp,
//!   then over the parts through shared memory. Weights, `e^(score - highest)`, are rounded to bf16 and shared.
//! - Sums: a warp has all rows and a part of the channels, in registers from the first tile to the last.
//!
//! Products are of bf16 and sums of them in single precision, as the softmax is. The total of a row's weights is of the
//! rounded ones, so that what the latents are multiplied with adds up to one.

use cubecl::prelude::*;

use super::{
    copies::{Lines, copy_rows},
    kernel::{LOWEST, Widths, visible},
    shape::{FRAGMENT, Shape, WARP},
};
use crate::warp::{
    Chunk, Sums, load_matrices, multiply, other, pitch, place, rounded, shared_rows,
    wait_for_all_copies,
};

/// Steps of sixteen channels whose operands are loaded together.
const TOGETHER: usize = 4;

/// As [`super::kernel::attend`]: for every row and chunk the highest score, the sum of the weights, and the latents
/// summed with them. Chunks are multiples of `shape.keys`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn attend_bf16<I: Int>(
    q_latent: &[Vector<u32, Const<4>>],    // [B, T, H, C]
    q_pe: &[Vector<u32, Const<4>>],        // [B, T, H, R]
    c_kv: &[Vector<u32, Const<4>>],        // [B, S, C]
    k_pe: &[Vector<u32, Const<4>>],        // [B, S, R]
    lengths: &[I],                         // [B]
    sums: &mut [Vector<f32, Const<2>>],    // [B, T, H, chunks, C]
    softmax: &mut [Vector<f32, Const<2>>], // [B, T, H, chunks, 2]
    queries: usize,
    positions: usize,
    chunks: usize,
    chunk: usize,
    #[comptime] widths: Widths,
    #[comptime] shape: Shape,
    #[define(I)] _int: ElemType,
) {
    let (heads, latent, rope) = comptime!((widths.heads, widths.latent, widths.rope));
    let (keys, parts) = comptime!((shape.keys, shape.parts()));
    let row_tiles = comptime!(shape.rows / FRAGMENT);
    // Of a warp: eights of the positions of a tile, and sixteens of channels.
    let key_eights = comptime!(keys / parts / 8);
    let channel_tiles = comptime!((latent / FRAGMENT).div_ceil(shape.units / WARP));
    let (row_pitch, weight_pitch) = comptime!((pitch(latent + rope) as u32, pitch(keys) as u32));

    let rows = queries * heads;
    let tiles = rows.div_ceil(shape.rows);
    let first_row = CUBE_POS % tiles * shape.rows;
    let of_chunk = CUBE_POS / tiles % chunks;
    let batch = CUBE_POS / tiles / chunks;
    if batch >= lengths.len() {
        terminate!();
    }
    let length = i32::cast_from(lengths[batch]);
    let last_row = min(first_row + shape.rows, rows) - 1;
    let start = of_chunk * chunk;
    let seen = visible(length, last_row / heads, queries, positions);
    let end = min(start + chunk, seen);
    if start >= end {
        terminate!();
    }

    let mut q = shared_rows(shape.rows, row_pitch);
    let mut stages = shared_rows(comptime!(shape.stages * keys), row_pitch);
    let mut weights = shared_rows(shape.rows, weight_pitch);
    let mut by_part = Shared::<[f32]>::new_slice(comptime!(shape.rows * parts));
    let mut by_row = Shared::<[f32]>::new_slice(shape.rows);

    let (lane, warp) = (UNIT_POS % 32, UNIT_POS / 32);
    // For scores: the warp's rows and part of the positions, of which a unit has two rows, eight apart, and pairs of
    // positions.
    let (warp_row, part) = (warp / parts as u32 * 16, warp % parts as u32);
    let own_row = warp_row + lane / 4;
    let warp_key = part * comptime!((key_eights * 8) as u32);
    let own_key = warp_key + lane % 4 * 2;
    let mut own_seen = Array::<usize>::new(2usize);
    let mut highest = Array::<f32>::new(2usize);
    let mut total = Array::<f32>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        let row = first_row + own_row as usize + half * 8;
        own_seen[half] = min(visible(length, row / heads, queries, positions), end);
        highest[half] = LOWEST.runtime();
        total[half] = 0.0f32;
    }
    let mut sum = Array::<Sums>::new(comptime!(channel_tiles * row_tiles * 2));
    #[unroll]
    for at in 0..comptime!(channel_tiles * row_tiles * 2) {
        sum[at] = Vector::<f32, Const<4>>::new(0.0f32);
    }

    let lines = Lines {
        first: batch * rows + first_row,
        end: batch * rows + rows,
        to: 0u32,
    };
    copy_rows(
        q_latent,
        q_pe,
        &mut q,
        &lines,
        shape.rows,
        widths,
        shape.units,
    );
    let lines = Lines {
        first: batch * positions + start,
        end: batch * positions + end,
        to: 0u32,
    };
    copy_rows(c_kv, k_pe, &mut stages, &lines, keys, widths, shape.units);

    for tile in 0..(end - start).div_ceil(keys) {
        let stage = (tile % shape.stages) as u32 * keys as u32;
        let tile_start = start + tile * keys;
        wait_for_all_copies();
        // The tile is there for all, and all are done with the one before.
        sync_cube();
        let next = Lines {
            first: batch * positions + tile_start + keys,
            end: batch * positions + end,
            to: (tile + 1) as u32 % shape.stages as u32 * keys as u32,
        };
        if comptime!(shape.stages > 1) && next.first < next.end {
            copy_rows(c_kv, k_pe, &mut stages, &next, keys, widths, shape.units);
        }

        let mut scores = Array::<Sums>::new(key_eights);
        #[unroll]
        for at in 0..key_eights {
            scores[at] = Vector::<f32, Const<4>>::new(0.0f32);
        }
        let steps = comptime!((latent + rope) / 16);
        let whole = comptime!(steps / TOGETHER);
        let key_tiles = comptime!(key_eights / 2);
        let of = Operands {
            q_row: warp_row,
            key_row: stage + warp_key,
        };
        for group in 0..whole as u32 {
            add_scores(
                &q,
                &stages,
                &of,
                &mut scores,
                group,
                TOGETHER,
                key_tiles,
                row_pitch,
            );
        }
        if comptime!(steps % TOGETHER > 0) {
            let rest = comptime!(steps % TOGETHER);
            let group = comptime!(whole as u32);
            add_scores(
                &q,
                &stages,
                &of,
                &mut scores,
                group,
                rest,
                key_tiles,
                row_pitch,
            );
        }

        #[unroll]
        for half in 0..2usize {
            let mut best = LOWEST.runtime();
            #[unroll]
            for at in 0..key_eights {
                #[unroll]
                for e in 0..2usize {
                    let key = tile_start + own_key as usize + comptime!(at * 8 + e);
                    let score = scores[at].extract(comptime!(half * 2 + e));
                    best = max(best, select(key < own_seen[half], score, LOWEST.runtime()));
                }
            }
            best = max(best, other(best, 1u32));
            best = max(best, other(best, 2u32));
            if lane % 4 == 0 {
                by_part[(part * shape.rows as u32 + own_row) as usize + half * 8] = best;
            }
        }
        sync_cube();
        #[unroll]
        for half in 0..2usize {
            let row = own_row + comptime!(half as u32 * 8);
            let mut best = highest[half];
            #[unroll]
            for from in 0..parts {
                best = max(best, by_part[comptime!(from * shape.rows) + row as usize]);
            }
            let factor = (highest[half] - best).exp();
            highest[half] = best;
            if part == 0 && lane % 4 == 0 {
                by_row[row as usize] = factor;
            }
            let mut added = 0.0f32;
            #[unroll]
            for at in 0..key_eights {
                let key = tile_start + own_key as usize + comptime!(at * 8);
                let first = (scores[at].extract(comptime!(half * 2)) - best).exp();
                let second = (scores[at].extract(comptime!(half * 2 + 1)) - best).exp();
                let pair = rounded(
                    select(key < own_seen[half], first, 0.0f32),
                    select(key + 1 < own_seen[half], second, 0.0f32),
                );
                added += f32::reinterpret(pair << 16u32) + f32::reinterpret(pair & 0xffff_0000u32);
                let chunk = warp_key / 8 + comptime!(at as u32);
                weights[(place(row, chunk, weight_pitch) + lane % 4) as usize] = pair;
            }
            total[half] = total[half] * factor + added;
        }
        sync_cube();

        #[unroll]
        for i in 0..row_tiles {
            let row = comptime!(i as u32 * 16) + lane / 4;
            let (upper, lower) = (by_row[row as usize], by_row[row as usize + 8]);
            let mut factors = Vector::<f32, Const<4>>::empty();
            factors.insert(0usize, upper);
            factors.insert(1usize, upper);
            factors.insert(2usize, lower);
            factors.insert(3usize, lower);
            #[unroll]
            for at in 0..comptime!(channel_tiles * 2) {
                sum[comptime!(at * row_tiles + i)] *= factors;
            }
        }
        #[unroll]
        for step in 0..comptime!(keys / 16) {
            let mut left = Array::<Chunk>::new(row_tiles);
            #[unroll]
            for i in 0..row_tiles {
                let row = comptime!(i as u32 * 16) + lane % 16;
                let chunk = comptime!(step as u32 * 2) + lane / 16;
                left[i] = load_matrices(&weights, place(row, chunk, weight_pitch), false);
            }
            #[unroll]
            for channels in 0..channel_tiles {
                let row = stage + comptime!(step as u32 * 16) + lane % 16;
                let chunk = channel_tile(warp, channels, latent, shape) * 2 + lane / 16;
                let right = load_matrices(&stages, place(row, chunk, row_pitch), true);
                #[unroll]
                for i in 0..row_tiles {
                    let at = comptime!(channels * 2 * row_tiles + i);
                    sum[at] = multiply(
                        left[i],
                        right.extract(0usize),
                        right.extract(1usize),
                        sum[at],
                    );
                    let at = comptime!((channels * 2 + 1) * row_tiles + i);
                    sum[at] = multiply(
                        left[i],
                        right.extract(2usize),
                        right.extract(3usize),
                        sum[at],
                    );
                }
            }
        }
        if comptime!(shape.stages == 1) && next.first < next.end {
            sync_cube();
            copy_rows(c_kv, k_pe, &mut stages, &next, keys, widths, shape.units);
        }
    }

    #[unroll]
    for i in 0..comptime!(row_tiles * 2) {
        let row = first_row + (lane / 4) as usize + comptime!(i * 8);
        if row < rows {
            let of_row = ((batch * rows + row) * chunks + of_chunk) * comptime!(latent / 2);
            #[unroll]
            for at in 0..comptime!(channel_tiles * 2) {
                let tile = channel_tile(warp, comptime!(at / 2), latent, shape);
                let pair = tile * 8 + comptime!(at as u32 % 2 * 4) + lane % 4;
                let from = sum[comptime!(at * row_tiles + i / 2)];
                let mut written = Vector::<f32, Const<2>>::empty();
                written.insert(0usize, from.extract(comptime!(i % 2 * 2)));
                written.insert(1usize, from.extract(comptime!(i % 2 * 2 + 1)));
                sums[of_row + pair as usize] = written;
            }
        }
    }
    // All are done with the last factors.
    sync_cube();
    #[unroll]
    for half in 0..2usize {
        let mut all = total[half];
        all += other(all, 1u32);
        all += other(all, 2u32);
        if lane % 4 == 0 {
            let row = own_row as usize + half * 8;
            by_part[(part * shape.rows as u32) as usize + row] = all;
            if part == 0 {
                by_row[row] = highest[half];
            }
        }
    }
    sync_cube();
    let row = UNIT_POS as usize;
    if row < shape.rows && first_row + row < rows {
        let mut all = 0.0f32;
        #[unroll]
        for from in 0..parts {
            all += by_part[comptime!(from * shape.rows) + row];
        }
        let mut written = Vector::<f32, Const<2>>::empty();
        written.insert(0usize, by_row[row]);
        written.insert(1usize, all);
        softmax[(batch * rows + first_row + row) * chunks + of_chunk] = written;
    }
}

/// The number of the warp's tile of sixteen channels. A warp that has one less takes the last again.
#[cube]
fn channel_tile(
    warp: u32,
    #[comptime] number: usize,
    #[comptime] latent: usize,
    #[comptime] shape: Shape,
) -> u32 {
    let (tiles, warps) = comptime!((latent / FRAGMENT, shape.units / WARP));
    let mut tile = comptime!((number * warps) as u32) + warp;
    if comptime!((number + 1) * warps > tiles) {
        tile = min(tile, comptime!(tiles as u32 - 1));
    }
    tile
}

/// The first of the warp's rows of queries and of keys.
#[derive(CubeType, Clone, Copy)]
struct Operands {
    q_row: u32,
    key_row: u32,
}

/// Adds the products of `steps` times sixteen channels, behind [`TOGETHER`] times `group` of them.
#[cube]
fn add_scores(
    q: &Shared<[u32]>,
    stages: &Shared<[u32]>,
    of: &Operands,
    scores: &mut Array<Sums>,
    group: u32,
    #[comptime] steps: usize,
    #[comptime] key_tiles: usize,
    #[comptime] pitch: u32,
) {
    let lane = UNIT_POS % 32;
    let mut rows = Array::<Chunk>::new(steps);
    let mut keys = Array::<Chunk>::new(comptime!(steps * key_tiles));
    #[unroll]
    for step in 0..steps {
        let chunk = group * comptime!(TOGETHER as u32 * 2) + comptime!(step as u32 * 2);
        let row = of.q_row + lane % 16;
        rows[step] = load_matrices(q, place(row, chunk + lane / 16, pitch), false);
        #[unroll]
        for tile in 0..key_tiles {
            let row = of.key_row + comptime!(tile as u32 * 16) + lane / 16 * 8 + lane % 8;
            let at = place(row, chunk + lane / 8 % 2, pitch);
            keys[comptime!(step * key_tiles + tile)] = load_matrices(stages, at, false);
        }
    }
    #[unroll]
    for step in 0..steps {
        #[unroll]
        for tile in 0..key_tiles {
            let key = keys[comptime!(step * key_tiles + tile)];
            let at = comptime!(tile * 2);
            scores[at] = multiply(
                rows[step],
                key.extract(0usize),
                key.extract(1usize),
                scores[at],
            );
            let at = comptime!(tile * 2 + 1);
            scores[at] = multiply(
                rows[step],
                key.extract(2usize),
                key.extract(3usize),
                scores[at],
            );
        }
    }
}
