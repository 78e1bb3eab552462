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

use super::kernel::{self, KEYS, ROWS, UNITS, Widths};
use crate::{
    cube::{CubeTensor, address, contiguous, elem, empty, grid},
    flex::dims,
};

/// Cubes that keep a large GPU busy: some four on each multiprocessor.
const CUBES: usize = 512;

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

/// The positions of a chunk, for `rows` rows over all sequences: as many chunks as keep the device busy.
pub(super) fn chunk(positions: usize, rows: usize) -> usize {
    let chunks = CUBES
        .div_ceil(rows.div_ceil(ROWS))
        .min(positions.div_ceil(KEYS));
    positions.div_ceil(chunks).next_multiple_of(KEYS)
}

/// See [`super::mla_decode`]; in chunks of `chunk` positions, a multiple of [`KEYS`].
pub(super) fn mla_decode(inputs: Inputs, chunk: usize) -> Tensor<4> {
    assert!(chunk.is_multiple_of(KEYS), "a chunk of {chunk} positions");
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
    // SAFETY: the kernel's indices stay in the shapes that it is told, which are those of its buffers, and its loops
    // are counted.
    unsafe {
        kernel::attend::launch_unchecked(
            &client,
            grid(&client, batch * chunks * rows.div_ceil(ROWS), dim),
            dim,
            address,
            q_latent.into_buffer_arg(),
            q_pe.into_buffer_arg(),
            c_kv.into_buffer_arg(),
            k_pe.into_buffer_arg(),
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
