//! The matrix product for every NVIDIA GPU with FP8 tensor cores (sm_89 and later), one warp's instruction at a time.
//!
//! A cube of eight warps computes 128 x 128 of the result, a warp 64 x 32 of them. Each 128 of the inner size are copied
//! into shared memory while the tensor cores work on the 128 before; four `mma` of 32 are chained, then their sum is
//! multiplied with both scales and added to single-precision registers (report section 3.3.2, figure 7b).
//!
//! Rows in shared memory are 144 bytes apart: the eight rows of 16 bytes that `ldmatrix` reads at once then lie in
//! different banks. An `ldmatrix` of 16-bit elements moves pairs of codes, in the order in which `mma` wants them.

use cubecl::prelude::*;

use super::TILE;
use crate::warp::{commit_copies, wait_for_all_copies_but_the_last_group};

/// Rows and columns of the result of a cube.
pub(crate) const CUBE_TILE: u32 = 128;
pub(crate) const UNITS: u32 = 256;
/// Copies of 16 codes per row of 128, and per row in shared memory.
const CHUNKS: u32 = 8;
const ROW: u32 = 9;
const STAGES: u32 = 2;
/// Copies of one matrix in a stage.
const STAGE: u32 = CUBE_TILE * ROW;

type Chunk = Vector<u32, Const<4>>;

/// `y[M, N] = (a * a_scales) (b * b_scales)^T` with codes `a [M, K]` and `b [N, K]`, whose rows are `a_pitch` and
/// `b_pitch` chunks of 16 codes apart. `W` neighbouring elements of `y` are written at once.
#[cube(launch_unchecked)]
pub(crate) fn multiply<O: Float, W: Size>(
    a: &[Vector<u32, Const<4>>],
    a_scales: &[f32],
    b: &[Vector<u32, Const<4>>],
    b_scales: &[f32],
    y: &mut [Vector<O, W>],
    m: u32,
    n: u32,
    k: u32,
    a_pitch: u32,
    b_pitch: u32,
    #[comptime] b_blocks: bool,
) {
    let part = Part {
        b_row: CUBE_POS_Y * CUBE_TILE,
        b_end: n,
        b_block: CUBE_POS_Y,
        first_block: 0u32,
        end: k,
        y_row: 0u32,
    };
    multiply_part::<O, W>(
        a, a_scales, b, b_scales, y, m, n, k, a_pitch, b_pitch, part, b_blocks,
    );
}

/// As [`multiply`], every tile of 128 rows of A with the matrix of its expert: B is the experts' matrices of `n` rows
/// one below another, in blocks of every matrix by itself. Zeros for tiles of no expert, whose number is `experts`.
#[cube(launch_unchecked)]
pub(crate) fn multiply_grouped<O: Float, W: Size>(
    a: &[Vector<u32, Const<4>>],
    a_scales: &[f32],
    b: &[Vector<u32, Const<4>>],
    b_scales: &[f32],
    tile_experts: &[u32],
    y: &mut [Vector<O, W>],
    m: u32,
    n: u32,
    k: u32,
    a_pitch: u32,
    b_pitch: u32,
    experts: u32,
) {
    let expert = tile_experts[CUBE_POS_X as usize];
    let some = expert < experts;
    let matrix = select(some, expert, 0u32);
    let part = Part {
        b_row: matrix * n + CUBE_POS_Y * CUBE_TILE,
        b_end: (matrix + 1) * n,
        b_block: matrix * n.div_ceil(TILE) + CUBE_POS_Y,
        first_block: 0u32,
        end: select(some, k, 0u32),
        y_row: 0u32,
    };
    multiply_part::<O, W>(
        a, a_scales, b, b_scales, y, m, n, k, a_pitch, b_pitch, part, true,
    );
}

/// The product of every segment of the inner size, one result below another, `y[E M, N]`: segment `e` is the blocks from
/// `starts[e]` to `starts[e + 1]`, for one cube in Z each. Both matrices are in tiles of rows.
#[cube(launch_unchecked)]
pub(crate) fn multiply_segments<O: Float, W: Size>(
    a: &[Vector<u32, Const<4>>],
    a_scales: &[f32],
    b: &[Vector<u32, Const<4>>],
    b_scales: &[f32],
    starts: &[u32],
    y: &mut [Vector<O, W>],
    m: u32,
    n: u32,
    k: u32,
    a_pitch: u32,
    b_pitch: u32,
) {
    let part = Part {
        b_row: CUBE_POS_Y * CUBE_TILE,
        b_end: n,
        b_block: CUBE_POS_Y,
        first_block: starts[CUBE_POS_Z as usize],
        end: min(starts[CUBE_POS_Z as usize + 1] * TILE, k),
        y_row: CUBE_POS_Z * m,
    };
    multiply_part::<O, W>(
        a, a_scales, b, b_scales, y, m, n, k, a_pitch, b_pitch, part, false,
    );
}

