//! Launches of the kernels for CubeCL devices.

#![allow(
    unsafe_code,
    reason = "kernels that check their indices themselves are launched unchecked"
)]

use burn::{
    backend::Cube,
    tensor::{BackendPrimitive, DType, Int, Tensor},
};
use cubecl::prelude::*;

use super::{
    kernel::{self, KEYS, ROWS, UNITS, Widths},
    shape::Shape,
    tensor_cores,
};
use crate::{
    cube::{CubeTensor, address, contiguous, elem, empty, grid},
    flex::dims,
    warp,
};

/// Cubes that keep a large GPU busy: some four on each multiprocessor.
const CUBES: usize = 512;
/// What a cube of tensor cores does beside its tiles, in times of a tile: it copies its queries and writes its sums,
/// which the merge reads.
const BESIDE: usize = 3;
/// Units of a cube that has all registers that a unit may have: a multiprocessor has as many for all of its cubes.
const UNITS_AT_ONCE: usize = 256;

/// The operands, of sizes that fit each other and are not zero.
pub(super) struct Inputs {
    q_latent: CubeTensor,
    q_pe: CubeTensor,
    c_kv: CubeTensor,
    k_pe: CubeTensor,
    lengths: CubeTensor,
}

impl Inputs {
    pub(super) fn new(
        [q_latent, q_pe]: [Tensor<4>; 2],
        [c_kv, k_pe]: [Tensor<3>; 2],
        lengths: Tensor<1, Int>,
    ) -> Self {
        Self {
            q_latent: primitive(q_latent),
            q_pe: primitive(q_pe),
            c_kv: primitive(c_kv),
            k_pe: primitive(k_pe),
            lengths: primitive(lengths),
        }
    }
}

fn primitive<const D: usize, K>(tensor: Tensor<D, K>) -> CubeTensor
where
    K: burn::tensor::kind::Autodiff + BackendPrimitive<Cube, Primitive = CubeTensor>,
{
    let tensor = tensor.without_autodiff().try_into_primitive::<Cube>();
    contiguous(tensor.expect("all operands are on the device of the first"))
}

/// Which kernel attends, and the positions of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Of the tensor cores' kernel, or the other one.
    pub(super) shape: Option<Shape>,
    pub(super) chunk: usize,
}

impl Inputs {
    /// The tensor cores' kernel where the device, the type and the sizes are those that it is for.
    pub(super) fn plan(&self) -> Plan {
        let [batch, queries, heads, latent] = dims(&self.q_latent);
        let [_, positions, rope] = dims(&self.k_pe);
        let widths = Widths {
            heads,
            latent,
            rope,
        };
        let tensor_cores = warp::serve(&[&self.q_latent, &self.q_pe, &self.c_kv, &self.k_pe]);
        let hardware = &self.q_latent.client.properties().hardware;
        let memory = hardware.max_shared_memory_size;
        let rows = queries * heads;
        match Shape::of(widths, rows, memory).filter(|_| tensor_cores) {
            Some(shape) => {
                let processors = hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
                let together = (memory / shape.shared_memory(widths))
                    .min(UNITS_AT_ONCE / shape.units)
                    .max(1);
                let cubes = batch * rows.div_ceil(shape.rows);
                let tiles =
                    tiles_of_a_chunk(positions.div_ceil(shape.keys), cubes, processors * together);
                Plan {
                    shape: Some(shape),
                    chunk: tiles * shape.keys,
                }
            }
            None => Plan {
                shape: None,
                chunk: chunk(positions, batch * rows),
            },
        }
    }
}

/// The positions of a chunk, for `rows` rows over all sequences: as many chunks as keep the device busy.
pub(super) fn chunk(positions: usize, rows: usize) -> usize {
    let chunks = CUBES
        .div_ceil(rows.div_ceil(ROWS))
        .min(positions.div_ceil(KEYS));
    positions.div_ceil(chunks).next_multiple_of(KEYS)
}

