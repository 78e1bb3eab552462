//! The matrix product for Hopper (sm_90a): the tensor memory accelerator copies, warpgroups multiply.
//!
//! A cube has three warpgroups of 128 units. The first produces: it fills a ring of stages in shared memory, each with
//! 128 of the inner size of both matrices (one copy of the accelerator per matrix) and their scales. The other two
//! consume: each multiplies 64 rows of a stage by four `wgmma` of 32, chained in one statement, and adds the sum, times
//! both scales, to single-precision registers (report section 3.3.2, figure 7b). While one promotes, the tensor cores
//! work for the other (section 3.3.2, "two WGMMA to persist concurrently").
//!
//! A stage has two barriers. `full` completes when the 128 producers have arrived, each after it wrote its row's
//! scales, and all bytes of both copies are there; `empty` when the eight consuming warps have arrived. Ring and
//! barriers are counted with the same index: stage `i % STAGES` in the parity of `i / STAGES`, and the first waits of
//! the producers, for the parity before the first, end at once.
//!
//! # Layout of a stage
//!
//! The copies write rows of 128 bytes, one after another, with the 128-byte swizzle: of the address' bits, 4 to 6
//! (which 16 bytes of the row) are exclusive-ored with 7 to 9 (which row of eight). The pattern repeats every eight
//! rows, 1024 bytes, so that stages start at multiples of 1024 and the base offset of a descriptor is zero. Fields of a
//! `wgmma` descriptor are in units of 16 bytes:
//!
//! | bits | field | here |
//! |---|---|---|
//! | 0-13 | start address | of the 64 rows of A or the N rows of B, plus 32 bytes per step of 32 codes |
//! | 16-29 | leading dimension byte offset | unused where a row of the swizzle is the whole inner size: 1 |
//! | 32-45 | stride dimension byte offset | from eight rows to the next eight: 1024 bytes, 64 |
//! | 49-51 | base offset | 0 |
//! | 62-63 | swizzle | 1, 128 bytes |
//!
//! A step within the row adds to the start address alone: the hardware applies the exclusive-or to the address that it
//! has computed, whose bits 7 to 9 are those of the row because the tile is aligned.

use cubecl::prelude::{barrier::Barrier, *};

use super::TILE;

/// Rows of the result of a cube.
pub(crate) const ROWS: u32 = 128;
/// Units of a cube: one warpgroup that produces, two that consume.
pub(crate) const UNITS: u32 = 384;
const WARPGROUP: u32 = 128;
const CONSUMING_WARPS: u32 = 8;
/// Bytes of eight rows in a stage, after which the swizzle repeats.
const SWIZZLE: usize = 1024;
/// Tiles of rows that neighbouring cubes share columns for, so that both stay in the L2 cache.
const GROUP: u32 = 16;

/// What a cube computes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Columns of the result, the N of `wgmma`: 64 or 128.
    pub(crate) columns: u32,
    /// Stages of the ring.
    pub(crate) stages: u32,
    /// Whether a block of B has one scale for all its rows.
    pub(crate) b_blocks: bool,
}

/// The launches that there are. Stages fill the 227 KiB of a multiprocessor.
pub(crate) fn shape(columns: u32, b_blocks: bool) -> Shape {
    let stages = if columns == 128 { 6 } else { 8 };
    Shape {
        columns,
        stages,
        b_blocks,
    }
}

/// `y[M, N] = (a * a_scales) (b * b_scales)^T`. The maps are of codes `[M, K]` in boxes of 128 x 128 and `[N, K]` in
/// boxes of `shape.columns` x 128, both with the 128-byte swizzle. `D` is half of `shape.columns`, the sums of a unit;
/// `W` neighbouring elements of `y` are written at once.
#[cube(launch_unchecked)]
pub(crate) fn multiply<O: Float, W: Size, D: Size>(
    a: &TensorMap<u8, Tiled>,
    a_scales: &[f32],
    b: &TensorMap<u8, Tiled>,
    b_scales: &[f32],
    y: &mut [Vector<O, W>],
    m: u32,
    n: u32,
    k: u32,
    #[comptime] shape: Shape,
) {
    let part = Part::of_cube(m, n, k, comptime!(shape.columns));
    multiply_part::<O, W, D>(a, a_scales, b, b_scales, y, m, n, k, part, shape);
}

