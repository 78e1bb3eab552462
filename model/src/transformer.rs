//! The whole model. Start reading here.
//!
//! ```text
//! tokens [B,T] -> embed_tokens -> x [B,T,D] -> layers -> norm -> h -> lm_head -> logits [B,T,W]
//!                      \                                  \
//!                       +---- embedding of t+1 -> mtp.0 <--+ -> h1 -> lm_head -> logits of t+2
//! ```

use std::{ops::Range, sync::Arc};

use burn::{
    module::Module,
    nn::Embedding,
    tensor::{Device, Int, Tensor},
};
use deepburn_kernels::compact::{CompactFormat, NotCompact};

use crate::{
    attention::{AttentionMask, LatentCache, Layout, PagedCache},
    config::ModelConfig,
    init::Initializer,
    layer::{DecoderLayer, LayerOutput},
    loss::head_cross_entropy,
    moe::{MoeOutput, TokenDispatcher},
    mtp::{MtpModule, MtpOutput},
    norm::RmsNorm,
    projection::{Arithmetic, Projection},
    recompute::Recompute,
    rope::Rope,
};

/// A DeepSeek-V3 model.
#[derive(Module, Debug)]
pub struct Transformer {
    /// `[W, D]`
    pub embed_tokens: Embedding,
    /// The layers.
    pub layers: Vec<DecoderLayer>,
    /// After the last layer.
    pub norm: RmsNorm,
    /// Output head, `[D, W]`; `None` where it shares the embedding matrix.
    pub lm_head: Option<Projection>,
    /// Multi-token prediction modules, one per depth.
    pub mtp: Vec<MtpModule>,
    #[module(skip)]
    rope: Rope,
    #[module(skip)]
    arithmetic: Arithmetic,
}

/// What the main model returns.
#[derive(Clone, Debug)]
pub struct Output {
    /// After the last norm. `[B, T, D]`
    pub hidden: Tensor<3>,
    /// Of every mixture-of-experts layer, in order.
    pub moe: Vec<MoeOutput>,
}

impl Transformer {
    /// A model of the given shape with weights that depend on `seed` alone, made when first used.
    pub fn new(config: &ModelConfig, seed: u64, device: &Device) -> Self {
        let init = Initializer::new(device, seed, config.initializer_range);
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let layers = init.child("layers");
        let mtp = init.child("mtp");
        Self {
            embed_tokens: Embedding {
                weight: init
                    .child("embed_tokens")
                    .normal("weight", [vocabulary, hidden]),
            },
            layers: (0..config.num_hidden_layers)
                .map(|index| DecoderLayer::new(config, config.is_dense(index), layers.child(index)))
                .collect(),
            norm: RmsNorm::new(hidden, config.rms_norm_eps, init.child("norm")),
            lm_head: (!config.tie_word_embeddings)
                .then(|| Projection::new(hidden, vocabulary, init.child("lm_head"))),
            mtp: (0..config.num_nextn_predict_layers)
                .map(|depth| MtpModule::new(config, mtp.child(depth)))
                .collect(),
            rope: Rope::new(config),
            arithmetic: Arithmetic::FULL,
        }
    }

    /// The same model with the products of its layers computed in another way.
    #[must_use]
    pub fn with_arithmetic(mut self, arithmetic: Arithmetic) -> Self {
        self.arithmetic = arithmetic;
        self.norm.recompute = Recompute(arithmetic.recompute);
        for layer in &mut self.layers {
            layer.set_arithmetic(arithmetic);
        }
        for module in &mut self.mtp {
            module.set_arithmetic(arithmetic);
        }
        self
    }

    /// The same model with the weights of its large matrices rounded to a compact format and held in it, for decoding.
    /// Embedding, router, norms and `kv_b_proj` stay as they are, and so does an output head that is the embedding.
    ///
    /// # Errors
    /// A model that is not in single precision on the CPU.
    pub fn hold(mut self, format: CompactFormat) -> Result<Self, NotCompact> {
        for layer in &mut self.layers {
            layer.hold(format)?;
        }
        self.hold_outside_layers(format)?;
        Ok(self)
    }

    /// As [`hold`](Self::hold) for all but the layers.
    pub(crate) fn hold_outside_layers(&mut self, format: CompactFormat) -> Result<(), NotCompact> {
        for module in &mut self.mtp {
            module.hold(format)?;
        }
        match &mut self.lm_head {
            Some(head) => head.hold(format),
            None => Ok(()),
        }
    }

    /// This model as one of several that share the routed experts of every layer: see
    /// [`Moe::distributed`](crate::moe::Moe::distributed).
    #[must_use]
    pub fn with_experts(self, own: &Range<usize>, dispatcher: &Arc<dyn TokenDispatcher>) -> Self {
        let layers = self.layers.into_iter();
        let mtp = self.mtp.into_iter();
        Self {
            layers: layers
                .map(|layer| layer.with_experts(own, dispatcher))
                .collect(),
            mtp: mtp
                .map(|module| module.with_experts(own, dispatcher))
                .collect(),
            ..self
        }
    }

