//! One training step on one screen: losses, gradients, clipping, optimizer, selection bias.

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::{
        GradientsParams, ModuleOptimizer, lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    },
    tensor::{Int, Tensor, TensorData},
};
use deepburn_kernels::adamw::sum_of_squares;
use deepburn_model::{
    attention::AttentionMask,
    layer::FeedForward,
    loss::{BalanceReading, sequence_balance},
    moe::{MoeOutput, Router},
    mtp::MtpOutput,
    transformer::Transformer,
};

use crate::balance;

/// How the parts of the loss count.
#[derive(Clone, Copy, Debug)]
pub struct LossWeights {
    /// Lambda (equation 25).
    pub mtp: f64,
    /// Alpha (equation 17).
    pub balance: f64,
    /// What the balance loss counts.
    pub reading: BalanceReading,
}

/// The losses of a batch.
#[derive(Clone, Debug)]
pub struct Losses {
    /// What is minimised: `main + lambda / D * sum of mtp + alpha * balance`.
    pub total: Tensor<1>,
    /// Next-token cross-entropy.
    pub main: Tensor<1>,
    /// Cross-entropy of each MTP depth.
    pub mtp: Vec<Tensor<1>>,
    /// Sequence-wise balance loss, summed over layers, without alpha.
    pub balance: Tensor<1>,
    /// Tokens that each expert received, `[E]`, of the main model's layers, then of the MTP modules.
    pub loads: Vec<Tensor<1, Int>>,
}

/// Runs the model over windows of tokens and compares each position with the tokens after it.
///
/// # Shapes
/// - `windows`: `[B, L + 1]`, inputs and their last target
/// - `first`: `[B, L]`, the first position that each one sees, where attention is to stay within documents
pub fn losses(
    model: &Transformer,
    windows: Tensor<2, Int>,
    first: Option<Tensor<2, Int>>,
    weights: LossWeights,
) -> Losses {
    let windows = Windows {
        tokens: windows,
        first,
    };
    let length = windows.length();
    let output = model.forward(windows.part(0, length), &windows.mask(length));
    let predictions = predictions(model, output.hidden, &windows);
    let layers = [output.moe, predictions.moe].concat();
    let balance = balance_loss(&layers, &windows, weights);
    Losses {
        total: weighted(&predictions.main, &predictions.mtp, weights)
            + balance.clone() * weights.balance,
        main: predictions.main,
        mtp: predictions.mtp,
        balance,
        loads: layers.into_iter().map(|moe| moe.load).collect(),
    }
}

/// Windows of tokens on a device.
#[derive(Clone, Debug)]
pub struct Windows {
    /// Inputs and their last target, `[B, L + 1]`.
    pub tokens: Tensor<2, Int>,
    /// The first position that each one sees, `[B, L]`, where attention is to stay within documents.
    pub first: Option<Tensor<2, Int>>,
}

impl Windows {
    /// Positions that are computed, L.
    pub fn length(&self) -> usize {
        self.tokens.dims()[1] - 1
    }

    /// The same outside autodiff.
    pub(crate) fn inner(&self) -> Self {
        Self {
            tokens: self.tokens.clone().inner(),
            first: self.first.clone().map(Tensor::inner),
        }
    }

    /// `length` tokens of each window from `start` on.
    pub(crate) fn part(&self, start: usize, length: usize) -> Tensor<2, Int> {
        self.tokens.clone().narrow(1, start, length)
    }

    /// What the first `length` positions see.
    pub(crate) fn mask(&self, length: usize) -> AttentionMask {
        match &self.first {
            Some(first) => AttentionMask::from_first(first.clone().narrow(1, 0, length)),
            None => AttentionMask::causal(length, &self.tokens.device()),
        }
    }
}

/// What comes behind the last norm: the output head and the MTP modules.
pub(crate) trait Predictor {
    /// MTP modules, D.
    fn depths(&self) -> usize;

    /// See [`Transformer::cross_entropy`].
    fn cross_entropy(&self, hidden: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1>;

    /// See [`Transformer::predict_further`].
    fn predict_further(
        &self,
        depth: usize,
        previous: Tensor<3>,
        tokens: Tensor<2, Int>,
        mask: &AttentionMask,
    ) -> MtpOutput;
}

impl Predictor for Transformer {
    fn depths(&self) -> usize {
        self.mtp.len()
    }

    fn cross_entropy(&self, hidden: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
        self.cross_entropy(hidden, targets)
    }

