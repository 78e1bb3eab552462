//! Prediction of further tokens: its results in `reference.safetensors`, and `reference_mtp_grads.safetensors`.
//!
//! Losses are those that the references define: each over the tokens of a sequence that have a target in it.

use burn::tensor::{Int, Tensor};
use deepburn_model::{
    attention::AttentionMask, loss::cross_entropy, mtp::MtpOutput, transformer::Transformer,
};

use super::{
    Subject,
    comparison::{Comparison, values},
    forward, gradients,
    reference::ReferenceFile,
    report::Report,
    tolerance::{self, Bound},
};

/// The file of gradients.
pub(super) const GRADIENTS: &str = "reference_mtp_grads.safetensors";
/// A sequence in which one token has a target two further on.
pub(super) const SHORTEST: usize = 3;
/// Weight of the further loss, lambda.
const LAMBDA: f64 = 0.3;

struct Predicted {
    main: Tensor<1>,
    further: Tensor<1>,
    output: MtpOutput,
}

fn predict(model: &Transformer, tokens: &Tensor<2, Int>) -> Predicted {
    let [_, length] = tokens.dims();
    let device = tokens.device();
    let at = |start: usize, length: usize| tokens.clone().narrow(1, start, length);
    let mask = AttentionMask::causal(length, &device);
    let hidden = model.forward(tokens.clone(), &mask).hidden;
    let hidden = hidden.narrow(1, 0, length - 1);
    let main = cross_entropy(model.logits(hidden.clone()), at(1, length - 1));
    let mask = AttentionMask::causal(length - 1, &device);
    let output = model.predict_further(0, hidden, at(1, length - 1), &mask);
    let logits = model.logits(output.hidden.clone().narrow(1, 0, length - 2));
    Predicted {
        main,
        further: cross_entropy(logits, at(2, length - 2)),
        output,
    }
}

/// Compares the results of a model with one module.
pub(super) fn forward(
    model: &Transformer,
    results: Bound,
    tokens: &Tensor<2, Int>,
    comparison: &mut Comparison,
) -> anyhow::Result<()> {
    let [batch, length] = tokens.dims();
    let Predicted {
        main,
        further,
        output,
    } = predict(model, tokens);
    comparison.tensor("mtp.eh_proj_output", output.projected, results)?;
    comparison.tensor("mtp.block_output", output.block.hidden, results)?;
    comparison.tensor("mtp.normed", output.hidden.clone(), results)?;
    comparison.tensor("mtp_logits", model.logits(output.hidden), results)?;
    if let Some(moe) = output.block.moe {
        forward::routing(&moe.routing, results, "mtp", comparison)?;
    }
    let mean = values(further.clone());
    comparison.floats("loss_mtp", &[], &mean, tolerance::LOSS)?;
    let total = values(main + further * LAMBDA);
    comparison.floats("loss_total", &[], &total, tolerance::LOSS)?;
    let count = batch * (length - 2);
    comparison.ints("loss_mtp_count", &[], &[count as i64])?;
    let sum = (f64::from(mean[0]) * count as f64) as f32;
    let bound = tolerance::loss_sum(count);
    comparison.floats("loss_mtp_sum", &[], &[sum], bound)?;
    Ok(())
}

/// Recomputes the gradients of the total loss.
pub(super) fn verify_gradients(subject: &Subject, report: &mut Report) -> anyhow::Result<()> {
    let file = ReferenceFile::read(subject.dir, GRADIENTS)?;
    if subject.config.num_nextn_predict_layers != 1 {
        let names = file.names().into_iter().map(str::to_owned).collect();
        report.skip(GRADIENTS, names, "only known for one prediction module");
        return Ok(());
    }
    let (model, device) = subject.trainable()?;
    let input = ReferenceFile::read(subject.dir, forward::FILE)?;
    let vocabulary = subject.config.vocab_size;
    let tokens = input.tokens(forward::INPUT, vocabulary, SHORTEST, &device)?;
    let Predicted { main, further, .. } = predict(&model, &tokens);
    let total = main + further * LAMBDA;
    let found = gradients::of_loss(&model, subject.config.num_hidden_layers, total);
    gradients::compare(&file, report, &found)
}