/// What a cube multiplies, and where the result goes.
#[derive(CubeType, Clone, Copy)]
struct Part {
    /// Row of the codes that the first column is of, and the end of its matrix.
    b_row: u32,
    b_end: u32,
    /// Row of the scales in blocks that the first column is of.
    b_block: u32,
    /// Of the inner size, what is summed: from a block to an element.
    first_block: u32,
    end: u32,
    /// Rows of the results before this one.
    y_row: u32,
}

#[cube]
fn multiply_part<O: Float, W: Size>(
    a: &[Vector<u32, Const<4>>],
    a_scales: &[f32],
    b: &[Vector<u32, Const<4>>],
    b_scales: &[f32],
    y: &mut [Vector<O, W>],
    m: u32,
    n: u32,
    k: u32,
    a_pitch: u32,
    b_pitch: u32,
    part: Part,
    #[comptime] b_blocks: bool,
) {
    let (b_row, b_end, end) = (part.b_row, part.b_end, part.end);
    let first_block = part.first_block;
    let (lane, warp) = (UNIT_POS % 32, UNIT_POS / 32);
    let first_row = CUBE_POS_X * CUBE_TILE;
    let first_column = CUBE_POS_Y * CUBE_TILE;
    // Where this warp's 64 rows and 32 columns start.
    let (warp_row, warp_column) = (warp / 4 * 64, warp % 4 * 32);
    let blocks = k.div_ceil(TILE);

    let mut a_stage =
        Shared::<[Chunk]>::new_aligned_slice(comptime!((STAGES * STAGE) as usize), 16usize);
    let mut b_stage =
        Shared::<[Chunk]>::new_aligned_slice(comptime!((STAGES * STAGE) as usize), 16usize);

    let mut sums = Array::<f32>::new(64usize);
    #[unroll]
    for i in 0..64usize {
        sums[i] = 0.0f32;
    }

    let first_stage = first_block % STAGES;
    copy_tile(
        a,
        &mut a_stage,
        first_stage,
        first_block,
        first_row,
        m,
        end,
        a_pitch,
    );
    copy_tile(
        b,
        &mut b_stage,
        first_stage,
        first_block,
        b_row,
        b_end,
        end,
        b_pitch,
    );
    commit_copies();

    for block in first_block..end.div_ceil(TILE) {
        let stage = block % STAGES;
        // Past the end nothing is copied, but the group is there to be counted.
        copy_tile(
            a,
            &mut a_stage,
            (block + 1) % STAGES,
            block + 1,
            first_row,
            m,
            end,
            a_pitch,
        );
        copy_tile(
            b,
            &mut b_stage,
            (block + 1) % STAGES,
            block + 1,
            b_row,
            b_end,
            end,
            b_pitch,
        );
        commit_copies();

        // Of the eight rows and eight columns whose sums this unit has. A block's is multiplied into the rows'.
        let mut row_scales = Array::<f32>::new(8usize);
        #[unroll]
        for i in 0..8usize {
            let row = first_row + warp_row + i as u32 * 8 + lane / 4;
            row_scales[i] = a_scales[(min(row, m - 1) * blocks + block) as usize];
            if comptime!(b_blocks) {
                row_scales[i] *= b_scales[(part.b_block * blocks + block) as usize];
            }
        }
        let mut column_scales = Array::<f32>::new(8usize);
        if comptime!(!b_blocks) {
            #[unroll]
            for i in 0..8usize {
                let column =
                    first_column + warp_column + i as u32 / 2 * 8 + lane % 4 * 2 + i as u32 % 2;
                column_scales[i] = b_scales[(min(column, n - 1) * blocks + block) as usize];
            }
        }

        wait_for_all_copies_but_the_last_group();
        sync_cube();

        // Fragments of b for 32 columns and all four steps of 32: pairs of 8-column tiles.
        let mut b_fragments = Array::<Chunk>::new(8usize);
        #[unroll]
        for i in 0..8usize {
            let (pair, step) = (i as u32 / 4, i as u32 % 4);
            let row = warp_column + pair * 16 + lane / 16 * 8 + lane % 8;
            let chunk = step * 2 + lane / 8 % 2;
            b_fragments[i] = load_matrices(&b_stage, stage * STAGE + row * ROW + chunk);
        }
        #[unroll]
        for i in 0..4usize {
            let mut a_fragments = Array::<Chunk>::new(4usize);
            #[unroll]
            for step in 0..4usize {
                let row = warp_row + i as u32 * 16 + lane % 16;
                let chunk = step as u32 * 2 + lane / 16;
                a_fragments[step] = load_matrices(&a_stage, stage * STAGE + row * ROW + chunk);
            }
            #[unroll]
            for j in 0..4usize {
                let product = multiply_codes(&a_fragments, &b_fragments, j);
                #[unroll]
                for e in 0..4usize {
                    let at = comptime!((i * 4 + j) * 4 + e);
                    let mut term = product.extract(e) * row_scales[comptime!(i * 2 + e / 2)];
                    if comptime!(!b_blocks) {
                        term *= column_scales[comptime!(j * 2 + e % 2)];
                    }
                    sums[at] += term;
                }
            }
        }
        sync_cube();
    }

    let width = W::value().comptime();
    #[unroll]
    for i in 0..comptime!(64 / width) {
        // Elements 0 and 1 of four are neighbours, 2 and 3 are eight rows below.
        let at = comptime!(i * width);
        let row =
            first_row + warp_row + comptime!((at / 16 * 16 + at % 4 / 2 * 8) as u32) + lane / 4;
        let column =
            first_column + warp_column + comptime!((at / 4 % 4 * 8 + at % 2) as u32) + lane % 4 * 2;
        if row < m && column < n {
            let mut written = Vector::<O, W>::empty();
            #[unroll]
            for e in 0..width {
                written.insert(e, O::cast_from(sums[comptime!(at + e)]));
            }
            y[((part.y_row + row) * n + column) as usize / width] = written;
        }
    }
}

