//! What kernels in bf16 on tensor cores are made of: copies to rows in shared memory, and instructions of a warp.
//!
//! Rows in shared memory are a multiple of 128 bytes. The 16 bytes of number `i` of row `r` are at `i ^ r % 8`: the
//! eight rows that `ldmatrix` reads at once, and the eight that a warp writes weights of, then lie in different banks.

use burn::tensor::DType;
use cubecl::prelude::*;

use crate::{cube::CubeTensor, fp8::capability};

/// Elements of 16 bytes.
pub(crate) const CHUNK: usize = 8;

/// 16 bytes, or a unit's part of a matrix of 16 x 16.
pub(crate) type Chunk = Vector<u32, Const<4>>;
/// A unit's part of a product of 16 x 8.
pub(crate) type Sums = Vector<f32, Const<4>>;

/// Whether these kernels serve operands, as far as sizes do not matter: in bf16, on a CUDA device whose tensor cores
/// multiply that, and starting where copies of 16 bytes do.
pub(crate) fn serve(operands: &[&CubeTensor]) -> bool {
    operands.iter().all(|operand| {
        let start = operand.handle.offset_start.unwrap_or(0);
        operand.dtype == DType::BF16
            && start.is_multiple_of(16)
            && capability(&operand.client).is_some_and(|capability| capability >= 80)
    })
}

/// Distance of rows of `width` elements in shared memory, in chunks.
pub(crate) fn pitch(width: usize) -> usize {
    (width / CHUNK).next_multiple_of(8)
}

/// Rows in shared memory, by words of 32 bits.
#[cube]
pub(crate) fn shared_rows(#[comptime] rows: usize, #[comptime] pitch: u32) -> Shared<[u32]> {
    Shared::<[u32]>::new_aligned_slice(comptime!(rows * pitch as usize * 4), 16usize)
}

/// The first word of a chunk of a row in shared memory.
#[cube]
pub(crate) fn place(row: u32, chunk: u32, #[comptime] pitch: u32) -> u32 {
    (row * pitch + (chunk ^ (row % 8))) * 4
}

/// Starts to copy a chunk to a word of shared memory; zeros and nothing read where it is not `inside`.
#[cube]
pub(crate) fn copy_chunk(
    from: &[Vector<u32, Const<4>>],
    chunk: usize,
    inside: bool,
    to: &mut Shared<[u32]>,
    target: u32,
) {
    let bytes = select(inside, 16u32, 0u32);
    // A copy of no bytes writes zeros and reads nothing, but its address has to be one of the matrix.
    let source = select(inside, chunk, 0usize);
    let target = target as usize;
    gpu_asm!(
        "{{ .reg .u64 to, from; cvta.to.shared.u64 to, {to}; cvta.to.global.u64 from, {from}; cp.async.cg.shared.global [to], [from], 16, {bytes}; }}",
        to = in(_) to[target..target + 1].as_ptr(),
        from = in(_) from[source..source + 1].as_ptr(),
        bytes = in(_) bytes,
    );
}

/// Ends the group of copies that were started since the last.
#[cube]
pub(crate) fn commit_copies() {
    gpu_asm!("cp.async.commit_group;");
}

#[cube]
pub(crate) fn wait_for_all_copies_but_the_last_group() {
    gpu_asm!("cp.async.wait_group 1;");
}

#[cube]
pub(crate) fn wait_for_all_copies() {
    gpu_asm!("cp.async.wait_all;");
}

/// Four matrices of eight rows of 16 bytes; a unit's `from` is the row that it addresses.
#[cube]
pub(crate) fn load_matrices(
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
pub(crate) fn multiply(rows: Chunk, first: u32, second: u32, sum: Sums) -> Sums {
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
pub(crate) fn other(value: f32, #[comptime] across: u32) -> f32 {
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
pub(crate) fn rounded(first: f32, second: f32) -> u32 {
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
