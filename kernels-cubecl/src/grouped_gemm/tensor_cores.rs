//! Grouped matrix products on the tensor cores of NVIDIA GPUs (sm_80 and later), in bf16 with sums in single precision.
//!
//! A cube of eight warps computes 128 x 128 of the result, a warp 64 x 32 of them. Each 64 of the inner size are copied
//! into one of three stages of shared memory, two stages ahead of the tensor cores. An operand whose inner size is
//! across its rows in memory is copied as it lies, and turned by `ldmatrix`.
//!
//! As in [`super::kernel`], cubes find their segment in `bounds`, and as many are launched as the worst case needs.

use cubecl::prelude::*;

use super::kernel::{rows_of, segment_of};
use crate::warp::{
    CHUNK, Chunk, Sums, commit_copies, copy_chunk, load_matrices, multiply, pitch, place, rounded,
    shared_rows, wait_for_all_copies_but_the_last_group,
};

/// Rows and columns of the result of a cube.
pub(super) const TILE: usize = 128;
pub(super) const UNITS: usize = 256;
/// Of the inner size, what a stage has.
const DEPTH: usize = 64;
const STAGES: usize = 3;
/// Chunks of an operand in a stage.
const CHUNKS: usize = TILE * DEPTH / CHUNK;
/// Tiles of a warp: of sixteen rows, of eight columns.
const ROW_TILES: usize = 4;
const COLUMN_TILES: usize = 4;

/// A matrix in memory, and the part of it that a cube multiplies: `lines` of the result, from `first` on and before
/// `end`, and the inner size from `inner` to `inner_end`. Rows in memory are `width` elements.
#[derive(CubeType, Clone, Copy)]
struct Part {
    width: usize,
    first: usize,
    end: usize,
    inner: usize,
    inner_end: usize,
}

/// `out_e = x_e W_e`, or `x_e W_e^T` with `transposed`; zero for rows that are no expert's. All widths are multiples of
/// eight.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn segment_matmul_bf16(
    x: &[Vector<u32, Const<4>>],       // [R, inner]
    weights: &[Vector<u32, Const<4>>], // [E, inner, width], transposed [E, width, inner]
    bounds: &[u32],                    // [2, E + 2]
    out: &mut [u32],                   // [R, width], pairs
    inner: usize,
    width: usize,
    #[comptime] transposed: bool,
) {
    let experts = bounds.len() / 2 - 2;
    let tile = CUBE_POS_X;
    if tile >= bounds[2 * experts + 3] {
        terminate!();
    }
    let segment = segment_of(bounds, tile);
    let (first, end) = rows_of(bounds, segment, tile, TILE);
    let none = segment >= experts;
    let rows = Part {
        width: inner,
        first,
        end,
        inner: 0usize,
        inner_end: select(none, 0usize, inner),
    };
    let matrix = select(none, 0usize, segment);
    let first_column = CUBE_POS_Y as usize * TILE;
    let mut columns = Part {
        width,
        first: first_column,
        end: width,
        inner: matrix * inner,
        inner_end: matrix * inner + rows.inner_end,
    };
    if comptime!(transposed) {
        columns.width = inner;
        columns.first = matrix * width + first_column;
        columns.end = (matrix + 1) * width;
        columns.inner = 0usize;
        columns.inner_end = rows.inner_end;
    }
    let to = Place {
        row: rows.first,
        end: rows.end,
        column: first_column,
        width,
    };
    multiply_tile(x, weights, out, rows, columns, to, true, transposed);
}

/// `dW_e = x_e^T dy_e`, zero for an empty segment. All widths are multiples of eight.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn segment_weight_grad_bf16(
    x: &[Vector<u32, Const<4>>],    // [R, height]
    grad: &[Vector<u32, Const<4>>], // [R, width]
    bounds: &[u32],                 // [2, E + 2]
    out: &mut [u32],                // [E, height, width], pairs
    height: usize,
    width: usize,
) {
    let expert = CUBE_POS_Z as usize;
    let start = bounds[expert] as usize;
    let end = bounds[expert + 1] as usize;
    let first_row = CUBE_POS_Y as usize * TILE;
    let first_column = CUBE_POS_X as usize * TILE;
    let rows = Part {
        width: height,
        first: first_row,
        end: height,
        inner: start,
        inner_end: end,
    };
    let columns = Part {
        width,
        first: first_column,
        end: width,
        inner: start,
        inner_end: end,
    };
    let to = Place {
        row: expert * height + first_row,
        end: (expert + 1) * height,
        column: first_column,
        width,
    };
    multiply_tile(x, grad, out, rows, columns, to, false, false);
}

/// Where a tile of the result goes.
#[derive(CubeType, Clone, Copy)]
struct Place {
    row: usize,
    end: usize,
    column: usize,
    width: usize,
}