    /// Runs the main model over whole sequences.
    ///
    /// # Shapes
    /// - `tokens`: `[B, T]`
    pub fn forward(&self, tokens: Tensor<2, Int>, mask: &AttentionMask) -> Output {
        let [_, length] = tokens.dims();
        let rope = self.rope.rotation(0, length, &tokens.device());
        self.run(tokens, |_, layer, x| layer.forward(x, &rope, mask))
    }

    /// Runs the main model over the tokens after those in the cache, and adds them to it.
    ///
    /// # Shapes
    /// - `tokens`: `[B, T]`
    pub fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut LatentCache) -> Output {
        let [_, length] = tokens.dims();
        let rope = self.rope.rotation(cache.len(), length, &tokens.device());
        self.run(tokens, |index, layer, x| {
            layer.forward_cached(x, &rope, &mut cache.layers[index])
        })
    }

    /// Runs the main model over rows of several sequences, and adds their latents to the cache.
    ///
    /// # Shapes
    /// - `tokens`: `[1, rows]`
    pub fn forward_paged(
        &self,
        tokens: Tensor<2, Int>,
        cache: &mut PagedCache,
        layout: &Layout,
    ) -> Output {
        let rope = self.rope.rotation_at(layout.positions(), &tokens.device());
        self.run(tokens, |index, layer, x| {
            layer.forward_paged(x, &rope, &mut cache.layers[index], layout)
        })
    }

    fn run(
        &self,
        tokens: Tensor<2, Int>,
        mut apply: impl FnMut(usize, &DecoderLayer, Tensor<3>) -> LayerOutput,
    ) -> Output {
        let mut x = self.embed(tokens);
        let mut moe = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let output = apply(index, layer, x);
            x = output.hidden;
            moe.extend(output.moe);
        }
        Output {
            hidden: self.norm.forward(x),
            moe,
        }
    }

    /// Runs prediction depth `depth` (from 0, the report's k minus one) over whole sequences.
    ///
    /// # Shapes
    /// - `previous`: `[B, T, D]`, `hidden` of the previous depth, or of the main model for the first
    /// - `tokens`: `[B, T]`, for position i the token i + depth + 1
    pub fn predict_further(
        &self,
        depth: usize,
        previous: Tensor<3>,
        tokens: Tensor<2, Int>,
        mask: &AttentionMask,
    ) -> MtpOutput {
        let [_, length] = tokens.dims();
        let rope = self.rope.rotation(0, length, &tokens.device());
        self.mtp[depth].forward(previous, self.embed(tokens), &rope, mask)
    }

    /// As [`predict_further`](Self::predict_further) for rows of several sequences, whose latents are added to the cache.
    ///
    /// # Shapes
    /// - `previous`: `[1, rows, D]`, `tokens`: `[1, rows]`
    pub fn predict_further_paged(
        &self,
        depth: usize,
        (previous, tokens): (Tensor<3>, Tensor<2, Int>),
        cache: &mut PagedCache,
        layout: &Layout,
    ) -> MtpOutput {
        let rope = self.rope.rotation_at(layout.positions(), &tokens.device());
        let inputs = [previous, self.embed(tokens)];
        let cache = &mut cache.layers[self.layers.len() + depth];
        self.mtp[depth].forward_paged(inputs, &rope, cache, layout)
    }

    fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        self.arithmetic
            .activation(self.embed_tokens.forward(tokens))
    }

    /// How products are computed.
    pub fn arithmetic(&self) -> Arithmetic {
        self.arithmetic
    }

    /// The output head, shared by the main model and all prediction depths.
    ///
    /// # Shapes
    /// - `hidden`: `[.., D]`
    /// - result: `[.., W]`
    pub fn logits<const N: usize>(&self, hidden: Tensor<N>) -> Tensor<N> {
        match &self.lm_head {
            Some(head) => head.forward(hidden),
            None => hidden.matmul(self.embed_tokens.weight.val().transpose().unsqueeze()),
        }
    }

    /// Mean cross-entropy of the head's predictions, in nats: of [`logits`](Self::logits), which it does not hold as a
    /// whole where the device has a kernel.
    ///
    /// # Shapes
    /// - `hidden`: `[B, T, D]`
    /// - `targets`: `[B, T]`
    pub fn cross_entropy(&self, hidden: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
        let weight = match &self.lm_head {
            Some(head) => head.weight.val(),
            None => self.embed_tokens.weight.val().transpose(),
        };
        head_cross_entropy(hidden, weight, targets, self.arithmetic)
    }

    /// An empty cache for this model.
    pub fn new_cache(&self) -> LatentCache {
        LatentCache::new(self.layers.len())
    }

    /// An empty cache for this model and its prediction modules, of at most so many pages.
    pub fn new_paged_cache(&self, pages: usize) -> PagedCache {
        PagedCache::new(self.layers.len() + self.mtp.len(), pages)
    }

    /// How positions turn queries and keys.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }
}
