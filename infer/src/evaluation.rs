//! How well a model predicts a text: perplexity, bits per byte, and how often its prediction modules agree with it.

use burn::tensor::{Int, Tensor, TensorData};
use deepburn_model::attention::AttentionMask;

use crate::engine::{Engine, EngineError};

/// How a text is evaluated.
#[derive(Clone, Copy, Debug)]
pub struct EvaluationOptions {
    /// Tokens that the model sees at most. The text is cut into windows of so many; every token but the first is
    /// predicted once, from what is before it in its window.
    pub context: usize,
    /// Puts the beginning-of-text token before the text, so that its first token is predicted as well.
    pub add_bos: bool,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Evaluation {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Bytes of their text.
    pub bytes: usize,
    /// Sum of their negative logarithms of probability, in nats.
    pub nats: f64,
    /// Of every prediction module, with the true text before each prediction.
    pub modules: Vec<Agreement>,
    /// Tokens that each routed expert received, for every mixture-of-experts layer of the main model.
    pub expert_loads: Vec<Vec<u64>>,
}

/// What became of one module's predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    /// Predictions.
    pub rows: usize,
    /// Those that are the main model's most probable token: greedy decoding would accept them.
    pub agreed: usize,
    /// Those that are the text's token.
    pub right: usize,
}

impl Agreement {
    /// Agreed predictions of all.
    pub fn acceptance(&self) -> f64 {
        self.agreed as f64 / self.rows.max(1) as f64
    }
}

impl Evaluation {
    /// e to the mean of nats per token.
    pub fn perplexity(&self) -> f64 {
        (self.nats / self.tokens as f64).exp()
    }

    /// Bits of information per byte of text.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }
}

