//! One training step on one screen: losses, gradients, clipping, optimizer, selection bias.

use burn::{
    module::{Module, ModuleVisitor, Param},
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
    moe::MoeOutput,
    parameters::ModulePath,
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
    let [batch, columns] = windows.dims();
    let length = columns - 1;
    let device = windows.device();
    let mask = |length: usize| match &first {
        Some(first) => AttentionMask::from_first(first.clone().narrow(1, 0, length)),
        None => AttentionMask::causal(length, &device),
    };
    let from = |start: usize, length: usize| windows.clone().narrow(1, start, length);

    let output = model.forward(from(0, length), &mask(length));
    let main = model.cross_entropy(output.hidden.clone(), from(1, length));
    let mut layers = output.moe;
    let mut hidden = output.hidden;
    let mut mtp = Vec::new();
    for depth in 0..model.mtp.len() {
        // Depth k sees positions whose token k + 1 further on is known (equation 24).
        let length = length - depth - 1;
        let previous = hidden.narrow(1, 0, length);
        let output = model.predict_further(depth, previous, from(depth + 1, length), &mask(length));
        mtp.push(model.cross_entropy(output.hidden.clone(), from(depth + 2, length)));
        layers.extend(output.block.moe);
        hidden = output.hidden;
    }

    let zero = || Tensor::zeros([1], &device);
    let balance = if weights.balance == 0.0 {
        zero()
    } else {
        let layer = |moe: &MoeOutput| sequence_balance(&moe.routing, batch, weights.reading);
        layers
            .iter()
            .map(layer)
            .fold(zero(), |sum, loss| sum + loss)
    };
    let further = mtp.iter().cloned().fold(zero(), |sum, loss| sum + loss);
    let lambda = weights.mtp / model.mtp.len().max(1) as f64;
    Losses {
        total: main.clone() + further * lambda + balance.clone() * weights.balance,
        main,
        mtp,
        balance,
        loads: layers.into_iter().map(|moe| moe.load).collect(),
    }
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
    // As torch.nn.utils.clip_grad_norm_.
    let scale = (rule.clip_norm / (norm + 1e-6)).min(1.0);
    let gradients = if scale < 1.0 {
        scaled(&model, gradients, scale)
    } else {
        gradients
    };
    let model = optimizer.step(rate, model, gradients);
    move_biases(model, loads, rule.gamma)
}

/// Euclidean norm of all gradients together.
pub fn global_norm(model: &impl Module, gradients: &GradientsParams) -> f64 {
    struct Squares<'a>(&'a GradientsParams, Vec<Tensor<1>>);
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.extend(self.0.get::<D>(param.id).map(sum_of_squares));
        }
    }
    let mut squares = Squares(gradients, Vec::new());
    model.visit(&mut squares);
    if squares.1.is_empty() {
        return 0.0;
    }
    // One read from the device for all parameters; the sum of them in double precision.
    let squares: Vec<f64> = Tensor::cat(squares.1, 0)
        .into_data()
        .iter::<f64>()
        .collect();
    squares.iter().sum::<f64>().sqrt()
}

/// The parameters whose gradients have an element that is NaN or infinite, by name; all that have one if the norm alone
/// is beyond the numbers.
pub fn not_finite(model: &impl Module, gradients: &GradientsParams) -> Vec<String> {
    struct Search<'a> {
        gradients: &'a GradientsParams,
        path: ModulePath,
        found: Vec<String>,
    }
    impl ModuleVisitor for Search<'_> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _: &str, container: &str) {
            self.path.exit(container);
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(gradient) = self.gradients.get::<D>(param.id) else {
                return;
            };
            if !sum_of_squares(gradient).into_scalar::<f64>().is_finite() {
                self.found.push(self.path.join());
            }
        }
    }
    let mut search = Search {
        gradients,
        path: ModulePath::default(),
        found: Vec::new(),
    };
    model.visit(&mut search);
    search.found
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

/// Moves the selection bias of each router, in the order of [`Losses::loads`].
fn move_biases(mut model: Transformer, loads: &[Vec<u64>], gamma: f32) -> Transformer {
    if gamma == 0.0 {
        return model;
    }
    let main = model.layers.iter_mut().map(|layer| &mut layer.mlp);
    let further = model.mtp.iter_mut().map(|module| &mut module.block.mlp);
    let routers = main.chain(further).filter_map(|mlp| match mlp {
        FeedForward::Moe(moe) => Some(&mut moe.gate),
        FeedForward::Dense(_) => None,
    });
    for (router, load) in routers.zip(loads) {
        let step = balance::bias_step(load, gamma);
        let bias = router.e_score_correction_bias.clone();
        router.e_score_correction_bias = bias.map(|bias| {
            let step = TensorData::new(step, [load.len()]);
            let device = bias.device();
            (bias + Tensor::from_data(step, &device)).detach()
        });
    }
    model
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
