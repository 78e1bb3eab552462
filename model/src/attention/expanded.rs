//! Attention over keys and values expanded from the latents (equations 1 to 11): the form for training.

use burn::tensor::Tensor;
use deepburn_kernels::{attention::causal_attention, rope::Rotation};

use super::{Attention, AttentionMask};

impl Attention {
    /// Attends over the whole sequence.
    ///
    /// # Shapes
    /// - `x`: `[B, T, D]`, as the result
    pub fn expanded(&self, x: Tensor<3>, rope: &Rotation, mask: &AttentionMask) -> Tensor<3> {
        let q = self.query.forward(x.clone());
        let (c_kv, k_pe) = self.latent_and_key(x);
        let kv = self.kv_b_proj.forward(c_kv);
        let first = mask.first.clone();
        self.o_proj
            .forward(causal_attention(q, kv, k_pe, rope, self.sizes(), first))
    }
}
