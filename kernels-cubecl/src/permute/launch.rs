//! Launches of the kernels for CubeCL devices.

use burn::{
    backend::{
        Cube, TensorMetadata,
        ops::{FloatTensorOps, IntTensorOps},
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{DType, IntDType, Shape},
};
use cubecl::prelude::*;

use super::{PermuteGrad, PermuteOps, Sorted, kernel, padded_rows};
use crate::{
    cube::{CubeTensor, address, contiguous, elem, empty, grid},
    flex::dims,
};

impl PermuteOps for Cube {
    fn sort_by_expert(
        chosen: IntTensor<Self>,
        experts: usize,
        tile: usize,
    ) -> Sorted<IntTensor<Self>> {
        let chosen = contiguous(chosen);
        let (client, dtype) = (chosen.client.clone(), elem(&chosen));
        let pairs = chosen.shape().num_elements();
        let int = |size: usize| empty(&chosen, [size], DType::I32);
        if pairs == 0 {
            let zeros =
                |size: usize| Self::int_zeros(Shape::new([size]), &chosen.device, IntDType::I32);
            return (zeros(0), zeros(0), zeros(experts), zeros(experts));
        }
        let blocks = pairs.div_ceil(kernel::BLOCK);
        let block_counts = empty(&chosen, [blocks, experts], DType::U32);
        let starts = empty(&chosen, [experts], DType::U32);
        let (slots, counts, rows) = (int(pairs), int(experts), int(experts));
        let order = if tile == 1 {
            int(pairs)
        } else {
            // What no pair is written to pads a segment.
            let shape = Shape::new([padded_rows(pairs, experts, tile)]);
            Self::int_full(shape, (pairs as i64).into(), &chosen.device, IntDType::I32)
        };
        let dim = CubeDim::new_1d(kernel::BLOCK as u32);
        let count = || grid(&client, blocks, dim);
        kernel::count_blocks::launch(
            &client,
            count(),
            dim,
            chosen.clone().into_buffer_arg(),
            block_counts.clone().into_buffer_arg(),
            experts as u32,
            dtype,
        );
        kernel::sum_blocks::launch(
            &client,
            CubeCount::new_single(),
            dim,
            block_counts.clone().into_buffer_arg(),
            counts.clone().into_buffer_arg(),
            rows.clone().into_buffer_arg(),
            starts.clone().into_buffer_arg(),
            tile as u32,
            experts,
        );
        kernel::place_pairs::launch(
            &client,
            count(),
            dim,
            chosen.into_buffer_arg(),
            block_counts.into_buffer_arg(),
            starts.into_buffer_arg(),
            order.clone().into_buffer_arg(),
            slots.clone().into_buffer_arg(),
            dtype,
        );
        (order, slots, counts, rows)
    }

    fn permute_rows(
        x: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([_, width], [rows]) = (dims(&x), dims(&order));
        let out = empty(&x, [rows, width], x.dtype);
        let Some(rows) = Rows::new(&x, &out, dims(&slots)) else {
            return out;
        };
        let types = (elem(&x), elem(&order));
        kernel::permute_rows::launch(
            &rows.client,
            rows.count,
            rows.dim,
            address(&[&x, &out]),
            rows.vector,
            contiguous(x).into_buffer_arg(),
            contiguous(order).into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows.width,
            rows.k as u32,
            types.0,
            types.1,
        );
        out
    }

    fn combine_rows(
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        _order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let ([_, width], [tokens, k]) = (dims(&y), dims(&slots));
        let out = empty(&y, [tokens, width], y.dtype);
        let Some(rows) = Rows::new(&y, &out, [tokens, k]) else {
            return out;
        };
        let types = (elem(&y), elem(&slots));
        kernel::sum_weighted_rows::launch(
            &rows.client,
            rows.count,
            rows.dim,
            address(&[&y, &out]),
            rows.vector,
            contiguous(y).into_buffer_arg(),
            contiguous(weights).into_buffer_arg(),
            contiguous(slots).into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows.width,
            rows.k,
            types.0,
            types.1,
        );
        out
    }
}

impl PermuteGrad for Cube {
    fn permute_rows_grad(grad: FloatTensor<Self>, slots: IntTensor<Self>) -> FloatTensor<Self> {
        let ([_, width], [tokens, k]) = (dims(&grad), dims(&slots));
        let out = empty(&grad, [tokens, width], grad.dtype);
        let Some(rows) = Rows::new(&grad, &out, [tokens, k]) else {
            return out;
        };
        let types = (elem(&grad), elem(&slots));
        kernel::sum_rows::launch(
            &rows.client,
            rows.count,
            rows.dim,
            address(&[&grad, &out]),
            rows.vector,
            contiguous(grad).into_buffer_arg(),
            contiguous(slots).into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows.width,
            rows.k,
            types.0,
            types.1,
        );
        out
    }

    fn combine_rows_grad(
        grad: FloatTensor<Self>,
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [tokens, k] = dims(&slots);
        let grad_y = empty(&y, y.shape(), y.dtype);
        let grad_weights = empty(&y, [tokens, k], y.dtype);
        let Some(rows) = Rows::new(&grad, &grad_y, [tokens, k]) else {
            // No columns to sum, or no pairs.
            let zeros = Self::float_zeros(weights.shape(), &y.device, y.dtype.into());
            return (grad_y, zeros);
        };
        let types = (elem(&y), elem(&order), elem(&slots));
        let widest = address(&[&y, &grad]);
        let (grad, y, slots) = (contiguous(grad), contiguous(y), contiguous(slots));
        kernel::permute_weighted_rows::launch(
            &rows.client,
            rows.count,
            rows.dim,
            widest,
            rows.vector,
            grad.clone().into_buffer_arg(),
            contiguous(weights).into_buffer_arg(),
            contiguous(order).into_buffer_arg(),
            grad_y.clone().into_buffer_arg(),
            rows.width,
            rows.k as u32,
            types.0,
            types.1,
        );
        let dim = CubeDim::new_1d(kernel::UNITS_PER_ROW as u32);
        kernel::row_products::launch(
            &rows.client,
            grid(&rows.client, tokens * k, dim),
            dim,
            widest,
            rows.vector,
            grad.into_buffer_arg(),
            y.into_buffer_arg(),
            slots.into_buffer_arg(),
            grad_weights.clone().into_buffer_arg(),
            rows.width,
            rows.k,
            types.0,
            types.2,
        );
        (grad_y, grad_weights)
    }
}

/// A launch with a unit per vector of the rows that are written.
struct Rows {
    client: Client,
    count: CubeCount,
    dim: CubeDim,
    vector: VectorSize,
    /// Vectors of a row.
    width: usize,
    k: usize,
}

impl Rows {
    /// None if nothing is to be read or written.
    fn new(from: &CubeTensor, to: &CubeTensor, [_, k]: [usize; 2]) -> Option<Self> {
        let [_, columns] = dims(to);
        if from.shape().num_elements() == 0 || to.shape().num_elements() == 0 {
            return None;
        }
        let client = to.client.clone();
        let vector = client
            .io_optimized_vector_sizes(to.dtype.size())
            .filter(|size| columns.is_multiple_of(*size))
            .max()
            .unwrap_or(1);
        let vectors = to.shape().num_elements() / vector;
        let dim = CubeDim::new(&client, vectors);
        let count = cubecl::calculate_cube_count_elemwise(&client, vectors, dim);
        Some(Self {
            client,
            count,
            dim,
            vector,
            width: columns / vector,
            k,
        })
    }
}
