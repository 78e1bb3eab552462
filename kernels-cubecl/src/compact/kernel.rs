//! Products of few rows with compact matrices on CubeCL devices, which read every weight once for all rows of a tile.
//!
//! A cube computes a tile of the result: up to eight rows, and as many columns as a scale covers. Its planes share the inner
//! size, the units of a plane the columns, four for each, so that a plane reads 128 or 256 bytes that follow each other.

use cubecl::prelude::*;

use super::words::QUAD;
use crate::{
    fp8::TILE,
    grouped_gemm::kernel::{rows_of, segment_of, zeros},
};

/// Units that share the columns.
const LANES: usize = TILE / QUAD;
/// Parts of the inner size that are summed side by side.
const SLICES: usize = 8;
/// Units of a cube.
pub(super) const UNITS: usize = LANES * SLICES;
/// Weights of a column that a unit reads before it multiplies; they have one scale.
const DEPTH: usize = 8;
/// The most rows of a tile.
pub(super) const ROWS: usize = 8;

/// `out_e = x_e W_e`; zero for rows that are no expert's.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn few_rows_by_segment(
    x: &[f32],       // [R, K]
    words: &[u32],   // [E, K, ceil(N / 4), 1 or 2]
    scales: &[f32],  // [E, ceil(K / 128), ceil(N / 128)]
    bounds: &[u32],  // [2, E + 2]
    out: &mut [f32], // [R, N]
    inner: usize,
    width: usize,
    #[comptime] rows: usize,
    #[comptime] fp8: bool,
) {
    let experts = bounds.len() / 2 - 2;
    let tile = CUBE_POS_X;
    if tile >= bounds[2 * experts + 3] {
        terminate!();
    }
    let segment = segment_of(bounds, tile);
    let (first, end) = rows_of(bounds, segment, tile, rows);
    let mut sums = zeros(rows * QUAD);
    if segment < experts {
        add_products(
            x, words, scales, &mut sums, segment, first, end, inner, width, rows, fp8,
        );
    }
    write_tile(&sums, out, first, end, width, rows);
}

/// `out = x W`
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn few_rows(
    x: &[f32],       // [M, K]
    words: &[u32],   // [K, ceil(N / 4), 1 or 2]
    scales: &[f32],  // [ceil(K / 128), ceil(N / 128)]
    out: &mut [f32], // [M, N]
    inner: usize,
    width: usize,
    #[comptime] rows: usize,
    #[comptime] fp8: bool,
) {
    let first = CUBE_POS_X as usize * rows;
    let end = out.len() / width;
    let mut sums = zeros(rows * QUAD);
    add_products(
        x, words, scales, &mut sums, 0, first, end, inner, width, rows, fp8,
    );
    write_tile(&sums, out, first, end, width, rows);
}

/// The matrices in single precision, a quad for each unit.
#[cube(launch, address_type = "dynamic")]
pub(super) fn widen(
    words: &[u32],   // [E, K, ceil(N / 4), 1 or 2]
    scales: &[f32],  // [E, ceil(K / 128), ceil(N / 128)]
    out: &mut [f32], // [E, K, N]
    inner: usize,
    width: usize,
    #[comptime] fp8: bool,
) {
    let quads = width.div_ceil(QUAD);
    let row = ABSOLUTE_POS / quads;
    let column = ABSOLUTE_POS % quads * QUAD;
    if row * width < out.len() {
        let size = comptime!(words_of_quad(fp8));
        let mut quad = Array::<u32>::new(size);
        #[unroll]
        for at in 0..size {
            quad[at] = words[ABSOLUTE_POS * size + at];
        }
        let numbers = numbers_of(&quad, fp8);
        let scale = scale_of(scales, row / inner, row % inner, column, inner, width, fp8);
        #[unroll]
        for at in 0..QUAD {
            if column + at < width {
                out[row * width + column + at] = numbers[at] * scale;
            }
        }
    }
}