    fn predict_further(
        &self,
        depth: usize,
        previous: Tensor<3>,
        tokens: Tensor<2, Int>,
        mask: &AttentionMask,
    ) -> MtpOutput {
        self.predict_further(depth, previous, tokens, mask)
    }
}

/// Losses of predictions.
pub(crate) struct Predictions {
    pub(crate) main: Tensor<1>,
    pub(crate) mtp: Vec<Tensor<1>>,
    /// Of the MTP modules.
    pub(crate) moe: Vec<MoeOutput>,
}

/// Predicts from `hidden`, `[B, L, D]`, which is after the last norm.
pub(crate) fn predictions(
    model: &impl Predictor,
    mut hidden: Tensor<3>,
    windows: &Windows,
) -> Predictions {
    let length = windows.length();
    let mut found = Predictions {
        main: model.cross_entropy(hidden.clone(), windows.part(1, length)),
        mtp: Vec::new(),
        moe: Vec::new(),
    };
    for depth in 0..model.depths() {
        // Depth k sees positions whose token k + 1 further on is known (equation 24).
        let length = length - depth - 1;
        let previous = hidden.narrow(1, 0, length);
        let tokens = windows.part(depth + 1, length);
        let output = model.predict_further(depth, previous, tokens, &windows.mask(length));
        let targets = windows.part(depth + 2, length);
        let loss = model.cross_entropy(output.hidden.clone(), targets);
        found.mtp.push(loss);
        found.moe.extend(output.block.moe);
        hidden = output.hidden;
    }
    found
}

/// `main + lambda / D * sum of mtp`
pub(crate) fn weighted(main: &Tensor<1>, mtp: &[Tensor<1>], weights: LossWeights) -> Tensor<1> {
    let zero = Tensor::zeros([1], &main.device());
    let further = mtp.iter().cloned().fold(zero, |sum, loss| sum + loss);
    let lambda = weights.mtp / mtp.len().max(1) as f64;
    main.clone() + further * lambda
}

/// The sequence-wise balance loss of some layers, without alpha. Zero where alpha is.
pub(crate) fn balance_loss(
    layers: &[MoeOutput],
    windows: &Windows,
    weights: LossWeights,
) -> Tensor<1> {
    let [sequences, _] = windows.tokens.dims();
    let zero = Tensor::zeros([1], &windows.tokens.device());
    if weights.balance == 0.0 {
        return zero;
    }
    let layer = |moe: &MoeOutput| sequence_balance(&moe.routing, sequences, weights.reading);
    layers.iter().map(layer).fold(zero, |sum, loss| sum + loss)
}

/// How an update is bounded and balanced.
#[derive(Clone, Copy, Debug)]
pub struct UpdateRule {
    /// Largest global norm of the gradients.
    pub clip_norm: f64,
    /// Bias update speed, gamma.
    pub gamma: f32,
}

/// Updates the model: clips the gradients by their global norm, lets the optimizer step, then moves the selection
/// biases by the load of the whole batch.
pub fn update(
    model: Transformer,
    optimizer: &mut ModuleOptimizer,
    rate: ModuleLearningRate,
    gradients: GradientsParams,
    norm: f64,
    loads: &[Vec<u64>],
    rule: UpdateRule,
) -> Transformer {
    let gradients = clipped(&model, gradients, norm, rule);
    let mut model = optimizer.step(rate, model, gradients);
    let main = model.layers.iter_mut().map(|layer| &mut layer.mlp);
    let further = model.mtp.iter_mut().map(|module| &mut module.block.mlp);
    let routers = main.chain(further).filter_map(|mlp| match mlp {
        FeedForward::Moe(moe) => Some(&mut moe.gate),
        FeedForward::Dense(_) => None,
    });
    move_biases(routers.zip(loads), rule.gamma);
    model
}

/// The gradients scaled down to the largest norm, if theirs is above it.
pub(crate) fn clipped(
    model: &impl Module,
    gradients: GradientsParams,
    norm: f64,
    rule: UpdateRule,
) -> GradientsParams {
    // As torch.nn.utils.clip_grad_norm_.
    let scale = (rule.clip_norm / (norm + 1e-6)).min(1.0);
    if scale < 1.0 {
        scaled(model, gradients, scale)
    } else {
        gradients
    }
}

/// Euclidean norm of all gradients together.
pub fn global_norm(model: &impl Module, gradients: &GradientsParams) -> f64 {
    let squares = squares(model, gradients);
    squares.iter().map(|(_, square)| square).sum::<f64>().sqrt()
}

/// The sum of the squares of each parameter's gradient, in the order of the module.
pub(crate) fn squares(model: &impl Module, gradients: &GradientsParams) -> Vec<(ParamId, f64)> {
    struct Squares<'a>(&'a GradientsParams, Vec<ParamId>, Vec<Tensor<1>>);
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.get::<D>(param.id) {
                self.1.push(param.id);
                self.2.push(sum_of_squares(gradient));
            }
        }
    }
    let mut squares = Squares(gradients, Vec::new(), Vec::new());
    model.visit(&mut squares);
    if squares.2.is_empty() {
        return Vec::new();
    }
    // One read from the device for all parameters; sums of them are in double precision.
    let values = Tensor::cat(squares.2, 0).into_data();
    squares.1.into_iter().zip(values.iter::<f64>()).collect()
}

