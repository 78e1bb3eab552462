//! `reference_generate.safetensors`: greedy generation over the latent cache, whatever the end-of-text token.

use anyhow::ensure;
use burn::tensor::Tensor;

use super::{Subject, comparison::Comparison, reference::ReferenceFile, report::Report};

/// The name of the file.
pub(super) const FILE: &str = "reference_generate.safetensors";
const PROMPT: &str = "prompt_ids";
const OUTPUT: &str = "output_ids";

/// Recomputes what is in the file.
pub(super) fn verify(subject: &Subject, report: &mut Report) -> anyhow::Result<()> {
    let file = ReferenceFile::read(subject.dir, FILE)?;
    let vocabulary = subject.config.vocab_size;
    let prompt = file.tokens(PROMPT, vocabulary, 1, &subject.device)?;
    let output = file.tokens(OUTPUT, vocabulary, 1, &subject.device)?;
    let ([batch, given], [_, columns]) = (prompt.dims(), output.dims());
    ensure!(
        columns > given,
        "{}: {OUTPUT}: expected more than the {given} tokens of {PROMPT}, found {columns}",
        subject.dir.join(FILE).display()
    );

    let model = subject.model()?;
    let mut cache = model.new_cache();
    let mut next = prompt.clone();
    let mut tokens = vec![prompt];
    let mut logits = Vec::new();
    for _ in given..columns {
        let hidden = model.forward_cached(next, &mut cache).hidden;
        let last = hidden.dims()[1] - 1;
        let step = model.logits(hidden.narrow(1, last, 1)); // [B, 1, W]
        next = step.clone().argmax(2).reshape([batch, 1]);
        logits.push(step);
        tokens.push(next.clone());
    }

    let mut comparison = Comparison::new(&file, report, &[PROMPT]);
    let tokens: Vec<i64> = Tensor::cat(tokens, 1).into_data().iter::<i64>().collect();
    comparison.ints(OUTPUT, &[batch, columns], &tokens)?;
    comparison.tensor("step_logits", Tensor::cat(logits, 1), subject.results)?;
    comparison.finish();
    Ok(())
}
