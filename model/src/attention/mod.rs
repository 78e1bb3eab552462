//! Multi-head latent attention, MLA (report section 2.1.1).
//!
//! Keys and values of all heads come from one latent vector per token, c_kv, plus one rotated key that the heads
//! share. Two forms compute the same: [`Attention::expanded`] builds keys and values for training,
//! [`Attention::absorbed`] multiplies the up-projections into queries and outputs, so that decoding reads nothing but
//! the cached latents. [`Attention::paged`] is the second over a cache that several sequences share.

mod absorbed;
mod cache;
mod expanded;
mod paged;

use burn::{
    module::Module,
    tensor::{Device, Int, Tensor},
};

pub use cache::{LatentCache, LayerCache};
pub use deepburn_kernels::mla_paged::{Layout, Span};
pub use paged::{LayerPages, PagedCache};

use deepburn_kernels::{
    attention::Sizes,
    compact::{CompactFormat, NotCompact},
    rope::Rotation,
};

use crate::{
    config::ModelConfig,
    init::Initializer,
    norm::RmsNorm,
    projection::{Arithmetic, Projection},
    recompute::Recompute,
    rope::Rope,
};

/// The latent norms have this epsilon whatever the configuration says, as upstream.
const LATENT_NORM_EPSILON: f64 = 1e-6;

/// One layer's attention.
#[derive(Module, Debug)]
pub struct Attention {
    query: QueryProjection,
    /// Latent and shared key, `[D, C + R]`.
    pub kv_a_proj_with_mqa: Projection,
    /// Norm of the latent. `[C]`
    pub kv_a_layernorm: RmsNorm,
    /// Keys without position and values of all heads, `[C, H (N + V)]`.
    pub kv_b_proj: Projection,
    /// Output projection, `[H V, D]`.
    pub o_proj: Projection,
    heads: usize,
    nope: usize,
    rope: usize,
    value: usize,
    softmax_scale: f64,
}

/// How queries are made.
#[allow(
    clippy::large_enum_variant,
    reason = "one value per layer, and Burn's modules are not boxed"
)]
#[derive(Module, Debug)]
pub enum QueryProjection {
    /// One matrix, where `q_lora_rank` is null.
    Direct(DirectQuery),
    /// Through a latent of `q_lora_rank` (equations 6 to 8).
    LowRank(LowRankQuery),
}

/// Queries by one matrix.
#[derive(Module, Debug)]
pub struct DirectQuery {
    /// `[D, H (N + R)]`
    pub q_proj: Projection,
}

/// Queries through a latent.
#[derive(Module, Debug)]
pub struct LowRankQuery {
    /// `[D, Q]`
    pub q_a_proj: Projection,
    /// `[Q]`
    pub q_a_layernorm: RmsNorm,
    /// `[Q, H (N + R)]`
    pub q_b_proj: Projection,
}

impl QueryProjection {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            Self::Direct(query) => query.q_proj.forward(x),
            Self::LowRank(query) => query
                .q_b_proj
                .forward(query.q_a_layernorm.forward(query.q_a_proj.forward(x))),
        }
    }

    fn projections(&mut self) -> Vec<&mut Projection> {
        match self {
            Self::Direct(query) => vec![&mut query.q_proj],
            Self::LowRank(query) => vec![&mut query.q_a_proj, &mut query.q_b_proj],
        }
    }
}