/// As [`multiply`], every tile of 128 rows of A with the matrix of its expert: B is the experts' matrices of `n` rows
/// one below another, in blocks of every matrix by itself. Zeros for tiles of no expert, whose number is `experts`.
#[cube(launch_unchecked)]
pub(crate) fn multiply_grouped<O: Float, W: Size, D: Size>(
    a: &TensorMap<u8, Tiled>,
    a_scales: &[f32],
    b: &TensorMap<u8, Tiled>,
    b_scales: &[f32],
    tile_experts: &[u32],
    y: &mut [Vector<O, W>],
    m: u32,
    n: u32,
    k: u32,
    experts: u32,
    #[comptime] shape: Shape,
) {
    let part = Part::of_cube(m, n, k, comptime!(shape.columns));
    let expert = tile_experts[(part.first_row / ROWS) as usize];
    let part = part.of_expert(expert, experts, n);
    multiply_part::<O, W, D>(a, a_scales, b, b_scales, y, m, n, k, part, shape);
}

/// The product of every segment of the inner size, one result below another, `y[E M, N]`: segment `e` is the blocks from
/// `starts[e]` to `starts[e + 1]`, for one cube in Y each. Both matrices are in tiles of rows.
#[cube(launch_unchecked)]
pub(crate) fn multiply_segments<O: Float, W: Size, D: Size>(
    a: &TensorMap<u8, Tiled>,
    a_scales: &[f32],
    b: &TensorMap<u8, Tiled>,
    b_scales: &[f32],
    starts: &[u32],
    y: &mut [Vector<O, W>],
    m: u32,
    n: u32,
    k: u32,
    #[comptime] shape: Shape,
) {
    let part = Part::of_cube(m, n, k, comptime!(shape.columns));
    let start = starts[CUBE_POS_Y as usize];
    let part = part.of_segment(start, starts[CUBE_POS_Y as usize + 1], CUBE_POS_Y * m);
    multiply_part::<O, W, D>(a, a_scales, b, b_scales, y, m, n, k, part, shape);
}

/// What a cube computes, and of what.
#[derive(CubeType, Clone, Copy)]
struct Part {
    /// Of the result.
    first_row: u32,
    first_column: u32,
    /// Rows of the results before this one.
    y_row: u32,
    /// Row of B's codes, and of its scales in blocks, that the first column is of.
    b_row: u32,
    b_block: u32,
    /// Blocks of the inner size to sum, from the first on.
    first_block: u32,
    blocks: u32,
}

#[cube]
impl Part {
    /// Cubes go down GROUP tiles of rows before they go on to the next tile of columns.
    fn of_cube(m: u32, n: u32, k: u32, #[comptime] columns: u32) -> Part {
        let (tiles_down, tiles_across) = (m.div_ceil(ROWS), n.div_ceil(columns));
        let cube = CUBE_POS_X;
        let group = cube / (GROUP * tiles_across) * GROUP;
        let group_height = min(tiles_down - group, GROUP);
        let within = cube % (GROUP * tiles_across);
        let first_column = within / group_height * columns;
        Part {
            first_row: (group + within % group_height) * ROWS,
            first_column,
            y_row: 0u32,
            b_row: first_column,
            b_block: first_column / TILE,
            first_block: 0u32,
            blocks: k.div_ceil(TILE),
        }
    }

    /// The same rows and columns with the matrix of an expert; no block to sum if there is no such expert.
    fn of_expert(self, expert: u32, experts: u32, n: u32) -> Part {
        let some = expert < experts;
        let matrix = select(some, expert, 0u32);
        Part {
            first_row: self.first_row,
            first_column: self.first_column,
            y_row: 0u32,
            b_row: matrix * n + self.first_column,
            b_block: matrix * n.div_ceil(TILE) + self.first_column / TILE,
            first_block: 0u32,
            blocks: select(some, self.blocks, 0u32),
        }
    }

    /// The same rows and columns of the result from `y_row` on, of some blocks alone.
    fn of_segment(self, start: u32, end: u32, y_row: u32) -> Part {
        Part {
            first_row: self.first_row,
            first_column: self.first_column,
            y_row,
            b_row: self.b_row,
            b_block: self.b_block,
            first_block: start,
            blocks: end - start,
        }
    }
}

