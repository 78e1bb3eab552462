//! `deepburn generate --batch`: many prompts, continued together.

use std::{cell::RefCell, fs, ops::ControlFlow, path::Path, rc::Rc, time::Instant};

use anyhow::{Context, anyhow};
use deepburn_infer::{
    batch::{Batch, BatchConfig, Event, Request},
    engine::{Engine, EngineError, Finish, GenerateOptions, Summary},
};
use deepburn_model::checkpoint::write_file;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::counting::Counting;

/// A line of the file of prompts.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Prompt {
    prompt: String,
    id: Option<Value>,
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    seed: Option<u64>,
}

/// Reads a file of prompts.
///
/// # Errors
/// A file that is not there or has no prompt, or a line that is none; the message names it.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<Prompt>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let lines = (1..)
        .zip(text.lines())
        .filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(number, line)| {
        serde_json::from_str(line).map_err(|error| anyhow!("{}:{number}: {error}", path.display()))
    });
    let prompts: Vec<Prompt> = prompts.collect::<Result<_, _>>()?;
    match prompts.is_empty() {
        true => Err(anyhow!("{}: there is no prompt in it", path.display())),
        false => Ok(prompts),
    }
}

#[derive(Default)]
struct Text {
    text: String,
    result: Option<Result<Summary, EngineError>>,
}

/// Continues all prompts and writes the texts to `output`.
///
/// # Errors
/// A prompt that cannot be continued, or a file that cannot be written.
pub(crate) fn run(
    engine: &Engine,
    config: BatchConfig,
    (prompts, options): (&[Prompt], &GenerateOptions),
    output: &Path,
) -> anyhow::Result<()> {
    let mut batch = Batch::new(engine, config);
    let mut texts = Vec::new();
    for (number, prompt) in prompts.iter().enumerate() {
        let request = prompt.request(engine, options, number as u64);
        let text = Rc::new(RefCell::new(Text::default()));
        let heard = Rc::clone(&text);
        let listener = move |event| {
            let mut heard = heard.borrow_mut();
            match event {
                Event::Piece { text, .. } => heard.text += &text,
                Event::Finished(summary) => heard.result = Some(Ok(summary)),
                Event::Failed(error) => heard.result = Some(Err(error)),
            }
            ControlFlow::Continue(())
        };
        request
            .and_then(|request| batch.add(request, Box::new(listener)))
            .with_context(|| format!("prompt {}", number + 1))?;
        texts.push(text);
    }

    let start = Instant::now();
    let mut progress = Counting::new("texts", prompts.len());
    while !batch.is_idle() {
        batch.step();
        let totals = batch.counts();
        let speed = totals.new_tokens as f64 / start.elapsed().as_secs_f64();
        progress.set(totals.finished as usize, || format!("{speed:.0} tokens/s"));
    }
    drop(progress);

    let mut lines = String::new();
    for (number, (prompt, text)) in prompts.iter().zip(&texts).enumerate() {
        let mut text = text.borrow_mut();
        let result = text.result.take().expect("every text was ended");
        let summary = result.with_context(|| format!("prompt {}", number + 1))?;
        lines += &line(prompt, &text.text, &summary).to_string();
        lines.push('\n');
    }
    write_file(output, lines.as_bytes())?;
    eprint!("{}", statistics(&mut batch, prompts.len(), start)?);
    Ok(())
}

impl Prompt {
    fn request(
        &self,
        engine: &Engine,
        options: &GenerateOptions,
        number: u64,
    ) -> Result<Request, EngineError> {
        let mut options = options.clone();
        options.max_new_tokens = self.max_new_tokens.unwrap_or(options.max_new_tokens);
        let sampler = &mut options.sampler;
        sampler.temperature = self.temperature.unwrap_or(sampler.temperature);
        sampler.seed = self.seed.unwrap_or(sampler.seed.wrapping_add(number));
        Ok(Request {
            prompt: engine.encode(&self.prompt, options.add_bos)?,
            options,
            logprobs: None,
        })
    }
}

fn line(prompt: &Prompt, text: &str, summary: &Summary) -> Value {
    let mut line = json!({
        "text": text,
        "finish_reason": match summary.finish {
            Finish::EndOfText | Finish::StopString(_) => "stop",
            Finish::MaxNewTokens | Finish::ContextFull => "length",
            Finish::Cancelled => "cancelled",
        },
        "prompt_tokens": summary.prompt_tokens,
        "new_tokens": summary.new_tokens,
    });
    if let Some(id) = &prompt.id {
        line["id"] = id.clone();
    }
    line
}

fn statistics(batch: &mut Batch<'_>, texts: usize, start: Instant) -> Result<String, EngineError> {
    let seconds = start.elapsed().as_secs_f64();
    let totals = batch.totals()?;
    let mut lines = format!(
        "texts:  {texts}, {} prompt tokens, {} of them reused\nnew:    {} tokens in {} steps, {:.1} tokens/s\n",
        totals.prompt_tokens,
        totals.reused_tokens,
        totals.new_tokens,
        totals.steps,
        totals.new_tokens as f64 / seconds,
    );
    let rates = totals
        .drafts
        .acceptance()
        .zip(totals.drafts.tokens_per_step());
    if let Some((acceptance, tokens)) = rates {
        let percent = 100.0 * acceptance;
        lines += &format!("drafts: {percent:.1}% accepted, {tokens:.2} tokens per step and text\n");
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_no_prompts_are_refused_by_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in.jsonl");
        let refused = |text: &str| {
            fs::write(&path, text).unwrap();
            read(&path).unwrap_err().to_string()
        };
        let message = refused("{\"prompt\": \"a\"}\n\n{\"prompt\": \"b\", \"n\": 2}\n");
        assert!(
            message.contains("in.jsonl:3: unknown field `n`"),
            "{message}"
        );
        assert!(refused("{\"id\": 1}").contains("in.jsonl:1: missing field `prompt`"));
        assert!(refused("\n").contains("there is no prompt in it"));
        fs::write(&path, "{\"prompt\": \"a\", \"id\": [1], \"seed\": 3}\n").unwrap();
        let prompts = read(&path).unwrap();
        assert_eq!(
            (prompts[0].prompt.as_str(), prompts[0].seed),
            ("a", Some(3))
        );
    }
}
