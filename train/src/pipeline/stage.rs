//! What a rank holds of a model, and the forward pass of its stages.

use std::{ops::Range, sync::Arc};

use burn::{
    module::Module,
    nn::Embedding,
    tensor::{Device, Int, Tensor},
};
use deepburn_model::{
    attention::AttentionMask,
    layer::{DecoderLayer, FeedForward},
    loss::head_cross_entropy,
    moe::{Router, TokenDispatcher},
    mtp::{MtpModule, MtpOutput},
    norm::RmsNorm,
    projection::{Arithmetic, Projection},
    rope::Rope,
    transformer::Transformer,
};

use super::layout::{Layout, Piece, Stage};
use crate::step::{self, LossWeights, Predictor, Windows};

/// The pieces of a model that are on one rank. Its parameters are those of the model and keep their identity, by which
/// their names are known (see [`Registry`](deepburn_model::parameters::Registry)).
#[derive(Module, Debug)]
pub struct Part {
    embed_tokens: Option<Embedding>,
    layers: Vec<DecoderLayer>,
    norm: Option<RmsNorm>,
    lm_head: Option<Projection>,
    mtp: Vec<MtpModule>,
    /// The number in the model of each layer.
    #[module(skip)]
    numbers: Arc<[usize]>,
    #[module(skip)]
    rope: Rope,
    #[module(skip)]
    arithmetic: Arithmetic,
}

/// What a stage returns.
#[derive(Clone, Debug)]
pub struct StageOutput {
    /// For the next stage, or the losses.
    pub result: StageResult,
    /// Sequence-wise balance loss of the stage's layers, without alpha.
    pub balance: Tensor<1>,
    /// Tokens that each expert received, `[E]`, of each mixture-of-experts layer of the stage, then of the MTP modules.
    pub loads: Vec<Tensor<1, Int>>,
}

/// What a stage hands on.
#[allow(
    clippy::large_enum_variant,
    reason = "there are few of them, and tensors are handles"
)]
#[derive(Clone, Debug)]
pub enum StageResult {
    /// The residual stream. `[B, T, D]`
    Hidden(Tensor<3>),
    /// What the last stage gives.
    Losses {
        /// `main + lambda / D * sum of mtp`
        prediction: Tensor<1>,
        /// Next-token cross-entropy.
        main: Tensor<1>,
        /// Cross-entropy of each MTP depth.
        mtp: Vec<Tensor<1>>,
    },
}

impl Part {
    /// The pieces of `rank`. The others are dropped; those that are lazy were never made.
    pub fn cut(model: Transformer, layout: &Layout, rank: usize) -> Self {
        let (rope, arithmetic) = (model.rope().clone(), model.arithmetic());
        let ends = layout.holds(rank, Piece::End);
        let layers = model.layers.into_iter().enumerate();
        let (numbers, layers): (Vec<_>, _) = layers
            .filter(|(number, _)| layout.holds(rank, Piece::Layer(*number)))
            .unzip();
        Self {
            embed_tokens: layout
                .holds(rank, Piece::Embedding)
                .then_some(model.embed_tokens),
            layers,
            norm: ends.then_some(model.norm),
            lm_head: model.lm_head.filter(|_| ends),
            mtp: if ends { model.mtp } else { Vec::new() },
            numbers: numbers.into(),
            rope,
            arithmetic,
        }
    }

    /// This part as one of several that share the routed experts of every layer: it keeps those in `own`, and
    /// `dispatcher` brings tokens to the others.
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

    /// The forward pass of a stage.
    ///
    /// # Shapes
    /// - `hidden`: `[B, T, D]`, what the stage before handed on; `None` for the first
    ///
    /// # Panics
    /// If the stage is not on this rank.
    pub fn forward(
        &self,
        stage: &Stage,
        hidden: Option<Tensor<3>>,
        windows: &Windows,
        weights: LossWeights,
    ) -> StageOutput {
        let length = windows.length();
        let mut x = hidden.unwrap_or_else(|| self.embed(windows.part(0, length)));
        let rope = self.rope.rotation(0, length, &x.device());
        let mask = windows.mask(length);
        let mut moe = Vec::new();
        for number in stage.layers.clone() {
            let output = self.layer(number).forward(x, &rope, &mask);
            x = output.hidden;
            moe.extend(output.moe);
        }
        let result = if stage.is_last {
            let norm = self.norm.as_ref().expect("the last stage has it");
            let predictions = step::predictions(self, norm.forward(x), windows);
            moe.extend(predictions.moe);
            StageResult::Losses {
                prediction: step::weighted(&predictions.main, &predictions.mtp, weights),
                main: predictions.main,
                mtp: predictions.mtp,
            }
        } else {
            StageResult::Hidden(x)
        };
        StageOutput {
            result,
            balance: step::balance_loss(&moe, windows, weights),
            loads: moe.into_iter().map(|moe| moe.load).collect(),
        }
    }