impl Attention {
    /// One layer's attention for a model of the given shape.
    pub fn new(config: &ModelConfig, init: Initializer) -> Self {
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        let query_width = heads * config.qk_head_dim();
        let query = match config.q_lora_rank {
            None => QueryProjection::Direct(DirectQuery {
                q_proj: Projection::new(hidden, query_width, init.child("q_proj")),
            }),
            Some(rank) => QueryProjection::LowRank(LowRankQuery {
                q_a_proj: Projection::new(hidden, rank, init.child("q_a_proj")),
                q_a_layernorm: latent_norm(rank, init.child("q_a_layernorm")),
                q_b_proj: Projection::new(rank, query_width, init.child("q_b_proj")),
            }),
        };
        let latent = config.kv_lora_rank;
        let key_value = heads * (config.qk_nope_head_dim + config.v_head_dim);
        Self {
            query,
            kv_a_proj_with_mqa: Projection::new(
                hidden,
                config.cache_width(),
                init.child("kv_a_proj_with_mqa"),
            ),
            kv_a_layernorm: latent_norm(latent, init.child("kv_a_layernorm")),
            kv_b_proj: Projection::new(latent, key_value, init.child("kv_b_proj")),
            o_proj: Projection::new(heads * config.v_head_dim, hidden, init.child("o_proj")),
            heads,
            nope: config.qk_nope_head_dim,
            rope: config.qk_rope_head_dim,
            value: config.v_head_dim,
            softmax_scale: Rope::new(config).softmax_scale,
        }
    }

    /// Holds the weights in a compact format but for those of `kv_b_proj`, which are multiplied into queries and outputs.
    pub(crate) fn hold(&mut self, format: CompactFormat) -> Result<(), NotCompact> {
        let others = [&mut self.kv_a_proj_with_mqa, &mut self.o_proj];
        let mut projections = self.query.projections().into_iter().chain(others);
        projections.try_for_each(|projection| projection.hold(format))
    }

    /// Sets how products with weights are computed.
    pub(crate) fn set_arithmetic(&mut self, arithmetic: Arithmetic) {
        let recompute = Recompute(arithmetic.recompute);
        self.kv_a_layernorm.recompute = recompute;
        self.kv_b_proj.recompute = recompute;
        if let QueryProjection::LowRank(query) = &mut self.query {
            query.q_a_layernorm.recompute = recompute;
            query.q_b_proj.recompute = recompute;
        }
        let others = [&mut self.kv_a_proj_with_mqa, &mut self.kv_b_proj];
        for projection in self.query.projections().into_iter().chain(others) {
            projection.arithmetic = arithmetic;
        }
        self.o_proj.arithmetic = arithmetic.of_kept_inputs();
    }

    /// Queries, scaled for the softmax: without position `[B, T, H, N]` and rotated `[B, T, H, R]`.
    fn queries(&self, x: Tensor<3>, rope: &Rotation) -> (Tensor<4>, Tensor<4>) {
        let [batch, length, _] = x.dims();
        let q = self
            .query
            .forward(x)
            .mul_scalar(self.softmax_scale)
            .reshape([batch, length, self.heads, self.nope + self.rope]);
        let q_nope = q.clone().narrow(3, 0, self.nope);
        (q_nope, rope.rotate(q.narrow(3, self.nope, self.rope)))
    }

    /// What the cache holds of `x`: the normed latent `[B, T, C]` and the rotated shared key `[B, T, R]`.
    pub fn latents(&self, x: Tensor<3>, rope: &Rotation) -> (Tensor<3>, Tensor<3>) {
        let [batch, length, _] = x.dims();
        let (c_kv, k_pe) = self.latent_and_key(x);
        let k_pe = rope.rotate(k_pe.reshape([batch, length, 1, self.rope]));
        (c_kv, k_pe.reshape([batch, length, self.rope]))
    }

    /// The normed latent `[B, T, C]` and the shared key before its rotation, `[B, T, R]`.
    fn latent_and_key(&self, x: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let kv = self.kv_a_proj_with_mqa.forward(x);
        let latent = kv.dims()[2] - self.rope;
        let c_kv = self.kv_a_layernorm.forward(kv.clone().narrow(2, 0, latent));
        (c_kv, kv.narrow(2, latent, self.rope))
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            heads: self.heads,
            nope: self.nope,
            value: self.value,
            scale: self.softmax_scale,
        }
    }
}

fn latent_norm(size: usize, init: Initializer) -> RmsNorm {
    RmsNorm::new(size, LATENT_NORM_EPSILON, init)
}

/// What each position of whole sequences sees: itself, and what is before it back to some first position.
#[derive(Clone, Debug)]
pub struct AttentionMask {
    first: Tensor<2, Int>, // [B or 1, T]
}