#[cube]
fn multiply_part<O: Float, W: Size, D: Size>(
    a: &TensorMap<u8, Tiled>,
    a_scales: &[f32],
    b: &TensorMap<u8, Tiled>,
    b_scales: &[f32],
    y: &mut [Vector<O, W>],
    m: u32,
    n: u32,
    k: u32,
    part: Part,
    #[comptime] shape: Shape,
) {
    let (first_row, first_column) = (part.first_row, part.first_column);
    let blocks = k.div_ceil(TILE);
    let (stages, columns) = comptime!((shape.stages, shape.columns));
    let sums_of_a_unit = D::value().comptime();
    let a_bytes = comptime!((ROWS * TILE) as usize);
    let b_bytes = comptime!((columns * TILE) as usize);
    let mut a_ring =
        Shared::<[u8]>::new_aligned_slice(comptime!(stages as usize * a_bytes), SWIZZLE);
    let mut b_ring =
        Shared::<[u8]>::new_aligned_slice(comptime!(stages as usize * b_bytes), SWIZZLE);
    let mut a_scale_ring = Shared::<[f32]>::new_slice(comptime!((stages * ROWS) as usize));
    let mut b_scale_ring = Shared::<[f32]>::new_slice(comptime!((stages * columns) as usize));
    let full = Shared::<[Barrier]>::new_slice(comptime!(stages as usize));
    let empty = Shared::<[Barrier]>::new_slice(comptime!(stages as usize));
    if UNIT_POS == 0 {
        #[unroll]
        for stage in 0..comptime!(stages as usize) {
            full[stage].init_manual(WARPGROUP);
            empty[stage].init_manual(CONSUMING_WARPS);
        }
        sync_async_proxy_shared();
    }
    sync_cube();

    if UNIT_POS < WARPGROUP {
        if comptime!(columns == 128) {
            give_registers_back();
        }
        // This unit's row of each matrix. Rows beyond a matrix take the last one's scale and are never written.
        let a_row = min(first_row + UNIT_POS, m - 1) * blocks;
        let mut b_row = part.b_block * blocks;
        if comptime!(!shape.b_blocks) {
            b_row = min(first_column + UNIT_POS % columns, n - 1) * blocks;
        }
        // A part without blocks may start behind the last one.
        let first_block = min(part.first_block, blocks - 1);
        let mut a_scale = a_scales[(a_row + first_block) as usize];
        let mut b_scale = b_scales[(b_row + first_block) as usize];
        for block in 0..part.blocks {
            let stage = block % stages;
            empty[stage as usize].wait_parity((block / stages % 2) ^ 1);
            a_scale_ring[(stage * ROWS + UNIT_POS) as usize] = a_scale;
            if UNIT_POS < columns {
                b_scale_ring[(stage * columns + UNIT_POS) as usize] = b_scale;
            }
            if UNIT_POS == 0 {
                let at = stage as usize * a_bytes;
                full[stage as usize].tma_load_2d(
                    a,
                    &mut a_ring[at..at + a_bytes],
                    first_row as i32,
                    ((first_block + block) * TILE) as i32,
                );
                let at = stage as usize * b_bytes;
                full[stage as usize].tma_load_2d(
                    b,
                    &mut b_ring[at..at + b_bytes],
                    part.b_row as i32,
                    ((first_block + block) * TILE) as i32,
                );
                full[stage as usize].arrive_and_expect_tx(1, comptime!((a_bytes + b_bytes) as u32));
            } else {
                full[stage as usize].arrive();
            }
            // The next block's, in time for the next round.
            let next = min(first_block + block + 1, blocks - 1);
            a_scale = a_scales[(a_row + next) as usize];
            b_scale = b_scales[(b_row + next) as usize];
        }
    } else {
        if comptime!(columns == 128) {
            take_registers();
        }
        let unit = UNIT_POS - WARPGROUP;
        let lane = unit % 32;
        let warpgroup = unit / WARPGROUP;
        // Of the 64 rows of a warpgroup a warp has 16, of which a unit has two, eight apart.
        let row = unit / 32 * 16 + lane / 4;
        let pair = lane % 4 * 2;
        let a_first = descriptor(&a_ring) + u64::cast_from(warpgroup * comptime!(64 * TILE / 16));
        let b_first = descriptor(&b_ring);

        let mut sums = Array::<f32>::new(sums_of_a_unit);
        #[unroll]
        for i in 0..sums_of_a_unit {
            sums[i] = 0.0f32;
        }
        for block in 0..part.blocks {
            let stage = block % stages;
            full[stage as usize].wait_parity(block / stages % 2);
            let mut upper = a_scale_ring[(stage * ROWS + row) as usize];
            let mut lower = a_scale_ring[(stage * ROWS + row + 8) as usize];
            if comptime!(shape.b_blocks) {
                let scale = b_scale_ring[(stage * columns) as usize];
                upper *= scale;
                lower *= scale;
            }
            let a_descriptor = a_first + u64::cast_from(stage * comptime!(a_bytes as u32 / 16));
            let b_descriptor = b_first + u64::cast_from(stage * comptime!(b_bytes as u32 / 16));
            let product = multiply_codes::<D>(a_descriptor, b_descriptor, columns);
            if comptime!(shape.b_blocks) {
                // The stage is free before the sums are promoted.
                release(&empty[stage as usize], lane);
                #[unroll]
                for i in 0..sums_of_a_unit {
                    let scale = if comptime!(i % 4 < 2) { upper } else { lower };
                    sums[i] += product.extract(i) * scale;
                }
            } else {
                #[unroll]
                for i in 0..sums_of_a_unit {
                    let row_scale = if comptime!(i % 4 < 2) { upper } else { lower };
                    let column = pair + comptime!((i / 4 * 8 + i % 2) as u32);
                    let scale = b_scale_ring[(stage * columns + column) as usize];
                    sums[i] += product.extract(i) * row_scale * scale;
                }
                release(&empty[stage as usize], lane);
            }
        }

        let width = W::value().comptime();
        #[unroll]
        for i in 0..comptime!(sums_of_a_unit / width) {
            let at = comptime!(i * width);
            let row = first_row + row + comptime!((at % 4 / 2 * 8) as u32);
            let column = first_column + pair + comptime!((at / 4 * 8 + at % 2) as u32);
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
}

/// Arrives for a warp, all of whose units have read their scales and waited for their product.
#[cube]
fn release(empty: &Barrier, lane: u32) {
    sync_plane();
    if lane == 0 {
        empty.arrive();
    }
}

/// The descriptor of the first tile of a ring: see the module.
#[cube]
fn descriptor(ring: &Shared<[u8]>) -> u64 {
    let descriptor: u64;
    gpu_asm!(
        "{{ .reg .u64 at; cvta.to.shared.u64 at, {ring}; bfe.u64 at, at, 4, 14; or.b64 {descriptor}, at, {fields}; }}",
        descriptor = out(_) descriptor,
        ring = in(_) ring.as_slice().as_ptr(),
        fields = const format!("{}", (1u64 << 62) | (1024 / 16) << 32 | 1 << 16),
        options(pure, nomem),
    );
    descriptor
}

/// 64 x 128 codes times the transposed `columns` x 128 codes, waited for. One statement, in which nothing else touches
/// the registers of the sum between the first instruction and the wait.
#[cube]
fn multiply_codes<D: Size>(a: u64, b: u64, #[comptime] columns: u32) -> Vector<f32, D> {
    let product: Vector<f32, D>;
    gpu_asm!(
        "{{ .reg .pred fresh, more; .reg .u64 a1, a2, a3, b1, b2, b3;",
        "setp.ne.u32 fresh, 0, 0; setp.eq.u32 more, 0, 0;",
        "add.u64 a1, {a}, 2; add.u64 a2, {a}, 4; add.u64 a3, {a}, 6;",
        "add.u64 b1, {b}, 2; add.u64 b2, {b}, 4; add.u64 b3, {b}, 6;",
        "wgmma.fence.sync.aligned;",
        "wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {product}, {a}, {b}, fresh, 1, 1;",
        "wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {product}, a1, b1, more, 1, 1;",
        "wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {product}, a2, b2, more, 1, 1;",
        "wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {product}, a3, b3, more, 1, 1;",
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 0; }}",
        product = out(_) product,
        a = in(_) a,
        b = in(_) b,
        n = const columns,
    );
    product
}

/// Producers need few registers and give theirs to the consumers: 128 * 40 + 256 * 232 is what a cube of 384 units with
/// 168 registers has. The narrower tile needs no more than it starts with.
#[cube]
fn give_registers_back() {
    gpu_asm!("setmaxnreg.dec.sync.aligned.u32 40;");
}

#[cube]
fn take_registers() {
    gpu_asm!("setmaxnreg.inc.sync.aligned.u32 232;");
}
