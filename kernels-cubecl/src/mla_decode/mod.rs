//! Attention of few queries over the latent cache: MLA in its absorbed form (report section 2.1.1), where all heads
//! share one key and one value per position, the cached latent.

#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod copies;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod kernel;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod launch;
mod reference;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod shape;
#[cfg(feature = "cuda")]
mod sources;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod tensor_cores;
#[cfg(test)]
mod tests;

use burn::tensor::{DType, Device, Int, Tensor};

#[cfg(feature = "cuda")]
pub(crate) use sources::sources;

/// Whether a kernel serves tensors of `dtype` on `device`, and not the reference.
pub fn is_native(device: &Device, dtype: DType) -> bool {
    crate::cube::is_native(device, dtype)
}

/// `softmax(q_latent c_kv^T + q_pe k_pe^T) c_kv`, each query over what it sees of its sequence.
///
/// `lengths` are the valid positions of each sequence, the T queries' own at their end: query `t` of sequence `b` sees
/// the positions up to and including `lengths[b] - T + t`. One that sees none has zeros for its output. What the cache
/// holds from `lengths[b]` on is not looked at, whatever it is; a length above S is taken for S.
///
/// Computed in single precision for half types. Not differentiable: the result is a constant of the backward pass.
/// Native on CubeCL devices for f32, f16 and bf16: kernels that read the cache once per sixteen heads, split over its
/// length so that few sequences fill the device, with the sums in an order that depends on shapes and the device;
/// `lengths` stay on the device. They pay for few queries: products of whole prompts are better left to matrix
/// multiplication.
///
/// On CUDA devices of compute capability 8.0 and later, bf16 with C and R multiples of sixteen and C at most 512 is
/// multiplied by tensor cores, if shared memory has room for the queries of 32 heads and 32 positions and all operands
/// start at a multiple of 16 bytes (as all do that are no slice from within a row). That reads the cache once per 64
/// heads, or once per 32 where there are no more or shared memory is small. Its products are summed in single
/// precision; the weights of the latents are rounded to bf16.
///
/// # Shapes
/// - `q_latent`: `[B, T, H, C]`, `q_pe`: `[B, T, H, R]`, both scaled for the softmax
/// - `c_kv`: `[B, S, C]`, `k_pe`: `[B, S, R]`, `lengths`: `[B]`
/// - result: `[B, T, H, C]`, in the type of `q_latent`
///
/// # Panics
/// If sizes do not fit each other, or types.
pub fn mla_decode(
    q_latent: Tensor<4>,
    q_pe: Tensor<4>,
    c_kv: Tensor<3>,
    k_pe: Tensor<3>,
    lengths: Tensor<1, Int>,
) -> Tensor<4> {
    let [batch, queries, heads, latent] = q_latent.dims();
    let [_, positions, rope] = k_pe.dims();
    assert!(
        q_pe.dims() == [batch, queries, heads, rope]
            && c_kv.dims() == [batch, positions, latent]
            && k_pe.dims() == [batch, positions, rope]
            && lengths.dims() == [batch],
        "q_latent {:?}, q_pe {:?}, c_kv {:?}, k_pe {:?} and lengths {:?} do not fit",
        q_latent.dims(),
        q_pe.dims(),
        c_kv.dims(),
        k_pe.dims(),
        lengths.dims()
    );
    let (device, dtype) = (q_latent.device(), q_latent.dtype());
    let dtypes = [q_pe.dtype(), c_kv.dtype(), k_pe.dtype()];
    assert!(
        dtypes == [dtype; 3],
        "q_latent in {dtype:?} with q_pe, c_kv and k_pe in {dtypes:?}"
    );
    if batch * queries * heads * latent * positions == 0 {
        return Tensor::zeros([batch, queries, heads, latent], (&device, dtype));
    }
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    if rope > 0 && is_native(&device, dtype) {
        let inputs = launch::Inputs::new([q_latent, q_pe], [c_kv, k_pe], lengths);
        let plan = inputs.plan();
        let out = launch::mla_decode(inputs, plan);
        return if device.is_autodiff() {
            out.autodiff()
        } else {
            out
        };
    }
    reference::mla_decode(
        q_latent.detach(),
        q_pe.detach(),
        c_kv.detach(),
        k_pe.detach(),
        lengths,
    )
}
