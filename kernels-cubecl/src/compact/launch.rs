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
    cube::{CubeTensor, address, contiguous, empty},
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
        few_rows(x, words, scales, None, layout)
    }

    fn compact_grouped_linear(
        x: FloatTensor<Self>,
        words: IntTensor<Self>,
        scales: FloatTensor<Self>,
        counts: IntTensor<Self>,
        most: usize,
        layout: Layout,
    ) -> FloatTensor<Self> {
        few_rows(x, words, scales, Some((counts, most)), layout)
    }
}

/// The product with a single matrix, or that of segments: their sizes, and the largest that is to be expected.
fn few_rows(
    x: CubeTensor,
    words: CubeTensor,
    scales: CubeTensor,
    segments: Option<(CubeTensor, usize)>,
    layout: Layout,
) -> CubeTensor {
    let ([rows, _], [experts, inner, columns]) = (dims(&x), layout.shape);
    let shape = Shape::new([rows, columns]);
    if rows * inner * columns == 0 {
        return Cube::float_zeros(shape, &x.device, x.dtype.into());
    }
    let out = empty(&x, shape, DType::F32);
    let (client, x) = (x.client.clone(), contiguous(x));
    let most = segments.as_ref().map_or(rows, |(_, most)| *most);
    let tile = most.next_power_of_two().min(kernel::ROWS);
    let count = |tiles: usize| CubeCount::Static(tiles as u32, columns.div_ceil(TILE) as u32, 1);
    let dim = CubeDim::new_1d(kernel::UNITS as u32);
    let address = address(&[&x, &words, &out]);
    let (x, words, scales) = (
        x.into_buffer_arg(),
        words.into_buffer_arg(),
        scales.into_buffer_arg(),
    );
    let written = out.clone().into_buffer_arg();
    match segments {
        // SAFETY: the kernel's indices stay in the shapes that it is told, which are those of its buffers, and its loops
        // are counted.
        None => unsafe {
            kernel::few_rows::launch_unchecked(
                &client,
                count(rows.div_ceil(tile)),
                dim,
                address,
                x,
                words,
                scales,
                written,
                inner,
                columns,
                tile,
                layout.is_fp8(),
            );
        },
        // Each segment that is not empty, and the rows behind the last, may have one tile that is not full.
        // SAFETY: as above; where segments start is within the rows.
        Some((counts, _)) => unsafe {
            kernel::few_rows_by_segment::launch_unchecked(
                &client,
                count(rows.div_ceil(tile) + experts.min(rows) + 1),
                dim,
                address,
                x,
                words,
                scales,
                bounds(counts, rows, tile).into_buffer_arg(),
                written,
                inner,
                columns,
                tile,
                layout.is_fp8(),
            );
        },
    }
    out
}

impl Layout {
    fn is_fp8(self) -> bool {
        self.format == CompactFormat::Fp8
    }
}