impl AttentionMask {
    /// Each position sees all before it.
    pub fn causal(length: usize, device: &Device) -> Self {
        Self {
            first: Tensor::zeros([1, length], device),
        }
    }

    /// As [`AttentionMask::causal`], but nothing before `first` is seen: the start of the position's document.
    ///
    /// # Shapes
    /// - `first`: `[B, T]`, at most the position itself
    pub fn from_first(first: Tensor<2, Int>) -> Self {
        Self { first }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};

    use super::*;
    use crate::config::tests::tiny;

    /// Sequences in pages, in one batch and in pieces, are the sequences one by one.
    #[test]
    fn paged_equals_expanded() {
        let device = Device::flex();
        let config = tiny();
        let rope = Rope::new(&config);
        let attention = Attention::new(&config, Initializer::new(&device, 7, 0.3));
        let lengths = [9, 4];
        let x = lengths
            .map(|n| Tensor::<3>::random([1, n, 32], Distribution::Normal(0.0, 1.0), &device));
        let pages: [Vec<u32>; 2] = [vec![4, 0, 3], vec![1]];
        let mut cache = PagedCache::new(1, 5);
        let mut outputs = [Vec::new(), Vec::new()];
        let mut done = [0, 0];
        for pieces in [[3, 1], [5, 2], [1, 1]] {
            let spans = [0, 1].map(|i| Span {
                pages: pages[i].clone(),
                start: done[i],
                length: pieces[i],
            });
            let layout = Layout {
                page: 4,
                spans: spans.to_vec(),
            };
            let rows = [0, 1].map(|i| x[i].clone().narrow(1, done[i], pieces[i]));
            let tables = rope.rotation_at(layout.positions(), &device);
            let rows = Tensor::cat(rows.to_vec(), 1);
            let out = attention.paged(rows, &tables, &mut cache.layers[0], &layout);
            outputs[0].push(out.clone().narrow(1, 0, pieces[0]));
            outputs[1].push(out.narrow(1, pieces[0], pieces[1]));
            done = [0, 1].map(|i| done[i] + pieces[i]);
        }
        for (i, outputs) in outputs.into_iter().enumerate() {
            let mask = AttentionMask::causal(lengths[i], &device);
            let tables = rope.rotation(0, lengths[i], &device);
            let expected = attention.expanded(x[i].clone(), &tables, &mask);
            let close = Tolerance::<f32>::absolute(1e-5);
            Tensor::cat(outputs, 1)
                .into_data()
                .assert_approx_eq(&expected.into_data(), close);
        }
    }

    /// The two forms, whole and in pieces, agree. Sums of at most 32 products of numbers around one: 1e-5 is
    /// some 80 units in the last place.
    #[test]
    fn absorbed_equals_expanded_in_pieces_and_whole() {
        let device = Device::flex();
        for q_lora_rank in [None, Some(16)] {
            let config = ModelConfig {
                q_lora_rank,
                ..tiny()
            };
            let rope = Rope::new(&config);
            let attention = Attention::new(&config, Initializer::new(&device, 7, 0.3));
            let x = Tensor::<3>::random([2, 9, 32], Distribution::Normal(0.0, 1.0), &device);
            let mask = AttentionMask::causal(9, &device);
            let expected = attention.expanded(x.clone(), &rope.rotation(0, 9, &device), &mask);
            for pieces in [vec![9], vec![4, 1, 1, 3]] {
                let mut cache = LayerCache::default();
                let mut outputs = Vec::new();
                let mut start = 0;
                for length in pieces {
                    let tables = rope.rotation(start, length, &device);
                    let piece = x.clone().narrow(1, start, length);
                    outputs.push(attention.absorbed(piece, &tables, &mut cache));
                    start += length;
                }
                let close = Tolerance::<f32>::absolute(1e-5);
                Tensor::cat(outputs, 1)
                    .into_data()
                    .assert_approx_eq(&expected.to_data(), close);
            }
        }
    }
}
