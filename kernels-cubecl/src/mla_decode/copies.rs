//! Copies of queries and of tiles of the cache to shared memory.

#![allow(
    clippy::if_same_then_else,
    reason = "of two conditions, one is decided when the kernel is made"
)]

use cubecl::prelude::*;

use super::kernel::Widths;
use crate::warp::{CHUNK, copy_chunk, pitch, place};

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
            copy_of_row(from, to, lines, copy, before, width, pitch);
        } else if copy < copies {
            copy_of_row(from, to, lines, copy, before, width, pitch);
        }
    }
}

#[cube]
fn copy_of_row(
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
    let source = line * width as usize + chunk as usize;
    let target = place(lines.to + row, before + chunk, pitch);
    copy_chunk(from, source, line < lines.end, to, target);
}
