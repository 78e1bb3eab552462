//! Attention over keys and values expanded from the latents (equations 1 to 11): the form for training.

use burn::tensor::Tensor;
use deepburn_kernels::attention::causal_attention;

use super::{Attention, AttentionMask};
use crate::rope::RopeTables;

impl Attention {
    /// Attends over the whole sequence.
    ///
    /// # Shapes
    /// - `x`: `[B, T, D]`, as the result
    pub fn expanded(&self, x: Tensor<3>, rope: &RopeTables, mask: &AttentionMask) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let (q_nope, q_pe) = self.queries(x.clone(), rope);
        let (c_kv, k_pe) = self.latents(x, rope);
        let kv = self.kv_b_proj.forward(c_kv).reshape([
            batch,
            length,
            self.heads,
            self.nope + self.value,
        ]);
        let k_nope = kv.clone().narrow(3, 0, self.nope);
        let v = kv.narrow(3, self.nope, self.value);
        let k_pe = k_pe
            .reshape([batch, length, 1, self.rope])
            .expand([batch, length, self.heads, self.rope]);

        let q = Tensor::cat(vec![q_nope, q_pe], 3); // [B, T, H, N + R]
        let k = Tensor::cat(vec![k_nope, k_pe], 3);
        let out = causal_attention(q, k, v, mask.first.clone()); // [B, T, H, V]
        self.o_proj
            .forward(out.reshape([batch, length, self.heads * self.value]))
    }
}
