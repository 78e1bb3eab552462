//! Multi-token prediction (report section 2.2): modules that predict further tokens, each from the one before.

use std::{ops::Range, sync::Arc};

use burn::{module::Module, tensor::Tensor};
use deepburn_kernels::{
    compact::{CompactFormat, NotCompact},
    rope::Rotation,
};

use crate::{
    attention::{AttentionMask, LayerPages, Layout},
    config::ModelConfig,
    init::Initializer,
    layer::{DecoderLayer, LayerOutput},
    moe::TokenDispatcher,
    norm::RmsNorm,
    projection::{Arithmetic, Projection},
    recompute::Recompute,
};

/// The module of one prediction depth. Embedding and output head are the main model's.
#[derive(Module, Debug)]
pub struct MtpModule {
    /// Norm of the embedding.
    pub enorm: RmsNorm,
    /// Norm of the previous depth's representation.
    pub hnorm: RmsNorm,
    /// M_k, `[2 D, D]`. Its first half of inputs is the embedding: the released weights have it so, while
    /// equation 21 writes the representation first.
    pub eh_proj: Projection,
    /// TRM_k.
    pub block: DecoderLayer,
    /// What comes before the shared output head.
    pub shared_head: SharedHead,
}

/// The part of a module's output head that is its own.
#[derive(Module, Debug)]
pub struct SharedHead {
    /// Norm before the shared head.
    pub norm: RmsNorm,
}

/// What a module returns.
#[derive(Clone, Debug)]
pub struct MtpOutput {
    /// What went into the block. `[B, T, D]`
    pub projected: Tensor<3>,
    /// What came out of it.
    pub block: LayerOutput,
    /// After the norm: input of the shared head, and h of the next depth.
    pub hidden: Tensor<3>,
}

impl MtpModule {
    /// A module for a model of the given shape.
    pub fn new(config: &ModelConfig, init: Initializer) -> Self {
        let hidden = config.hidden_size;
        let norm = |init| RmsNorm::new(hidden, config.rms_norm_eps, init);
        let dense = config.is_dense(config.num_hidden_layers);
        Self {
            enorm: norm(init.child("enorm")),
            hnorm: norm(init.child("hnorm")),
            eh_proj: Projection::new(2 * hidden, hidden, init.child("eh_proj")),
            block: DecoderLayer::new(config, dense, init.child("block")),
            shared_head: SharedHead {
                norm: norm(init.child("shared_head.norm")),
            },
        }
    }

    /// As [`DecoderLayer::with_experts`].
    #[must_use]
    pub fn with_experts(self, own: &Range<usize>, dispatcher: &Arc<dyn TokenDispatcher>) -> Self {
        Self {
            block: self.block.with_experts(own, dispatcher),
            ..self
        }
    }

    /// Sets how products with weights are computed.
    pub(crate) fn set_arithmetic(&mut self, arithmetic: Arithmetic) {
        self.eh_proj.arithmetic = arithmetic.unquantised();
        for norm in [&mut self.enorm, &mut self.hnorm, &mut self.shared_head.norm] {
            norm.recompute = Recompute(arithmetic.recompute);
        }
        self.block.set_arithmetic(arithmetic);
    }

    /// Holds the weights of its large matrices in a compact format.
    pub(crate) fn hold(&mut self, format: CompactFormat) -> Result<(), NotCompact> {
        self.eh_proj.hold(format)?;
        self.block.hold(format)
    }

    /// Combines the representation of each position with the embedding of a later token (equations 21 and 22).
    ///
    /// # Shapes
    /// - `previous`: `[B, T, D]`, h of the previous depth; the main model's is after its last norm
    /// - `embedded`: `[B, T, D]`, embeddings of the tokens one further on
    pub fn forward(
        &self,
        previous: Tensor<3>,
        embedded: Tensor<3>,
        rope: &Rotation,
        mask: &AttentionMask,
    ) -> MtpOutput {
        self.run([previous, embedded], |x| self.block.forward(x, rope, mask))
    }

    /// As [`MtpModule::forward`] for rows of several sequences, whose latents are added to the cache.
    ///
    /// # Shapes
    /// - `previous`, `embedded`: `[1, rows, D]`
    pub fn forward_paged(
        &self,
        [previous, embedded]: [Tensor<3>; 2],
        rope: &Rotation,
        cache: &mut LayerPages,
        layout: &Layout,
    ) -> MtpOutput {
        self.run([previous, embedded], |x| {
            self.block.forward_paged(x, rope, cache, layout)
        })
    }

    fn run(
        &self,
        [previous, embedded]: [Tensor<3>; 2],
        block: impl FnOnce(Tensor<3>) -> LayerOutput,
    ) -> MtpOutput {
        let both = vec![self.enorm.forward(embedded), self.hnorm.forward(previous)];
        let projected = self.eh_proj.forward(Tensor::cat(both, 2));
        let block = block(projected.clone());
        let hidden = self.shared_head.norm.forward(block.hidden.clone());
        MtpOutput {
            projected,
            block,
            hidden,
        }
    }
}