/// Predicts a text; `progress` hears how many of how many tokens are done.
///
/// # Errors
/// A text of fewer than two tokens, a context that the model does not have, or a failure on the way.
pub fn evaluate(
    engine: &Engine,
    text: &str,
    options: EvaluationOptions,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Evaluation, EngineError> {
    let longest = engine.config.max_position_embeddings;
    if !(1..=longest).contains(&options.context) {
        return Err(EngineError::Context {
            context: options.context,
            longest,
        });
    }
    let encoding = engine
        .tokenizer
        .encode(text, false)
        .map_err(EngineError::Encode)?;
    let mut tokens = Vec::new();
    if options.add_bos {
        tokens.push(engine.bos.ok_or(EngineError::NoBos)?);
    }
    tokens.extend(encoding.get_ids());
    let skipped = match options.add_bos {
        true => 0,
        false => encoding
            .get_offsets()
            .get(1)
            .map_or(text.len(), |offset| offset.0),
    };
    if tokens.len() < 2 {
        return Err(EngineError::TooShort);
    }
    let limits = engine.limits();
    if let Some(&id) = tokens.iter().find(|&&id| id as usize >= limits.vocab_size) {
        let vocab_size = limits.vocab_size;
        return Err(EngineError::UnknownToken { id, vocab_size });
    }
    let mut found = Evaluation {
        bytes: text.len() - skipped,
        modules: vec![Agreement::default(); engine.model.mtp.len()],
        ..Evaluation::default()
    };
    let all = tokens.len() - 1;
    let last = tokens.pop().expect("there are at least two");
    for (at, window) in tokens.chunks(options.context).enumerate() {
        let next = (at + 1) * options.context;
        let target = tokens.get(next).copied().unwrap_or(last);
        predict(engine, window, target, &mut found)?;
        progress(found.tokens, all);
    }
    Ok(found)
}

/// Adds a window, whose last token is followed by `last`.
fn predict(
    engine: &Engine,
    window: &[u32],
    last: u32,
    found: &mut Evaluation,
) -> Result<(), EngineError> {
    let (model, device) = (&engine.model, &engine.device);
    let length = window.len();
    let mut text: Vec<i32> = window.iter().map(|&id| id as i32).collect();
    text.push(last as i32);
    let tokens = |from: usize, length: usize| {
        let ids = text[from..from + length].to_vec();
        Tensor::<2, Int>::from_data(TensorData::new(ids, [1, length]), device)
    };
    let output = model.forward(tokens(0, length), &AttentionMask::causal(length, device));
    let nats = model.cross_entropy(output.hidden.clone(), tokens(1, length));
    let nats = nats.try_into_data().map_err(EngineError::Device)?;
    found.nats += nats.iter::<f64>().sum::<f64>() * length as f64;
    found.tokens += length;
    for (layer, moe) in output.moe.into_iter().enumerate() {
        let load = moe.load.try_into_data().map_err(EngineError::Device)?;
        let load = load.iter::<i64>().map(|count| count as u64);
        match found.expert_loads.get_mut(layer) {
            Some(total) => total.iter_mut().zip(load).for_each(|(sum, n)| *sum += n),
            None => found.expert_loads.push(load.collect()),
        }
    }
    if model.mtp.is_empty() {
        return Ok(());
    }
    // Token i + 1 as the main model would choose it after tokens 0 to i.
    let chosen = best(engine, output.hidden.clone())?;
    let mut previous = output.hidden;
    for (depth, agreement) in found.modules.iter_mut().enumerate() {
        // Row i reads token i + depth + 1 and predicts token i + depth + 2.
        let rows = length.saturating_sub(depth + 1);
        if rows == 0 {
            break;
        }
        let mask = AttentionMask::causal(rows, device);
        let input = previous.narrow(1, 0, rows);
        let output = model.predict_further(depth, input, tokens(depth + 1, rows), &mask);
        let predicted = best(engine, output.hidden.clone())?;
        agreement.rows += rows;
        for (row, &token) in predicted.iter().enumerate() {
            agreement.agreed += usize::from(token == chosen[row + depth + 1]);
            agreement.right += usize::from(token as i32 == text[row + depth + 2]);
        }
        previous = output.hidden;
    }
    Ok(())
}

/// The most probable token of every row, without the logits of all rows at once.
fn best(engine: &Engine, hidden: Tensor<3>) -> Result<Vec<u32>, EngineError> {
    /// Rows whose logits are held together.
    const ROWS: usize = 256;
    let [_, length, _] = hidden.dims();
    let mut tokens = Vec::with_capacity(length);
    for start in (0..length).step_by(ROWS) {
        let rows = hidden.clone().narrow(1, start, ROWS.min(length - start));
        let best = engine.model.logits(rows).argmax(2);
        let best = best.try_into_data().map_err(EngineError::Device)?;
        tokens.extend(best.iter::<u32>());
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{batch::tests::predicting_as, logprobs::log_sum_exp};

    const TEXT: &str = "The quick brown fox jumps over the lazy dog, and then it rests.";

    /// Logits of whole passes over every beginning of every window, one prediction at a time.
    #[test]
    fn agrees_with_one_prediction_at_a_time() {
        let engine = predicting_as("tiny-yarn", 2, 9);
        let logits = |hidden: Tensor<3>| -> Vec<f32> {
            let [_, length, _] = hidden.dims();
            let last = hidden.narrow(1, length - 1, 1);
            engine.model.logits(last).into_data().iter().collect()
        };
        let argmax = |logits: Vec<f32>| {
            let best = (0..logits.len())
                .rev()
                .max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
            best.unwrap() as u32
        };
        let tensor = |ids: &[u32]| {
            let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
            let shape = [1, ids.len()];
            Tensor::<2, Int>::from_data(TensorData::new(ids, shape), &engine.device)
        };
        let mask = |length| AttentionMask::causal(length, &engine.device);
        let main = |ids: &[u32]| engine.model.forward(tensor(ids), &mask(ids.len())).hidden;
        for (context, add_bos) in [(100, false), (7, true), (10, false), (1, false)] {
            let options = EvaluationOptions { context, add_bos };
            let mut heard = Vec::new();
            let found = evaluate(&engine, TEXT, options, &mut |done, all| {
                heard.push((done, all))
            });
            let found = found.unwrap();
            let tokens = engine.encode(TEXT, add_bos).unwrap();
            let mut nats = 0.0;
            let mut modules = [Agreement::default(); 2];
            for at in 1..tokens.len() {
                let start = (at - 1) / context * context;
                let seen = logits(main(&tokens[start..at]));
                nats += log_sum_exp(&seen) - f64::from(seen[tokens[at] as usize]);
                // What predicts token `at` from depth + 1 tokens before the last seen one.
                for (depth, agreement) in modules.iter_mut().enumerate() {
                    let Some(rows) = (at - 1 - start).checked_sub(depth).filter(|&rows| rows > 0)
                    else {
                        continue;
                    };
                    let mut hidden = main(&tokens[start..start + rows]);
                    for module in 0..=depth {
                        let from = start + module + 1;
                        let read = tensor(&tokens[from..from + rows]);
                        let model = &engine.model;
                        hidden = model
                            .predict_further(module, hidden, read, &mask(rows))
                            .hidden;
                    }
                    let predicted = argmax(logits(hidden));
                    agreement.rows += 1;
                    agreement.right += usize::from(predicted == tokens[at]);
                    agreement.agreed += usize::from(predicted == argmax(seen.clone()));
                }
            }
            assert_eq!(found.tokens, tokens.len() - 1);
            assert_eq!(heard.last(), Some(&(found.tokens, found.tokens)));
            assert!(
                (found.nats - nats).abs() < 1e-4 * nats,
                "{} {nats}",
                found.nats
            );
            assert_eq!(found.modules, modules, "context {context}");
            assert!(context < 10 || modules[0].agreed > 0, "{modules:?}");
            let first = engine.tokenizer.decode(&tokens[..1], false).unwrap().len();
            let bytes = if add_bos {
                TEXT.len()
            } else {
                TEXT.len() - first
            };
            assert_eq!(found.bytes, bytes);
            let bits = found.bits_per_byte() * bytes as f64;
            assert!((bits - found.perplexity().log2() * found.tokens as f64).abs() < 1e-6 * bits);
            let all: u64 = found.expert_loads[0].iter().sum();
            assert_eq!(
                all as usize,
                found.tokens * engine.config.num_experts_per_tok
            );
        }
    }

    #[test]
    fn what_cannot_be_evaluated_is_refused() {
        let engine = predicting_as("tiny-yarn", 2, 9);
        let refused = |text: &str, context| {
            let options = EvaluationOptions {
                context,
                add_bos: false,
            };
            let error = evaluate(&engine, text, options, &mut |_, _| ()).unwrap_err();
            error.to_string()
        };
        assert!(refused("a", 8).contains("at least two tokens"));
        assert_eq!(
            refused(TEXT, 2561),
            "a context of 2561 tokens: must be 1 to max_position_embeddings = 2560"
        );
        assert!(refused(TEXT, 0).contains("a context of 0"));
    }
}