/// The product of `rows` of `a` and `columns` of `b`. The inner size of an operand is along its rows in memory, or across
/// them.
#[cube]
fn multiply_tile(
    a: &[Vector<u32, Const<4>>],
    b: &[Vector<u32, Const<4>>],
    out: &mut [u32],
    rows: Part,
    columns: Part,
    to: Place,
    #[comptime] a_along: bool,
    #[comptime] b_along: bool,
) {
    let (lane, warp) = (UNIT_POS % 32, UNIT_POS / 32);
    // Where this warp's 64 rows and 32 columns start.
    let (warp_row, warp_column) = (warp / 4 * 64, warp % 4 * 32);
    let mut a_stages = shared_rows(
        comptime!(STAGES * lines(a_along)),
        comptime!(pitch_of(a_along)),
    );
    let mut b_stages = shared_rows(
        comptime!(STAGES * lines(b_along)),
        comptime!(pitch_of(b_along)),
    );

    let mut sums = Array::<Sums>::new(comptime!(ROW_TILES * COLUMN_TILES));
    #[unroll]
    for at in 0..comptime!(ROW_TILES * COLUMN_TILES) {
        sums[at] = Vector::<f32, Const<4>>::new(0.0f32);
    }

    let steps = (rows.inner_end - rows.inner).div_ceil(DEPTH) as u32;
    #[unroll]
    for ahead in 0..comptime!(STAGES as u32 - 1) {
        copy_stage(a, &mut a_stages, &rows, ahead, a_along);
        copy_stage(b, &mut b_stages, &columns, ahead, b_along);
        commit_copies();
    }
    for step in 0..steps {
        wait_for_all_copies_but_the_last_group();
        // The stage is there for all, and all are done with the one before, which is copied to next.
        sync_cube();
        // Past the end zeros are written, and the group is there to be counted.
        copy_stage(
            a,
            &mut a_stages,
            &rows,
            step + comptime!(STAGES as u32 - 1),
            a_along,
        );
        copy_stage(
            b,
            &mut b_stages,
            &columns,
            step + comptime!(STAGES as u32 - 1),
            b_along,
        );
        commit_copies();
        let stage = step % STAGES as u32;

        #[unroll]
        for sixteen in 0..comptime!(DEPTH as u32 / 16) {
            let mut right = Array::<Chunk>::new(comptime!(COLUMN_TILES / 2));
            #[unroll]
            for pair in 0..comptime!(COLUMN_TILES / 2) {
                let column = warp_column + comptime!(pair as u32 * 16);
                let at = if comptime!(b_along) {
                    let row = column + lane / 16 * 8 + lane % 8;
                    let chunk = sixteen * 2 + lane / 8 % 2;
                    place(stage * TILE as u32 + row, chunk, comptime!(pitch_of(true)))
                } else {
                    let row = sixteen * 16 + lane % 16;
                    let chunk = column / 8 + lane / 16;
                    place(
                        stage * DEPTH as u32 + row,
                        chunk,
                        comptime!(pitch_of(false)),
                    )
                };
                right[pair] = load_matrices(&b_stages, at, comptime!(!b_along));
            }
            #[unroll]
            for i in 0..ROW_TILES {
                let row = warp_row + comptime!(i as u32 * 16);
                let at = if comptime!(a_along) {
                    let chunk = sixteen * 2 + lane / 16;
                    place(
                        stage * TILE as u32 + row + lane % 16,
                        chunk,
                        comptime!(pitch_of(true)),
                    )
                } else {
                    let inner = sixteen * 16 + lane / 16 * 8 + lane % 8;
                    let chunk = row / 8 + lane / 8 % 2;
                    place(
                        stage * DEPTH as u32 + inner,
                        chunk,
                        comptime!(pitch_of(false)),
                    )
                };
                // An operand of an instruction has to be the value of a variable, not the variable.
                let mut left = Array::<Chunk>::new(1usize);
                left[0] = load_matrices(&a_stages, at, comptime!(!a_along));
                #[unroll]
                for j in 0..COLUMN_TILES {
                    let of = comptime!(i * COLUMN_TILES + j);
                    let (first, second) = comptime!((j % 2 * 2, j % 2 * 2 + 1));
                    let pair = right[comptime!(j / 2)];
                    sums[of] =
                        multiply(left[0], pair.extract(first), pair.extract(second), sums[of]);
                }
            }
        }
    }

    #[unroll]
    for i in 0..ROW_TILES {
        #[unroll]
        for half in 0..2usize {
            let row = to.row + (warp_row + lane / 4) as usize + comptime!(i * 16 + half * 8);
            #[unroll]
            for j in 0..COLUMN_TILES {
                let column = to.column + (warp_column + lane % 4 * 2) as usize + comptime!(j * 8);
                if row < to.end && column < to.width {
                    let from = sums[comptime!(i * COLUMN_TILES + j)];
                    let (first, second) = comptime!((half * 2, half * 2 + 1));
                    out[(row * to.width + column) / 2] =
                        rounded(from.extract(first), from.extract(second));
                }
            }
        }
    }
}

/// Rows of an operand in a stage.
fn lines(along: bool) -> usize {
    if along { TILE } else { DEPTH }
}

/// Distance of rows of an operand in shared memory, in chunks.
fn pitch_of(along: bool) -> u32 {
    pitch(if along { DEPTH } else { TILE }) as u32
}

/// Starts to copy what an operand has in step `step` to its stage.
#[cube]
fn copy_stage(
    from: &[Vector<u32, Const<4>>],
    to: &mut Shared<[u32]>,
    part: &Part,
    step: u32,
    #[comptime] along: bool,
) {
    let width = comptime!(pitch_of(along));
    let start = part.inner + step as usize * DEPTH;
    let stage = step % STAGES as u32 * comptime!(lines(along) as u32);
    #[unroll]
    for copy in 0..comptime!((CHUNKS / UNITS) as u32) {
        let number = copy * UNITS as u32 + UNIT_POS;
        let (row, chunk) = (number / width, number % width);
        let target = place(stage + row, chunk, width);
        let (row, column) = (row as usize, chunk as usize * CHUNK);
        if comptime!(along) {
            let (line, column) = (part.first + row, start + column);
            let source = (line * part.width + column) / CHUNK;
            let inside = line < part.end && column < part.inner_end;
            copy_chunk(from, source, inside, to, target);
        } else {
            let (line, column) = (start + row, part.first + column);
            let source = (line * part.width + column) / CHUNK;
            let inside = line < part.inner_end && column < part.end;
            copy_chunk(from, source, inside, to, target);
        }
    }
}
