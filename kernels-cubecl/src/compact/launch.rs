//! Launches of the kernels for CubeCL devices.

#![allow(
    unsafe_code,
    reason = "kernels that check their indices themselves are launched unchecked"
)]

use burn::{
    backend::{
        Cube,
        ops::FloatTensorOps,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, Shape},
};
use cubecl::prelude::*;

use super::{
    CompactFormat, kernel,
    words::{CompactOps, Layout, QUAD},
};
use crate::{
    cube::{address, contiguous, empty},
    flex::dims,
    fp8::TILE,
    grouped_gemm::launch::bounds,
};

impl CompactOps for Cube {
    fn compact_widened(
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self> {
        let [matrices, inner, columns] = layout.shape;
        let units = matrices * inner * columns.div_ceil(QUAD);
        let out = empty(&scales, layout.shape, DType::F32);
        if units == 0 {
            return out;
        }
        let client = scales.client.clone();
        let dim = CubeDim::new(&client, units);
        kernel::widen::launch(
            &client,
            cubecl::calculate_cube_count_elemwise(&client, units, dim),
            dim,
            address(&[&words, &out]),
            words.into_buffer_arg(),
            scales.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            inner,
            columns,
            layout.is_fp8(),
        );
        out
    }

    fn compact_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        layout: Layout,
    ) -> FloatTensor<Self> {
        let ([rows, _], [_, inner, columns]) = (dims(&x), layout.shape);
        let shape = Shape::new([rows, columns]);
        if rows * inner * columns == 0 {
            return Self::float_zeros(shape, &x.device, x.dtype.into());
        }
        let out = empty(&x, shape, DType::F32);
        let (client, x) = (x.client.clone(), contiguous(x));
        let tile = tile_of(rows);
        let tiles = [rows.div_ceil(tile), columns.div_ceil(TILE)].map(|count| count as u32);
        // SAFETY: the kernel's indices stay in the shapes that it is told, which are those of its buffers, and its loops
        // are counted.
        unsafe {
            kernel::few_rows::launch_unchecked(
                &client,
                CubeCount::Static(tiles[0], tiles[1], 1),
                CubeDim::new_1d(kernel::UNITS as u32),
                address(&[&x, &words, &out]),
                x.into_buffer_arg(),
                words.into_buffer_arg(),
                scales.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                inner,
                columns,
                tile,
                layout.is_fp8(),
            );
        }
        out
    }

    fn compact_grouped_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        counts: IntTensor<Self>,
        most: usize,
        layout: Layout,
    ) -> FloatTensor<Self> {
        let ([rows, _], [experts, inner, columns]) = (dims(&x), layout.shape);
        let shape = Shape::new([rows, columns]);
        if rows * inner * columns == 0 {
            return Self::float_zeros(shape, &x.device, x.dtype.into());
        }
        let out = empty(&x, shape, DType::F32);
        let (client, x) = (x.client.clone(), contiguous(x));
        let tile = tile_of(most);
        let bounds = bounds(counts, rows, tile);
        // Each segment that is not empty, and the rows behind the last, may have one tile that is not full.
        let tiles = rows.div_ceil(tile) + experts.min(rows) + 1;
        let count = CubeCount::Static(tiles as u32, columns.div_ceil(TILE) as u32, 1);
        // SAFETY: as above; where segments start is within the rows.
        unsafe {
            kernel::few_rows_by_segment::launch_unchecked(
                &client,
                count,
                CubeDim::new_1d(kernel::UNITS as u32),
                address(&[&x, &words, &out]),
                x.into_buffer_arg(),
                words.into_buffer_arg(),
                scales.into_buffer_arg(),
                bounds.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                inner,
                columns,
                tile,
                layout.is_fp8(),
            );
        }
        out
    }
}

impl Layout {
    fn is_fp8(self) -> bool {
        self.format == CompactFormat::Fp8
    }
}

/// Rows of a tile where a matrix has up to `most` of them.
fn tile_of(most: usize) -> usize {
    most.next_power_of_two().min(kernel::ROWS)
}
