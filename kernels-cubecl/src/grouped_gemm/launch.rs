//! Launches of the kernels for CubeCL devices.

use burn::{
    backend::{
        Cube,
        ops::FloatTensorOps,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, Shape},
};
use cubecl::prelude::*;

use super::{GroupedGemmGrad, GroupedGemmOps, kernel};
use crate::{
    cube::{CubeTensor, address, contiguous, elem, empty},
    flex::dims,
};

impl GroupedGemmOps for Cube {
    fn segment_matmul(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        by_segment(x, weights, counts, false)
    }
}

impl GroupedGemmGrad for Cube {
    fn segment_matmul_input_grad(
        grad: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        by_segment(grad, weights, counts, true)
    }

    fn segment_matmul_weight_grad(
        x: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        counts: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([rows, height], [_, width], [experts]) = (dims(&x), dims(&grad), dims(&counts));
        let shape = Shape::new([experts, height, width]);
        if rows * height * width == 0 {
            return Self::float_zeros(shape, &x.device, x.dtype.into());
        }
        let out = empty(&x, shape, x.dtype);
        let (client, dtype) = (x.client.clone(), elem(&x));
        let bounds = bounds(counts, rows);
        let count = CubeCount::Static(tiles(width), tiles(height), experts as u32);
        kernel::segment_matmul_weight_grad::launch(
            &client,
            count,
            DIM,
            address(&[&x, &grad, &out]),
            contiguous(x).into_buffer_arg(),
            contiguous(grad).into_buffer_arg(),
            bounds.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            height,
            width,
            dtype,
        );
        out
    }
}

const DIM: CubeDim = CubeDim::new_2d(kernel::UNITS as u32, kernel::UNITS as u32);

/// `y_e = x_e W_e` for every segment, or `x_e W_e^T`.
fn by_segment(
    x: CubeTensor,
    weights: CubeTensor,
    counts: CubeTensor,
    transposed: bool,
) -> CubeTensor {
    let ([rows, inner], [experts, height, columns]) = (dims(&x), dims(&weights));
    let width = if transposed { height } else { columns };
    let shape = Shape::new([rows, width]);
    if rows * inner * width == 0 {
        return Cube::float_zeros(shape, &x.device, x.dtype.into());
    }
    let out = empty(&x, shape, x.dtype);
    let (client, dtype) = (x.client.clone(), elem(&x));
    let bounds = bounds(counts, rows);
    // Each segment, and the rows behind the last, may have one tile that is not full.
    let count = CubeCount::Static(tiles(rows) + experts as u32, tiles(width), 1);
    kernel::segment_matmul::launch(
        &client,
        count,
        DIM,
        address(&[&x, &weights, &out]),
        contiguous(x).into_buffer_arg(),
        contiguous(weights).into_buffer_arg(),
        bounds.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        inner,
        width,
        transposed,
        dtype,
    );
    out
}

/// Where the segments of `rows` rows start, in rows and in tiles.
fn bounds(counts: CubeTensor, rows: usize) -> CubeTensor {
    let counts = contiguous(counts);
    let [experts] = dims(&counts);
    let bounds = empty(&counts, [2, experts + 2], DType::U32);
    let (client, dtype) = (counts.client.clone(), elem(&counts));
    kernel::segment_bounds::launch(
        &client,
        CubeCount::new_single(),
        DIM,
        counts.into_buffer_arg(),
        bounds.clone().into_buffer_arg(),
        rows as u32,
        experts,
        dtype,
    );
    bounds
}

fn tiles(size: usize) -> u32 {
    size.div_ceil(kernel::TILE) as u32
}
