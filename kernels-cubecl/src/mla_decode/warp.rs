//! What attention on the tensor cores is made of: copies to rows in shared memory, and instructions of a warp.
//!
//! Rows in shared memory are a multiple of 128 bytes. The 16 bytes of number `i` of row `r` are at `i ^ r % 8`: the
//! eight rows that `ldmatrix` reads at once, and the eight that a warp writes weights of, then lie in different banks.

use cubecl::prelude::*;

use super::kernel::Widths;

/// Elements of 16 bytes.
const CHUNK: usize = 8;

/// 16 bytes, or a unit's part of a matrix of 16 x 16.
pub(super) type Chunk = Vector<u32, Const<4>>;
/// A unit's part of a product of 16 x 8.
pub(super) type Sums = Vector<f32, Const<4>>;

/// Distance of rows of `width` elements in shared memory, in chunks.
pub(super) fn pitch(width: usize) -> usize {
    (width / CHUNK).next_multiple_of(8)
}

/// Rows in shared memory, by words of 32 bits.
#[cube]
pub(super) fn shared_rows(#[comptime] rows: usize, #[comptime] pitch: u32) -> Shared<[u32]> {
    Shared::<[u32]>::new_aligned_slice(comptime!(rows * pitch as usize * 4), 16usize)
}

/// The first word of a chunk of a row in shared memory.
#[cube]
pub(super) fn place(row: u32, chunk: u32, #[comptime] pitch: u32) -> u32 {
    (row * pitch + (chunk ^ (row % 8))) * 4
}

/// Rows of two matrices that are copied side by side, and the row of shared memory that they go to. Zeros for those
/// from `end` on.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Lines {
    pub(super) first: usize,
    pub(super) end: usize,
    pub(super) to: u32,
}

/// Starts to copy `count` rows.
#[cube]
pub(super) fn copy_rows(
    latents: &[Vector<u32, Const<4>>],
    rotated: &[Vector<u32, Const<4>>],
    to: &mut Shared<[u32]>,
    lines: &Lines,
    #[comptime] count: usize,
    #[comptime] widths: Widths,
    #[comptime] units: usize,
) {
    let latent = comptime!((widths.latent / CHUNK) as u32);
    let rope = comptime!((widths.rope / CHUNK) as u32);
    let pitch = comptime!(pitch(widths.latent + widths.rope) as u32);
    let units = comptime!(units as u32);
    copy_part(latents, to, lines, count, 0u32, latent, pitch, units);
    copy_part(rotated, to, lines, count, latent, rope, pitch, units);
}

/// Starts to copy `width` chunks of `count` rows, behind the first `before` chunks of rows in shared memory.
#[cube]
fn copy_part(
    from: &[Vector<u32, Const<4>>],
    to: &mut Shared<[u32]>,
    lines: &Lines,
    #[comptime] count: usize,
    #[comptime] before: u32,
    #[comptime] width: u32,
    #[comptime] pitch: u32,
    #[comptime] units: u32,
) {
    let copies = comptime!(count as u32 * width);
    #[unroll]
    for step in 0..comptime!(copies.div_ceil(units)) {
        let copy = step * units + UNIT_POS;
        if comptime!((step + 1) * units <= copies) {
            copy_chunk(from, to, lines, copy, before, width, pitch);
        } else if copy < copies {
            copy_chunk(from, to, lines, copy, before, width, pitch);
        }
    }
}

#[cube]
fn copy_chunk(
    from: &[Vector<u32, Const<4>>],
    to: &mut Shared<[u32]>,
    lines: &Lines,
    copy: u32,
    #[comptime] before: u32,
    #[comptime] width: u32,
    #[comptime] pitch: u32,
) {
    let (row, chunk) = (copy / width, copy % width);
    let line = lines.first + row as usize;
    // A copy of no bytes writes zeros and reads nothing, but its address has to be one of the matrix.
    let inside = line < lines.end;
    let bytes = select(inside, 16u32, 0u32);
    let source = select(inside, line * width as usize + chunk as usize, 0usize);
    let target = place(lines.to + row, before + chunk, pitch) as usize;
    gpu_asm!(
        "{{ .reg .u64 to, from; cvta.to.shared.u64 to, {to}; cvta.to.global.u64 from, {from}; cp.async.cg.shared.global [to], [from], 16, {bytes}; }}",
        to = in(_) to[target..target + 1].as_ptr(),
        from = in(_) from[source..source + 1].as_ptr(),
        bytes = in(_) bytes,
    );
}

#[cube]
pub(super) fn wait_for_all_copies() {
    gpu_asm!("cp.async.wait_all;");
}

/// Four matrices of eight rows of 16 bytes; a unit's `from` is the row that it addresses.
#[cube]
pub(super) fn load_matrices(
    stage: &Shared<[u32]>,
    from: u32,
    #[comptime] transposed: bool,
) -> Chunk {
    let from = from as usize;
    let order = comptime!(if transposed { ".trans" } else { "" });
    let fragment: Vector<u32, Const<4>>;
    gpu_asm!(
        "{{ .reg .u64 row; cvta.to.shared.u64 row, {row}; ldmatrix.sync.aligned.m8n8.x4{order}.shared.b16 {fragment}, [row]; }}",
        fragment = out(_) fragment,
        row = in(_) stage[from..from + 1].as_ptr(),
        order = const order,
    );
    fragment
}

/// A product of 16 x 16 and 16 x 8 elements, added to `sum`.
#[cube]
pub(super) fn multiply(rows: Chunk, first: u32, second: u32, sum: Sums) -> Sums {
    let out: Vector<f32, Const<4>>;
    gpu_asm!(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {out}, {rows}, {{{first}, {second}}}, {sum};",
        out = out(_) out,
        rows = in(_) rows,
        first = in(_) first,
        second = in(_) second,
        sum = in(_) sum,
        options(nomem),
    );
    out
}

/// The value of the unit of the warp whose number differs in the bit `across`.
#[cube]
pub(super) fn other(value: f32, #[comptime] across: u32) -> f32 {
    // An operand has to be the value of a variable, not the variable.
    let value = f32::reinterpret(value);
    let out: f32;
    gpu_asm!(
        "shfl.sync.bfly.b32 {out}, {value}, {across}, 31, 0xffffffff;",
        out = out(_) out,
        value = in(_) value,
        across = const across,
        options(nomem),
    );
    out
}

/// Two numbers rounded to bf16, the first in the lower half.
#[cube]
pub(super) fn rounded(first: f32, second: f32) -> u32 {
    let out: u32;
    gpu_asm!(
        "cvt.rn.bf16x2.f32 {out}, {second}, {first};",
        out = out(_) out,
        second = in(_) second,
        first = in(_) first,
        options(pure, nomem),
    );
    out
}
