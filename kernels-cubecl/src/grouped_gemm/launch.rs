//! Launches of the kernels for CubeCL devices.

#![allow(
    unsafe_code,
    reason = "the tensor cores' kernels are launched without checks of their indices"
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

use super::{GroupedGemmGrad, GroupedGemmOps, kernel, tensor_cores};
use crate::{
    cube::{CubeTensor, address, contiguous, elem, empty},
    flex::dims,
    warp::{self, CHUNK},
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
        let (x, grad) = (contiguous(x), contiguous(grad));
        let (tensor_cores, tile) = kernel_for([&x, &grad], [height, width]);
        let bounds = bounds(counts, rows, tile);
        let count = CubeCount::Static(tiles(width, tile), tiles(height, tile), experts as u32);
        let address = address(&[&x, &grad, &out]);
        if tensor_cores {
            // SAFETY: as in `by_segment`.
            unsafe {
                tensor_cores::segment_weight_grad_bf16::launch_unchecked(
                    &client,
                    count,
                    CubeDim::new_1d(tensor_cores::UNITS as u32),
                    address,
                    x.into_buffer_arg(),
                    grad.into_buffer_arg(),
                    bounds.into_buffer_arg(),
                    out.clone().into_buffer_arg(),
                    height,
                    width,
                );
            }
            return out;
        }
        kernel::segment_matmul_weight_grad::launch(
            &client,
            count,
            DIM,
            address,
            x.into_buffer_arg(),
            grad.into_buffer_arg(),
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
    let (x, weights) = (contiguous(x), contiguous(weights));
    let (tensor_cores, tile) = kernel_for([&x, &weights], [inner, width]);
    let bounds = bounds(counts, rows, tile);
    // Each segment, and the rows behind the last, may have one tile that is not full.
    let count = CubeCount::Static(tiles(rows, tile) + experts as u32, tiles(width, tile), 1);
    let address = address(&[&x, &weights, &out]);
    if tensor_cores {
        // SAFETY: the kernel's indices stay in the shapes that it is told, which are those of its buffers, copies of what
        // is beyond them read nothing, and its loops are counted.
        unsafe {
            tensor_cores::segment_matmul_bf16::launch_unchecked(
                &client,
                count,
                CubeDim::new_1d(tensor_cores::UNITS as u32),
                address,
                x.into_buffer_arg(),
                weights.into_buffer_arg(),
                bounds.into_buffer_arg(),
                out.clone().into_buffer_arg(),
                inner,
                width,
                transposed,
            );
        }
        return out;
    }
    kernel::segment_matmul::launch(
        &client,
        count,
        DIM,
        address,
        x.into_buffer_arg(),
        weights.into_buffer_arg(),
        bounds.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        inner,
        width,
        transposed,
        dtype,
    );
    out
}

/// Whether tensor cores multiply, which take rows of whole copies, and the rows of a tile of the kernel that does.
fn kernel_for(operands: [&CubeTensor; 2], widths: [usize; 2]) -> (bool, usize) {
    let whole = widths.iter().all(|width| width.is_multiple_of(CHUNK));
    match whole && warp::serve(&operands) {
        true => (true, tensor_cores::TILE),
        false => (false, kernel::TILE),
    }
}

/// Where the segments of `rows` rows start, in rows and in tiles of `tile` rows.
pub(crate) fn bounds(counts: CubeTensor, rows: usize, tile: usize) -> CubeTensor {
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
        tile as u32,
        dtype,
    );
    bounds
}

fn tiles(size: usize, tile: usize) -> u32 {
    size.div_ceil(tile) as u32
}