/// The parameters whose gradients have an element that is NaN or infinite.
pub(crate) fn not_finite(model: &impl Module, gradients: &GradientsParams) -> Vec<ParamId> {
    let squares = squares(model, gradients).into_iter();
    let broken = squares.filter(|(_, square)| !square.is_finite());
    broken.map(|(id, _)| id).collect()
}

fn scaled(model: &impl Module, gradients: GradientsParams, scale: f64) -> GradientsParams {
    struct Scaler {
        from: GradientsParams,
        to: GradientsParams,
        scale: f64,
    }
    impl ModuleVisitor for Scaler {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.from.remove::<D>(param.id) {
                self.to.register(param.id, gradient * self.scale);
            }
        }
    }
    let mut scaler = Scaler {
        from: gradients,
        to: GradientsParams::new(),
        scale,
    };
    model.visit(&mut scaler);
    scaler.to
}

/// Moves the selection bias of each router by its load.
pub(crate) fn move_biases<'a>(
    routers: impl Iterator<Item = (&'a mut Router, &'a Vec<u64>)>,
    gamma: f32,
) {
    if gamma == 0.0 {
        return;
    }
    for (router, load) in routers {
        let step = balance::bias_step(load, gamma);
        let bias = router.e_score_correction_bias.clone();
        router.e_score_correction_bias = bias.map(|bias| {
            let step = TensorData::new(step, [load.len()]);
            let device = bias.device();
            (bias + Tensor::from_data(step, &device)).detach()
        });
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};
    use deepburn_model::{checkpoint::hf_config, config::ModelConfig, loss::cross_entropy};

    use super::*;

    /// Depth k predicts token k + 1 further on from the representation of depth k - 1 and the token between.
    #[test]
    fn deeper_predictions_see_shorter_sequences_and_each_other() {
        let shape = include_str!("../../configs/model/tiny.json");
        let shape = hf_config::parse(shape).unwrap();
        let config = ModelConfig {
            num_nextn_predict_layers: 2,
            ..shape
        };
        let device = Device::flex();
        let model = Transformer::new(&config, 4, &device);
        let limit = Distribution::Uniform(0.0, config.vocab_size as f64);
        let windows = Tensor::<2>::random([2, 10], limit, &device).int();
        let weights = LossWeights {
            mtp: 0.3,
            balance: 0.0,
            reading: BalanceReading::Paper,
        };
        let found = losses(&model, windows.clone(), None, weights);

        let part = |start, length| windows.clone().narrow(1, start, length);
        let mask = |length| AttentionMask::causal(length, &device);
        let loss = |hidden, start, length| {
            cross_entropy(model.logits(hidden), part(start, length)).into_scalar::<f32>()
        };
        let main = model.forward(part(0, 9), &mask(9)).hidden;
        let first = model.predict_further(0, main.clone().narrow(1, 0, 8), part(1, 8), &mask(8));
        let hidden = first.hidden.clone().narrow(1, 0, 7);
        let second = model.predict_further(1, hidden, part(2, 7), &mask(7));
        let expected = [
            loss(main, 1, 9),
            loss(first.hidden, 2, 8),
            loss(second.hidden, 3, 7),
        ];

        let mtp: Vec<f32> = found
            .mtp
            .iter()
            .map(|loss| loss.clone().into_scalar())
            .collect();
        let found_losses = [found.main.into_scalar::<f32>(), mtp[0], mtp[1]];
        for (found, expected) in found_losses.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-5,
                "{found}, expected {expected}"
            );
        }
        let total = expected[0] + 0.3 / 2.0 * (expected[1] + expected[2]);
        assert!((found.total.into_scalar::<f32>() - total).abs() < 1e-5);
        assert_eq!(
            found.loads.len(),
            config.num_hidden_layers - config.first_k_dense_replace + 2
        );
    }
}
