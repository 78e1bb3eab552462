//! `reference.safetensors`: constants, the results of every layer, prediction of further tokens, losses.

use burn::tensor::{Int, Tensor};
use deepburn_kernels::rope::Rotation;
use deepburn_model::{
    attention::AttentionMask, config::ModelConfig, layer::DecoderLayer, loss::cross_entropy,
    moe::Routing, projection::Arithmetic, transformer::Transformer,
};

use super::{
    Subject,
    attention_probs::probabilities,
    comparison::{Comparison, values},
    fp8, mtp,
    reference::ReferenceFile,
    report::Report,
    tolerance::{self, Bound},
};

/// The name of the file.
pub(super) const FILE: &str = "reference.safetensors";
/// Its input.
pub(super) const INPUT: &str = "input_ids";

/// Recomputes what is in the file.
pub(super) fn verify(subject: &Subject, report: &mut Report) -> anyhow::Result<()> {
    let file = ReferenceFile::read(subject.dir, FILE)?;
    let config = &subject.config;
    let tokens = file.tokens(INPUT, config.vocab_size, 1, &subject.device)?;
    let model = subject.model()?;
    let mut comparison = Comparison::new(&file, report, &[INPUT]);
    constants(&model, &mut comparison)?;
    layers(&model, config, subject.results, &tokens, &mut comparison)?;
    whole(&model, subject.results, &tokens, &mut comparison)?;
    quantized(subject, &model, &tokens, &mut comparison)?;
    if model.mtp.len() == 1 && tokens.dims()[1] >= mtp::SHORTEST {
        mtp::forward(&model, subject.results, &tokens, &mut comparison)?;
    }
    comparison.finish();
    Ok(())
}

fn constants(model: &Transformer, comparison: &mut Comparison) -> anyhow::Result<()> {
    let rope = model.rope();
    let bound = tolerance::CONSTANTS;
    let speeds = &rope.inv_freq;
    comparison.floats("rope.inv_freq", &[speeds.len()], speeds, bound)?;
    let scalars = [
        ("rope.attention_scaling", rope.attention_scaling),
        ("softmax_scale", rope.softmax_scale),
    ];
    for (name, value) in scalars {
        comparison.floats(name, &[], &[value as f32], bound)?;
    }
    Ok(())
}

/// The model with the products of its layers in FP8.
fn quantized(
    subject: &Subject,
    model: &Transformer,
    tokens: &Tensor<2, Int>,
    comparison: &mut Comparison,
) -> anyhow::Result<()> {
    let mask = AttentionMask::causal(tokens.dims()[1], &subject.device);
    for (format, suffix) in fp8::FORMATS {
        let name = format!("logits_w8a8{suffix}");
        if comparison.file.has(&name) {
            let model = model.clone().with_arithmetic(Arithmetic::fp8(format));
            let hidden = model.forward(tokens.clone(), &mask).hidden;
            comparison.tensor(&name, model.logits(hidden), tolerance::RESULTS_W8A8)?;
        }
    }
    Ok(())
}

/// Layer by layer, as the model itself applies them.
fn layers(
    model: &Transformer,
    config: &ModelConfig,
    results: Bound,
    tokens: &Tensor<2, Int>,
    comparison: &mut Comparison,
) -> anyhow::Result<()> {
    let [_, length] = tokens.dims();
    let device = tokens.device();
    let rope = model.rope().rotation(0, length, &device);
    let mask = AttentionMask::causal(length, &device);
    let mut x = model.embed_tokens.forward(tokens.clone());
    for (index, layer) in model.layers.iter().enumerate() {
        comparison.tensor(&format!("hidden_states.{index}"), x.clone(), results)?;
        let prefix = format!("layer.{index}");
        attention(
            layer,
            config,
            results,
            x.clone(),
            &rope,
            &prefix,
            comparison,
        )?;
        let output = layer.forward(x, &rope, &mask);
        comparison.tensor(&format!("{prefix}.attn_output"), output.attention, results)?;
        comparison.tensor(
            &format!("{prefix}.mlp_output"),
            output.feed_forward,
            results,
        )?;
        if let Some(moe) = output.moe {
            routing(&moe.routing, results, &prefix, comparison)?;
        }
        x = output.hidden;
    }
    comparison.tensor(&format!("hidden_states.{}", model.layers.len()), x, results)
}

/// What is inside a layer's attention.
fn attention(
    layer: &DecoderLayer,
    config: &ModelConfig,
    results: Bound,
    x: Tensor<3>,
    rope: &Rotation,
    prefix: &str,
    comparison: &mut Comparison,
) -> anyhow::Result<()> {
    let normed = layer.input_layernorm.forward(x);
    let (c_kv, k_pe) = layer.self_attn.latents(normed.clone(), rope);
    comparison.tensor(&format!("{prefix}.cache_kv_latent"), c_kv, results)?;
    comparison.tensor(&format!("{prefix}.cache_k_rope"), k_pe, results)?;
    let name = format!("{prefix}.attn_probs");
    if comparison.file.has(&name) {
        let found = probabilities(&layer.self_attn, config, normed, rope);
        comparison.tensor(&name, found, results)?;
    }
    Ok(())
}

/// References list a token's experts by number; the model's are best first.
pub(super) fn routing(
    routing: &Routing,
    results: Bound,
    prefix: &str,
    comparison: &mut Comparison,
) -> anyhow::Result<()> {
    let [tokens, k] = routing.chosen.dims();
    let name = format!("{prefix}.router_logits");
    comparison.tensor(&name, routing.logits.clone(), results)?;
    let chosen: Vec<i64> = routing.chosen.to_data().iter::<i64>().collect();
    let weights = values(routing.weights.clone());
    let mut by_number: Vec<(i64, f32)> = chosen.into_iter().zip(weights).collect();
    for experts in by_number.chunks_mut(k) {
        experts.sort_by_key(|expert| expert.0);
    }
    let (chosen, weights): (Vec<i64>, Vec<f32>) = by_number.into_iter().unzip();
    let shape = [tokens, k];
    comparison.ints(&format!("{prefix}.topk_indices"), &shape, &chosen)?;
    let name = format!("{prefix}.topk_weights");
    comparison.floats(&name, &shape, &weights, tolerance::WEIGHTS)?;
    Ok(())
}

/// The model in one call.
fn whole(
    model: &Transformer,
    results: Bound,
    tokens: &Tensor<2, Int>,
    comparison: &mut Comparison,
) -> anyhow::Result<()> {
    let [_, length] = tokens.dims();
    let mask = AttentionMask::causal(length, &tokens.device());
    let hidden = model.forward(tokens.clone(), &mask).hidden;
    comparison.tensor("final_hidden", hidden.clone(), results)?;
    let logits = model.logits(hidden);
    comparison.tensor("logits", logits.clone(), results)?;
    if length >= 2 {
        let targets = tokens.clone().narrow(1, 1, length - 1);
        let loss = values(cross_entropy(logits.narrow(1, 0, length - 1), targets));
        comparison.floats("loss_main", &[], &loss, tolerance::LOSS)?;
    }
    Ok(())
}
