//! The sizes of a cube of [`super::tensor_cores`], by what a device has.

use super::kernel::Widths;
use crate::warp::pitch;

/// What a cube computes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Rows of queries.
    pub(super) rows: usize,
    /// Positions of a tile, of which chunks are multiples.
    pub(super) keys: usize,
    /// Tiles in shared memory.
    pub(super) stages: usize,
    /// Units of a cube. A unit has `rows * C / units` sums in registers.
    pub(super) units: usize,
}

/// The shapes that there are, for 227, 163 and 99 KiB of shared memory at the report's widths: multiprocessors of
/// compute capability 9.0 and 10, of 8.0, and of 8.6, 8.9 and 12.
pub(super) const SHAPES: [Shape; 3] = [
    Shape {
        rows: 64,
        keys: 64,
        stages: 2,
        units: 256,
    },
    Shape {
        rows: 64,
        keys: 32,
        stages: 2,
        units: 256,
    },
    Shape {
        rows: 32,
        keys: 32,
        stages: 1,
        units: 128,
    },
];

/// Rows of a product of the tensor cores, and what C and R are multiples of.
pub(super) const FRAGMENT: usize = 16;
/// The widest latents whose sums fit in registers.
const MOST_LATENT: usize = 512;
/// Units of a warp.
pub(super) const WARP: usize = 32;

impl Shape {
    /// The shape for `rows` rows of a sequence on a device whose cubes may have `shared_memory` bytes, if there is one.
    /// Few rows go to a cube of few.
    pub(super) fn of(widths: Widths, rows: usize, shared_memory: usize) -> Option<Self> {
        let Widths { latent, rope, .. } = widths;
        let whole = latent.is_multiple_of(FRAGMENT) && rope.is_multiple_of(FRAGMENT);
        let served = whole && latent > 0 && rope > 0 && latent <= MOST_LATENT;
        let few = rows <= SHAPES[SHAPES.len() - 1].rows;
        SHAPES.into_iter().find(|shape| {
            served
                && shape.shared_memory(widths) <= shared_memory
                && (!few || shape.rows == SHAPES[SHAPES.len() - 1].rows)
        })
    }

    /// Bytes of shared memory of a cube.
    pub(super) fn shared_memory(self, widths: Widths) -> usize {
        let rows = (self.rows + self.stages * self.keys) * pitch(widths.latent + widths.rope);
        let weights = self.rows * pitch(self.keys);
        let floats = self.rows * (self.parts() + 1);
        16 * (rows + weights) + 4 * floats
    }

    /// Warps that share sixteen rows, each with a part of the positions of a tile.
    pub(super) fn parts(self) -> usize {
        self.units / WARP / (self.rows / FRAGMENT)
    }
}
