//! One transformer layer: attention and a feed-forward part, each normed before and added to the residual stream.

use std::{ops::Range, sync::Arc};

use burn::{module::Module, tensor::Tensor};
use deepburn_kernels::{
    compact::{CompactFormat, NotCompact},
    rope::Rotation,
};

use crate::{
    attention::{Attention, AttentionMask, LayerCache, LayerPages, Layout},
    config::ModelConfig,
    init::Initializer,
    mlp::Mlp,
    moe::{Moe, MoeOutput, TokenDispatcher},
    norm::RmsNorm,
    projection::Arithmetic,
    recompute::Recompute,
};

/// A transformer layer.
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: Attention,
    /// Before the feed-forward part.
    pub post_attention_layernorm: RmsNorm,
    /// Feed-forward part.
    pub mlp: FeedForward,
    #[module(skip)]
    arithmetic: Arithmetic,
}

/// A layer's feed-forward part.
#[allow(
    clippy::large_enum_variant,
    reason = "one value per layer, and Burn's modules are not boxed"
)]
#[derive(Module, Debug)]
pub enum FeedForward {
    /// In the first layers.
    Dense(Mlp),
    /// In all others.
    Moe(Moe),
}

/// What a layer returns.
#[derive(Clone, Debug)]
pub struct LayerOutput {
    /// The residual stream after the layer. `[B, T, D]`
    pub hidden: Tensor<3>,
    /// What attention added to it.
    pub attention: Tensor<3>,
    /// What the feed-forward part added to it.
    pub feed_forward: Tensor<3>,
    /// Routing and load, of a mixture-of-experts layer.
    pub moe: Option<MoeOutput>,
}

impl DecoderLayer {
    /// A layer; `dense` says which feed-forward part it has.
    pub fn new(config: &ModelConfig, dense: bool, init: Initializer) -> Self {
        let norm = |name| RmsNorm::new(config.hidden_size, config.rms_norm_eps, init.child(name));
        let mlp = init.child("mlp");
        Self {
            input_layernorm: norm("input_layernorm"),
            self_attn: Attention::new(config, init.child("self_attn")),
            post_attention_layernorm: norm("post_attention_layernorm"),
            mlp: if dense {
                FeedForward::Dense(Mlp::new(config.hidden_size, config.intermediate_size, mlp))
            } else {
                FeedForward::Moe(Moe::new(config, mlp))
            },
            arithmetic: Arithmetic::FULL,
        }
    }

    /// Sets how products with weights are computed.
    pub(crate) fn set_arithmetic(&mut self, arithmetic: Arithmetic) {
        self.arithmetic = arithmetic;
        for norm in [
            &mut self.input_layernorm,
            &mut self.post_attention_layernorm,
        ] {
            norm.recompute = Recompute(arithmetic.recompute);
        }
        self.self_attn.set_arithmetic(arithmetic);
        match &mut self.mlp {
            FeedForward::Dense(mlp) => mlp.set_arithmetic(arithmetic),
            FeedForward::Moe(moe) => moe.set_arithmetic(arithmetic),
        }
    }

    /// Holds the weights of its large matrices in a compact format.
    pub(crate) fn hold(&mut self, format: CompactFormat) -> Result<(), NotCompact> {
        self.self_attn.hold(format)?;
        match &mut self.mlp {
            FeedForward::Dense(mlp) => mlp.hold(format),
            FeedForward::Moe(moe) => moe.hold(format),
        }
    }

    /// This layer as one of several that share its routed experts, if it has any: see [`Moe::distributed`].
    #[must_use]
    pub fn with_experts(
        mut self,
        own: &Range<usize>,
        dispatcher: &Arc<dyn TokenDispatcher>,
    ) -> Self {
        if let FeedForward::Moe(moe) = self.mlp {
            self.mlp = FeedForward::Moe(moe.distributed(own.clone(), dispatcher.clone()));
        }
        self
    }

    /// Applies the layer to whole sequences.
    ///
    /// # Shapes
    /// - `x`: `[B, T, D]`
    pub fn forward(&self, x: Tensor<3>, rope: &Rotation, mask: &AttentionMask) -> LayerOutput {
        let attention =
            self.self_attn
                .expanded(self.input_layernorm.forward(x.clone()), rope, mask);
        self.feed_forward(x, attention)
    }

    /// Applies the layer to the tokens after those in the cache, and adds them to it.
    ///
    /// # Shapes
    /// - `x`: `[B, T, D]`
    pub fn forward_cached(
        &self,
        x: Tensor<3>,
        rope: &Rotation,
        cache: &mut LayerCache,
    ) -> LayerOutput {
        let attention =
            self.self_attn
                .absorbed(self.input_layernorm.forward(x.clone()), rope, cache);
        self.feed_forward(x, attention)
    }

    /// Applies the layer to rows of several sequences, and adds their latents to the cache.
    ///
    /// # Shapes
    /// - `x`: `[1, rows, D]`
    pub fn forward_paged(
        &self,
        x: Tensor<3>,
        rope: &Rotation,
        cache: &mut LayerPages,
        layout: &Layout,
    ) -> LayerOutput {
        let normed = self.input_layernorm.forward(x.clone());
        let attention = self.self_attn.paged(normed, rope, cache, layout);
        self.feed_forward(x, attention)
    }

    fn feed_forward(&self, x: Tensor<3>, attention: Tensor<3>) -> LayerOutput {
        let x = self.arithmetic.activation(x + attention.clone());
        let normed = self.post_attention_layernorm.forward(x.clone());
        let (feed_forward, moe) = match &self.mlp {
            FeedForward::Dense(mlp) => (mlp.forward(normed), None),
            FeedForward::Moe(moe) => {
                let output = moe.forward(normed);
                (output.hidden.clone(), Some(output))
            }
        };
        LayerOutput {
            hidden: self.arithmetic.activation(x + feed_forward.clone()),
            attention,
            feed_forward,
            moe,
        }
    }
}
