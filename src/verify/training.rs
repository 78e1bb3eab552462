//! `reference_train.safetensors` and `final_params.safetensors`: steps of the optimizer with clipping and bias
//! updates, and the balance loss.

use burn::{
    optim::GradientsParams,
    tensor::{Device, Int, Tensor},
};
use deepburn_model::{
    attention::AttentionMask,
    layer::FeedForward,
    loss::{BalanceReading, cross_entropy, sequence_balance},
    transformer::Transformer,
};
use deepburn_train::{
    config::{NonFinite, OptimizerConfig},
    optimizer::adamw,
    precision::Precision,
    spike::SpikeConfig,
    step::{UpdateRule, global_norm, update},
};

use super::{
    Subject,
    comparison::{Comparison, values},
    gradients,
    reference::ReferenceFile,
    report::{Errors, Report},
    tolerance,
};

/// The name of the file.
pub(super) const FILE: &str = "reference_train.safetensors";
/// Parameters after its steps.
pub(super) const PARAMETERS: &str = "final_params.safetensors";

// The references' settings.
const LEARNING_RATE: f64 = 1e-3;
const RULE: UpdateRule = UpdateRule {
    clip_norm: 1.0,
    gamma: 1e-3,
};
const OPTIMIZER: OptimizerConfig = OptimizerConfig {
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-8,
    weight_decay: 0.1,
    clip_norm: 1.0,
    non_finite: NonFinite::Halt,
    spike: SpikeConfig::OFF,
};
/// Factor on the balance loss, alpha.
const ALPHA: f64 = 1e-4;

/// What one step after the other gave.
#[derive(Default)]
struct Steps {
    losses: Vec<f32>,
    norms: Vec<f32>,
    loads: Vec<i64>,
    biases: Vec<f32>,
}

/// The tokens of a step, `[B, T]`.
pub(super) fn batch(
    file: &ReferenceFile,
    step: usize,
    vocabulary: usize,
    device: &Device,
) -> anyhow::Result<Tensor<2, Int>> {
    file.tokens(&input(step), vocabulary, 2, device)
}

fn input(step: usize) -> String {
    format!("input_ids.step{step}")
}

/// Recomputes what is in the two files.
pub(super) fn verify(
    subject: &Subject,
    with_parameters: bool,
    report: &mut Report,
) -> anyhow::Result<()> {
    let file = ReferenceFile::read(subject.dir, FILE)?;
    let (model, device) = subject.trainable()?;
    let count = (0..).take_while(|&step| file.has(&input(step))).count();
    // At least one: without it, the error says what is missing.
    let batches: Vec<Tensor<2, Int>> = (0..count.max(1))
        .map(|step| batch(&file, step, subject.config.vocab_size, &device))
        .collect::<anyhow::Result<_>>()?;
    let inputs: Vec<String> = (0..count).map(input).collect();
    let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
    let mut comparison = Comparison::new(&file, report, &inputs);
    let layers = subject.config.num_hidden_layers;
    for (name, reading) in [
        ("paper", BalanceReading::Paper),
        ("actual", BalanceReading::Actual),
    ] {
        balance(
            &model,
            layers,
            &batches[0],
            (name, reading),
            &mut comparison,
        )?;
    }

    let (model, steps) = train(model, &batches);
    let routers = router_biases(&model).len();
    let per_router = [count, routers, subject.config.n_routed_experts];
    comparison.floats("loss", &[count], &steps.losses, tolerance::LOSS)?;
    comparison.floats("grad_norm", &[count], &steps.norms, tolerance::LOSS)?;
    comparison.ints("expert_load", &per_router, &steps.loads)?;
    comparison.floats("bias", &per_router, &steps.biases, tolerance::BIAS)?;
    comparison.finish();
    if with_parameters {
        parameters(subject, &model, report)?;
    }
    Ok(())
}

fn train(mut model: Transformer, batches: &[Tensor<2, Int>]) -> (Transformer, Steps) {
    let mut optimizer = adamw(&OPTIMIZER, Precision::Fp32);
    let mut steps = Steps::default();
    for tokens in batches {
        let [_, length] = tokens.dims();
        let mask = AttentionMask::causal(length, &tokens.device());
        let output = model.forward(tokens.clone(), &mask);
        let logits = model.logits(output.hidden.narrow(1, 0, length - 1));
        let loss = cross_entropy(logits, tokens.clone().narrow(1, 1, length - 1));
        steps.losses.extend(values(loss.clone()));
        let loads: Vec<Vec<u64>> = output
            .moe
            .iter()
            .map(|moe| {
                moe.load
                    .to_data()
                    .iter::<i64>()
                    .map(|load| load as u64)
                    .collect()
            })
            .collect();
        steps
            .loads
            .extend(loads.iter().flatten().map(|&load| load as i64));

        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        let rate = LEARNING_RATE.into();
        let norm = global_norm(&model, &gradients);
        model = update(model, &mut optimizer, rate, gradients, norm, &loads, RULE);
        steps.norms.push(norm as f32);
        steps
            .biases
            .extend(router_biases(&model).into_iter().flatten());
    }
    (model, steps)
}

/// The selection biases of each router of the main model.
fn router_biases(model: &Transformer) -> Vec<Vec<f32>> {
    let biases = model.layers.iter().filter_map(|layer| match &layer.mlp {
        FeedForward::Moe(moe) => Some(values(moe.gate.e_score_correction_bias.val())),
        FeedForward::Dense(_) => None,
    });
    biases.collect()
}

/// The balance loss in one reading, with its gradients.
fn balance(
    model: &Transformer,
    layers: usize,
    tokens: &Tensor<2, Int>,
    (name, reading): (&str, BalanceReading),
    comparison: &mut Comparison,
) -> anyhow::Result<()> {
    let [sequences, length] = tokens.dims();
    let mask = AttentionMask::causal(length, &tokens.device());
    let output = model.forward(tokens.clone(), &mask);
    let per_layer: Vec<Tensor<1>> = output
        .moe
        .iter()
        .map(|moe| sequence_balance(&moe.routing, sequences, reading) * ALPHA)
        .collect();
    if per_layer.is_empty() {
        return Ok(());
    }
    let per_layer = Tensor::cat(per_layer, 0);
    let key = format!("balance_loss.{name}");
    let bound = tolerance::BALANCE;
    comparison.tensor(&format!("{key}.per_layer"), per_layer.clone(), bound)?;
    let total = per_layer.sum();
    comparison.floats(&key, &[], &values(total.clone()), bound)?;
    for (parameter, (shape, found)) in gradients::of_loss(model, layers, total) {
        let key = format!("balance_grad.{name}.{parameter}");
        comparison.floats(&key, &shape, &found, tolerance::BALANCE_GRADIENT)?;
    }
    Ok(())
}

/// Every parameter after the steps.
fn parameters(subject: &Subject, model: &Transformer, report: &mut Report) -> anyhow::Result<()> {
    let file = ReferenceFile::read(subject.dir, PARAMETERS)?;
    let mut comparison = Comparison::new(&file, report, &[]);
    let mut all = Errors::default();
    let found = gradients::parameters(model, subject.config.num_hidden_layers);
    for (name, (shape, values)) in &found {
        let bound = if name.ends_with(".e_score_correction_bias") {
            tolerance::BIAS
        } else {
            tolerance::PARAMETER
        };
        all = all.and(comparison.floats(name, shape, values, bound)?);
    }
    comparison.together("all parameters", all, tolerance::PARAMETERS);
    comparison.finish();
    Ok(())
}