    /// The routers on this rank, each with the number of its layer. MTP modules count on after the `layers` of the model.
    pub fn routers_mut(&mut self, layers: usize) -> impl Iterator<Item = (usize, &mut Router)> {
        let main = self.numbers.iter().copied().zip(&mut self.layers);
        let main = main.map(|(number, layer)| (number, &mut layer.mlp));
        let mtp = self.mtp.iter_mut().enumerate();
        let mtp = mtp.map(move |(depth, module)| (layers + depth, &mut module.block.mlp));
        main.chain(mtp).filter_map(|(number, mlp)| match mlp {
            FeedForward::Moe(moe) => Some((number, &mut moe.gate)),
            FeedForward::Dense(_) => None,
        })
    }

    /// The mixture-of-experts layers of a stage, by the numbers that [`Part::routers_mut`] gives them.
    pub fn routed_layers(&self, stage: &Stage) -> Vec<usize> {
        let is_moe = |mlp: &FeedForward| matches!(mlp, FeedForward::Moe(_));
        let layers = stage.layers.clone();
        let mut found: Vec<usize> = layers
            .filter(|&number| is_moe(&self.layer(number).mlp))
            .collect();
        if stage.is_last {
            let mtp = self.mtp.iter().enumerate();
            let mtp = mtp.filter(|(_, module)| is_moe(&module.block.mlp));
            found.extend(mtp.map(|(depth, _)| stage.layers.end + depth));
        }
        found
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        let norms = self.layers.iter().map(|layer| &layer.input_layernorm);
        let norm = self.norm.iter().chain(norms).next();
        let embedding = self.embed_tokens.as_ref();
        match (norm, embedding) {
            (Some(norm), _) => norm.weight.lazy_device(),
            (None, Some(embedding)) => embedding.weight.lazy_device(),
            (None, None) => unreachable!("a stage has a layer or an end of the model"),
        }
    }

    /// The width of what stages hand on.
    pub fn width(&self) -> usize {
        let norms = self.layers.iter().map(|layer| &layer.input_layernorm);
        let norm = self.norm.iter().chain(norms).next();
        let embedding = self.embed_tokens.as_ref();
        norm.map(|norm| norm.weight.lazy_shape()[0])
            .or_else(|| embedding.map(|embedding| embedding.weight.lazy_shape()[1]))
            .expect("a stage has a layer or an end of the model")
    }

    fn layer(&self, number: usize) -> &DecoderLayer {
        let at = self.numbers.binary_search(&number);
        &self.layers[at.expect("the stage's layers are on its rank")]
    }

    fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let embedding = self.embed_tokens.as_ref();
        let embedding = embedding.expect("both ends that embed have it");
        self.arithmetic.activation(embedding.forward(tokens))
    }
}

impl Predictor for Part {
    fn depths(&self) -> usize {
        self.mtp.len()
    }

    fn cross_entropy(&self, hidden: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
        let weight = match (&self.lm_head, &self.embed_tokens) {
            (Some(head), _) => head.weight.val(),
            (None, Some(embedding)) => embedding.weight.val().transpose(),
            (None, None) => unreachable!("a tied head comes with the embedding"),
        };
        head_cross_entropy(hidden, weight, targets, self.arithmetic)
    }

    fn predict_further(
        &self,
        depth: usize,
        previous: Tensor<3>,
        tokens: Tensor<2, Int>,
        mask: &AttentionMask,
    ) -> MtpOutput {
        let [_, length] = tokens.dims();
        let rope = self.rope.rotation(0, length, &previous.device());
        self.mtp[depth].forward(previous, self.embed(tokens), &rope, mask)
    }
}
