//! `deepburn generate`: continues a text.

use std::{io, ops::ControlFlow, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{CommandFactory, builder::NonEmptyStringValueParser, error::ErrorKind};
use deepburn_infer::{
    engine::{Engine, Finish, GenerateOptions, Summary},
    penalties::Penalties,
    sampler::SamplerConfig,
};
use deepburn_model::config::ModelConfig;

use crate::{device::DeviceSpec, model_dir, print_now};

/// Continue a text with a model.
///
/// The new text goes to standard output as it is generated, without the prompt; statistics go to standard error.
/// The same model, prompt, options and seed give the same text.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of a Hugging Face checkpoint, or of a training run (its newest checkpoint)
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// Text to continue; `-` reads standard input, "" starts from the beginning-of-text token
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,

    /// Where to compute: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceSpec,

    /// End after this many new tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,

    /// Divides the logits: below 1 likely tokens become likelier; 0 always takes the likeliest
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.8,
        allow_negative_numbers = true
    )]
    temperature: f32,

    /// Choose among the K likeliest tokens only
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,

    /// Choose among the fewest likeliest tokens whose probabilities add up to P
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,

    /// Choose among tokens at least P times as likely as the likeliest
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,

    /// Seed of the random choices
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// Always take the likeliest token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed"])]
    greedy: bool,

    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new(), allow_hyphen_values = true)]
    stop: Vec<String>,

    /// Go on after an end-of-text token
    #[arg(long)]
    ignore_eos: bool,

    /// Put the beginning-of-text token before the prompt
    #[arg(long)]
    bos: bool,
}

impl Args {
    fn options(&self) -> GenerateOptions {
        let sampler = SamplerConfig {
            temperature: if self.greedy { 0.0 } else { self.temperature },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
        };
        GenerateOptions {
            sampler,
            penalties: Penalties::default(),
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
            add_bos: self.bos,
            ignore_eos: self.ignore_eos,
        }
    }
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let options = args.options();
    if let Err(error) = options.sampler.validate() {
        crate::Cli::command()
            .error(ErrorKind::ValueValidation, error)
            .exit();
    }
    let dir = model_dir::resolve(&args.model)?;
    let device = args.device.open()?;
    let prompt = match args.prompt.as_str() {
        "-" => {
            io::read_to_string(io::stdin()).context("cannot read the prompt from standard input")?
        }
        text => text.to_owned(),
    };
    let engine = Engine::open(&dir, &device)?;

    let mut failure = None;
    let generated = engine.generate(&prompt, &options, &mut |text| {
        print_now(text).unwrap_or_else(|error| {
            failure = Some(error);
            ControlFlow::Break(())
        })
    })?;
    if failure.is_none() {
        failure = print_now("\n").err();
    }
    if let Some(error) = failure {
        return Err(error).context("cannot write to standard output");
    }
    eprint!("{}", statistics(&generated.summary, &engine.config));
    Ok(ExitCode::SUCCESS)
}

fn statistics(summary: &Summary, config: &ModelConfig) -> String {
    let decode = summary
        .decode_tokens_per_second()
        .map(|speed| format!(", {speed:.1} tokens/s"))
        .unwrap_or_default();
    let finish = match summary.finish {
        Finish::EndOfText => "the model ended the text",
        Finish::StopString(_) => "stop text",
        Finish::MaxNewTokens => "--max-new-tokens reached",
        Finish::ContextFull => "the context (max_position_embeddings) is full",
        Finish::Cancelled => "nobody reads the output",
    };
    format!(
        "prompt: {} tokens, {:.1} tokens/s\nnew:    {} tokens{decode}\nend:    {finish}\ncache:  {} bytes per token\n",
        summary.prompt_tokens,
        summary.prefill_tokens_per_second(),
        summary.new_tokens,
        cache_bytes_per_token(config),
    )
}

/// Latents and shared keys of all layers, in single precision.
pub(crate) fn cache_bytes_per_token(config: &ModelConfig) -> usize {
    config.num_hidden_layers * config.cache_width() * size_of::<f32>()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use deepburn_infer::speculation::Drafts;

    use super::*;

    #[test]
    fn statistics_tell_speeds_and_the_reason_of_the_end() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let fixture = root.join("tests/fixtures/tiny-yarn");
        let config = deepburn_model::checkpoint::read_config(&fixture).unwrap();
        let mut summary = Summary {
            finish: Finish::MaxNewTokens,
            prompt_tokens: 10,
            reused_tokens: 0,
            new_tokens: 5,
            waited: Duration::ZERO,
            prefill: Duration::from_millis(500),
            decode: Duration::from_secs(8),
            drafts: Drafts::default(),
        };
        assert_eq!(
            statistics(&summary, &config),
            "prompt: 10 tokens, 20.0 tokens/s\n\
             new:    5 tokens, 0.5 tokens/s\n\
             end:    --max-new-tokens reached\n\
             cache:  384 bytes per token\n"
        );
        summary.new_tokens = 1;
        assert!(statistics(&summary, &config).contains("new:    1 tokens\n"));
    }
}