/// The tiles of a chunk, of `tiles` in all: those that end soonest for `cubes` cubes per chunk, of which the device
/// runs `together` at a time, one wave after another.
pub(super) fn tiles_of_a_chunk(tiles: usize, cubes: usize, together: usize) -> usize {
    // More waves than a few make the last one, which may not be full, no shorter.
    let most = (4 * together).div_ceil(cubes).min(tiles);
    (1..=most)
        .map(|chunks| tiles.div_ceil(chunks))
        .min_by_key(|&each| (cubes * tiles.div_ceil(each)).div_ceil(together) * (each + BESIDE))
        .unwrap_or(tiles)
}

/// See [`super::mla_decode`]; in chunks of whole tiles.
pub(super) fn mla_decode(inputs: Inputs, Plan { shape, chunk }: Plan) -> Tensor<4> {
    let keys = shape.map_or(KEYS, |shape| shape.keys);
    assert!(chunk.is_multiple_of(keys), "a chunk of {chunk} positions");
    let Inputs {
        q_latent,
        q_pe,
        c_kv,
        k_pe,
        lengths,
    } = inputs;
    let [batch, queries, heads, latent] = dims(&q_latent);
    let [_, positions, rope] = dims(&k_pe);
    let widths = Widths {
        heads,
        latent,
        rope,
    };
    let chunks = positions.div_ceil(chunk);
    let rows = queries * heads;
    let sums = empty(&q_latent, [batch * rows * chunks, latent], DType::F32);
    let softmax = empty(&q_latent, [batch * rows * chunks, 2], DType::F32);
    let out = empty(&q_latent, [batch, queries, heads, latent], q_latent.dtype);
    let (client, float, int) = (q_latent.client.clone(), elem(&q_latent), elem(&lengths));
    let address = address(&[&q_latent, &q_pe, &c_kv, &k_pe, &sums]);
    let dim = CubeDim::new_1d(UNITS as u32);
    let cubes = |rows_of_a_cube| batch * chunks * rows.div_ceil(rows_of_a_cube);
    let [q_latent, q_pe, c_kv, k_pe] =
        [q_latent, q_pe, c_kv, k_pe].map(CubeTensor::into_buffer_arg);
    match shape {
        // SAFETY: the kernel's indices stay in the shapes that it is told, which are those of its buffers, copies of
        // what is beyond them read nothing, and its loops are counted.
        Some(shape) => unsafe {
            let dim = CubeDim::new_1d(shape.units as u32);
            tensor_cores::attend_bf16::launch_unchecked(
                &client,
                grid(&client, cubes(shape.rows), dim),
                dim,
                address,
                q_latent,
                q_pe,
                c_kv,
                k_pe,
                lengths.clone().into_buffer_arg(),
                sums.clone().into_buffer_arg(),
                softmax.clone().into_buffer_arg(),
                queries,
                positions,
                chunks,
                chunk,
                widths,
                shape,
                int,
            );
        },
        // SAFETY: the kernel's indices stay in the shapes that it is told, which are those of its buffers, and its
        // loops are counted.
        None => unsafe {
            kernel::attend::launch_unchecked(
                &client,
                grid(&client, cubes(ROWS), dim),
                dim,
                address,
                q_latent,
                q_pe,
                c_kv,
                k_pe,
                lengths.clone().into_buffer_arg(),
                sums.clone().into_buffer_arg(),
                softmax.clone().into_buffer_arg(),
                queries,
                positions,
                chunks,
                chunk,
                widths,
                float,
                int,
            );
        },
    }
    // SAFETY: as above.
    unsafe {
        kernel::merge::launch_unchecked(
            &client,
            grid(&client, batch * rows, dim),
            dim,
            address,
            sums.into_buffer_arg(),
            softmax.into_buffer_arg(),
            lengths.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            queries,
            positions,
            chunks,
            chunk,
            widths,
            float,
            int,
        );
    }
    Tensor::from_primitive::<Cube>(out)
}