/// Adds what this unit has of the products of the rows from `first` on with a matrix.
#[cube]
fn add_products(
    x: &[f32],
    words: &[u32],
    scales: &[f32],
    sums: &mut Array<f32>, // [rows, 4]
    matrix: usize,
    first: usize,
    end: usize,
    inner: usize,
    width: usize,
    #[comptime] rows: usize,
    #[comptime] fp8: bool,
) {
    let quads = width.div_ceil(QUAD);
    let size = comptime!(words_of_quad(fp8));
    let quad = CUBE_POS_Y as usize * LANES + UNIT_POS as usize % LANES;
    let slice = UNIT_POS as usize / LANES;
    if quad < quads {
        for depth in range_stepped(slice * DEPTH, inner, SLICES * DEPTH) {
            let scale = scale_of(scales, matrix, depth, quad * QUAD, inner, width, fp8);
            // Reads first. Behind the last row of the matrix it is read again, and multiplied with zero.
            let mut weights = Array::<u32>::new(DEPTH * size);
            #[unroll]
            for k in 0..DEPTH {
                let row = matrix * inner + min(depth + k, inner - 1);
                #[unroll]
                for at in 0..size {
                    weights[k * size + at] = words[(row * quads + quad) * size + at];
                }
            }
            #[unroll]
            for k in 0..DEPTH {
                let mut quad = Array::<u32>::new(size);
                #[unroll]
                for at in 0..size {
                    quad[at] = weights[k * size + at];
                }
                let numbers = numbers_of(&quad, fp8);
                let scale = select(depth + k < inner, scale, 0.0f32);
                let column = min(depth + k, inner - 1);
                #[unroll]
                for row in 0..rows {
                    let factor = x[min(first + row, end - 1) * inner + column] * scale;
                    #[unroll]
                    for at in 0..QUAD {
                        sums[row * QUAD + at] += factor * numbers[at];
                    }
                }
            }
        }
    }
}

/// Sums what the slices have, and writes the rows before `end`.
#[cube]
fn write_tile(
    sums: &Array<f32>,
    out: &mut [f32],
    first: usize,
    end: usize,
    width: usize,
    #[comptime] rows: usize,
) {
    let lane = UNIT_POS as usize % LANES;
    let slice = UNIT_POS as usize / LANES;
    let column = CUBE_POS_Y as usize * TILE + UNIT_POS as usize;
    let mut parts = Shared::<[f32]>::new_slice(SLICES * TILE);
    #[unroll]
    for row in 0..rows {
        #[unroll]
        for at in 0..QUAD {
            parts[slice * TILE + lane * QUAD + at] = sums[row * QUAD + at];
        }
        sync_cube();
        if (UNIT_POS as usize) < TILE && column < width && first + row < end {
            let mut sum = 0.0f32;
            #[unroll]
            for slice in 0..SLICES {
                sum += parts[slice * TILE + UNIT_POS as usize];
            }
            out[(first + row) * width + column] = sum;
        }
        sync_cube();
    }
}

/// Words of four columns.
fn words_of_quad(fp8: bool) -> usize {
    if fp8 { 1 } else { 2 }
}

/// The four numbers of a quad, without their scale.
#[cube]
fn numbers_of(words: &Array<u32>, #[comptime] fp8: bool) -> Array<f32> {
    let mut numbers = Array::<f32>::new(QUAD);
    if fp8 {
        #[unroll]
        for at in 0..QUAD {
            let code = words[0] >> (8 * at) as u32;
            let magnitude = code & 0x7fu32;
            // Its exponent is 120 below that of single precision. Numbers below the smallest normal one are multiples of
            // 2^-9.
            let normal = f32::reinterpret((magnitude << 20u32) + (120u32 << 23u32));
            let number = select(magnitude < 8u32, magnitude as f32 * 0.001953125f32, normal);
            numbers[at] = select(code & 0x80u32 != 0u32, -number, number);
        }
    } else {
        #[unroll]
        for half in 0..QUAD / 2 {
            numbers[half * 2] = f32::reinterpret(words[half] << 16u32);
            numbers[half * 2 + 1] = f32::reinterpret(words[half] & 0xffff_0000u32);
        }
    }
    numbers
}

/// The scale of an element.
#[cube]
fn scale_of(
    scales: &[f32],
    matrix: usize,
    row: usize,
    column: usize,
    inner: usize,
    width: usize,
    #[comptime] fp8: bool,
) -> f32 {
    let mut scale = 1.0f32;
    if fp8 {
        let across = width.div_ceil(TILE);
        let down = inner.div_ceil(TILE);
        scale = scales[(matrix * down + row / TILE) * across + column / TILE];
    }
    scale
}