/// Starts to copy 128 rows of 128 codes from `first` and the block on; zeros for what is beyond the matrix.
#[cube]
fn copy_tile(
    from: &[Vector<u32, Const<4>>],
    to: &mut Shared<[Chunk]>,
    stage: u32,
    block: u32,
    first: u32,
    rows: u32,
    k: u32,
    pitch: u32,
) {
    if block * TILE < k {
        #[unroll]
        for i in 0..comptime!(CUBE_TILE * CHUNKS / UNITS) {
            let at = i * UNITS + UNIT_POS;
            let (line, chunk) = (at / CHUNKS, at % CHUNKS);
            let row = first + line;
            let start = block * TILE + chunk * 16;
            // A copy of no bytes writes zeros and reads nothing, but its address has to be one of the matrix.
            let inside = row < rows && start < k;
            let bytes = select(inside, min(k - min(start, k), 16u32), 0u32);
            let source = select(inside, row * pitch + start / 16, 0u32) as usize;
            let target = (stage * STAGE + line * ROW + chunk) as usize;
            gpu_asm!(
                "{{ .reg .u64 to, from; cvta.to.shared.u64 to, {to}; cvta.to.global.u64 from, {from}; cp.async.cg.shared.global [to], [from], 16, {bytes}; }}",
                to = in(_) to[target..target + 1].as_ptr(),
                from = in(_) from[source..source + 1].as_ptr(),
                bytes = in(_) bytes,
            );
        }
    }
}

/// Four matrices of eight rows of 16 bytes; a unit's `from` is the row that it addresses.
#[cube]
fn load_matrices(stage: &Shared<[Chunk]>, from: u32) -> Vector<u32, Const<4>> {
    let from = from as usize;
    let fragment: Vector<u32, Const<4>>;
    gpu_asm!(
        "{{ .reg .u64 row; cvta.to.shared.u64 row, {row}; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {fragment}, [row]; }}",
        fragment = out(_) fragment,
        row = in(_) stage[from..from + 1].as_ptr(),
    );
    fragment
}

/// The sum of four products of 16 x 32 codes with 8 x 32 codes: columns' tile `j` of four.
///
/// Between the steps the sum stays in registers of the statement's own, since one that is an output may share its
/// register with an input that a later step needs.
#[cube]
fn multiply_codes(
    rows: &Array<Chunk>,
    columns: &Array<Chunk>,
    #[comptime] j: usize,
) -> Vector<f32, Const<4>> {
    let (first, second) = comptime!((j / 2 * 4, j % 2 * 2));
    let product: Vector<f32, Const<4>>;
    gpu_asm!(
        "{{ .reg .f32 s0, s1, s2, s3; mov.f32 s0, 0f00000000; mov.f32 s1, s0; mov.f32 s2, s0; mov.f32 s3, s0;",
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {{s0, s1, s2, s3}}, {a0}, {{{b0}, {b1}}}, {{s0, s1, s2, s3}};",
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {{s0, s1, s2, s3}}, {a1}, {{{b2}, {b3}}}, {{s0, s1, s2, s3}};",
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {{s0, s1, s2, s3}}, {a2}, {{{b4}, {b5}}}, {{s0, s1, s2, s3}};",
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {product}, {a3}, {{{b6}, {b7}}}, {{s0, s1, s2, s3}}; }}",
        product = out(_) product,
        a0 = in(_) rows[0],
        a1 = in(_) rows[1],
        a2 = in(_) rows[2],
        a3 = in(_) rows[3],
        b0 = in(_) columns[first].extract(second),
        b1 = in(_) columns[first].extract(comptime!(second + 1)),
        b2 = in(_) columns[comptime!(first + 1)].extract(second),
        b3 = in(_) columns[comptime!(first + 1)].extract(comptime!(second + 1)),
        b4 = in(_) columns[comptime!(first + 2)].extract(second),
        b5 = in(_) columns[comptime!(first + 2)].extract(comptime!(second + 1)),
        b6 = in(_) columns[comptime!(first + 3)].extract(second),
        b7 = in(_) columns[comptime!(first + 3)].extract(comptime!(second + 1)),
        options(pure, nomem),
    );
    product
}
