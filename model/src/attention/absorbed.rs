//! Attention over the cached latents themselves: the form for decoding.
//!
//! With W_UK and W_UV the parts of `kv_b_proj` that make keys and values, a score is q (W_UK c) = (q W_UK) c, and
//! an output is W_UV (sum p c). The products in brackets are per query, so keys and values are never built and a
//! step reads C + R numbers per cached token, whatever the number of heads.

use burn::tensor::{Int, Tensor, activation::softmax};

use deepburn_kernels::{mla_decode, rope::Rotation};

use super::{Attention, LayerCache};

/// Queries per sequence up to which a kernel that reads the cache for each of them pays.
const FEW: usize = 8;

impl Attention {
    /// Appends the latents of `x` to the cache and attends over all of it.
    ///
    /// # Shapes
    /// - `x`: `[B, T, D]`, the tokens after those in the cache; as the result
    pub fn absorbed(&self, x: Tensor<3>, rope: &Rotation, cache: &mut LayerCache) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let (q_nope, q_pe) = self.queries(x.clone(), rope);
        let (c_kv, k_pe) = self.latents(x, rope);
        let (c_kv, k_pe) = cache.append(c_kv, k_pe); // [B, S, C], [B, S, R]
        let [_, _, latent] = c_kv.dims();
        let up = self
            .kv_b_proj
            .weight
            .val()
            .reshape([latent, self.heads, self.nope + self.value]);
        let w_uk = up
            .clone()
            .narrow(2, 0, self.nope)
            .permute([1, 2, 0])
            .unsqueeze::<4>(); // [1, H, N, C]
        let w_uv = up
            .narrow(2, self.nope, self.value)
            .permute([1, 0, 2])
            .unsqueeze::<4>(); // [1, H, C, V]
        let q_latent = q_nope.swap_dims(1, 2).matmul(w_uk); // [B, H, T, C]
        let device = c_kv.device();
        let by_kernel = length <= FEW && mla_decode::is_native(&device, c_kv.dtype());
        let attended = if by_kernel && !device.is_autodiff() {
            let [_, seen, _] = c_kv.dims();
            let lengths = Tensor::full([batch], seen as i64, &device);
            mla_decode::mla_decode(q_latent.swap_dims(1, 2), q_pe, c_kv, k_pe, lengths)
                .swap_dims(1, 2)
        } else {
            let c_kv = c_kv.unsqueeze_dim::<4>(1); // [B, 1, S, C]
            let k_pe = k_pe.unsqueeze_dim::<4>(1);
            let scores = q_latent.matmul(c_kv.clone().transpose())
                + q_pe.swap_dims(1, 2).matmul(k_pe.transpose()); // [B, H, T, S]
            let scores = if length > 1 {
                hide_future(scores)
            } else {
                scores
            };
            softmax(scores, 3).matmul(c_kv)
        }; // [B, H, T, C]
        let out = attended.matmul(w_uv).swap_dims(1, 2); // [B, T, H, V]
        self.o_proj
            .forward(out.reshape([batch, length, self.heads * self.value]))
    }
}

/// Masks, for the last T of S positions, what comes after each of them. `[B, H, T, S]`
fn hide_future(scores: Tensor<4>) -> Tensor<4> {
    let [batch, heads, queries, keys] = scores.dims();
    let device = scores.device();
    let shape = [1, 1, queries, keys];
    let at = |start: usize, end: usize| Tensor::<1, Int>::arange(start as i64..end as i64, &device);
    let query = at(keys - queries, keys)
        .reshape([1, 1, queries, 1])
        .expand(shape);
    let key = at(0, keys).reshape([1, 1, 1, keys]).expand(shape);
    let hidden = key.greater(query).expand([batch, heads, queries, keys]);
    scores.mask_fill(hidden, f32::NEG_INFINITY)
}
