//! `deepburn generate`: continues a text, or many.

use std::{fs, io, ops::ControlFlow, path::PathBuf, process::ExitCode, str::FromStr};

use anyhow::Context;
use clap::{CommandFactory, builder::NonEmptyStringValueParser, error::ErrorKind};
use deepburn_infer::{
    batch::{self, BatchConfig, Request},
    engine::{Finish, GenerateOptions, Summary},
    grammar::Grammar,
    penalties::Penalties,
    sampler::SamplerConfig,
    speculation::Speculation,
};
use deepburn_model::config::ModelConfig;

use crate::{generate_many, model_dir::ModelChoice, print_now};

/// Continue a text, or many, with a model.
///
/// The new text goes to standard output as it is generated, without the prompt; statistics go to standard error.
/// The same model, prompt, options and seed give the same text.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelChoice,

    #[command(flatten)]
    input: Input,

    /// Where the texts of --batch go, a JSON object per line in the order of the prompts
    #[arg(long, value_name = "OUT.jsonl", requires = "batch")]
    output: Option<PathBuf>,

    /// Texts of --batch that are continued together
    #[arg(long, value_name = "N", default_value_t = 8, requires = "batch", value_parser = positive)]
    max_batch: usize,

    /// Tokens whose latents are held for all texts together; texts wait for room. For one text: the whole context
    #[arg(long, value_name = "N", requires = "batch", value_parser = positive)]
    cached_tokens: Option<usize>,

    /// Draft tokens with the model's prediction modules: off, so many per step, or auto, as many as there are modules
    /// while that is measured to be faster. What is drafted changes no greedy text and no distribution
    #[arg(long, value_name = "off|auto|K", default_value = "off")]
    speculate: SpeculationSpec,

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

    #[command(flatten)]
    penalties: PenaltyArgs,

    /// Seed of the random choices; text n of --batch, from 0, has this plus n
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

    /// Keep to JSON: an object
    #[arg(long)]
    json: bool,

    /// Keep to JSON that the schema in this file describes
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    json_schema: Option<PathBuf>,

    /// Put the beginning-of-text token before the prompt
    #[arg(long)]
    bos: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// Text to continue; `-` reads standard input, "" starts from the beginning-of-text token
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,

    /// File whose text is continued
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// File of prompts to continue together: a JSON object per line with `prompt`, and as one likes `id`,
    /// `max_new_tokens`, `temperature` and `seed`
    #[arg(long, value_name = "IN.jsonl", requires = "output")]
    batch: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct PenaltyArgs {
    /// Divide positive logits of tokens that were there already by P, multiply negative ones
    #[arg(
        long,
        value_name = "P",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    repetition_penalty: f32,

    /// Subtract P from a token's logit for each time it is in the new text
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    frequency_penalty: f32,

    /// Subtract P from the logits of tokens in the new text
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    presence_penalty: f32,

    /// Add B to the logit of a token; may be given several times
    #[arg(long, value_name = "TOKEN=B", value_parser = bias, allow_hyphen_values = true)]
    logit_bias: Vec<(u32, f32)>,
}

/// The value of `--speculate`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpeculationSpec(pub(crate) Speculation);

impl FromStr for SpeculationSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self(Speculation::Off)),
            "auto" => Ok(Self(Speculation::Auto)),
            _ => match text.parse() {
                Ok(depth @ 1..=64) => Ok(Self(Speculation::Depth(depth))),
                _ => Err(format!("must be off, auto or 1 to 64; found {text:?}")),
            },
        }
    }
}

impl SpeculationSpec {
    /// What was asked for, if the model can do it.
    pub(crate) fn for_model(self, config: &ModelConfig) -> anyhow::Result<Speculation> {
        if matches!(self.0, Speculation::Depth(_)) && config.num_nextn_predict_layers == 0 {
            anyhow::bail!(
                "--speculate: this model has no prediction modules (num_nextn_predict_layers = 0)"
            );
        }
        Ok(self.0)
    }
}

/// A number from 1.
pub(crate) fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("must be a whole number from 1".into()),
        Ok(number) => Ok(number),
    }
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text
        .split_once('=')
        .and_then(|(token, bias)| Some((token.trim().parse().ok()?, bias.trim().parse().ok()?)));
    parsed.ok_or_else(|| format!("must be TOKEN=B, such as 13=-2.5; found {text:?}"))
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
            penalties: Penalties {
                repetition: self.penalties.repetition_penalty,
                frequency: self.penalties.frequency_penalty,
                presence: self.penalties.presence_penalty,
                bias: self.penalties.logit_bias.iter().copied().collect(),
            },
            max_new_tokens: self.max_new_tokens,
            stop: self.stop.clone(),
            add_bos: self.bos,
            ignore_eos: self.ignore_eos,
            guide: None,
        }
    }
}

/// The grammar that was asked for.
fn grammar(args: &Args) -> anyhow::Result<Option<Grammar>> {
    let Some(file) = &args.json_schema else {
        return Ok(args.json.then_some(Grammar::JsonObject));
    };
    let name = || file.display().to_string();
    let text = fs::read_to_string(file).with_context(name)?;
    let schema = serde_json::from_str(&text).with_context(name)?;
    Ok(Some(Grammar::JsonSchema(schema)))
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut options = args.options();
    if let Err(error) = options.validate() {
        crate::Cli::command()
            .error(ErrorKind::ValueValidation, error)
            .exit();
    }
    let prompt = match (&args.input.prompt, &args.input.file) {
        (Some(text), _) if text == "-" => {
            io::read_to_string(io::stdin()).context("cannot read the prompt from standard input")?
        }
        (Some(text), _) => text.clone(),
        (None, Some(file)) => {
            fs::read_to_string(file).with_context(|| file.display().to_string())?
        }
        (None, None) => String::new(),
    };
    let prompts = args.input.batch.as_deref();
    let prompts = prompts.map(generate_many::read).transpose()?;
    let grammar = grammar(&args)?;
    let engine = args.model.open()?;
    if let Some(grammar) = grammar {
        let guide = engine.grammars().and_then(|all| all.guide(&grammar));
        let option = args.json_schema.as_ref();
        options.guide = Some(guide.with_context(|| match option {
            Some(file) => file.display().to_string(),
            None => "--json".to_owned(),
        })?);
    }
    let mut config = BatchConfig {
        speculate: args.speculate.for_model(&engine.config)?,
        ..BatchConfig::default()
    };
    if let (Some(prompts), Some(output)) = (prompts, &args.output) {
        config.max_batch = args.max_batch;
        config.cached_tokens = args.cached_tokens.unwrap_or(config.cached_tokens);
        generate_many::run(&engine, config, (&prompts, &options), output)?;
        return Ok(ExitCode::SUCCESS);
    }

    config.max_batch = 1;
    config.cached_tokens = engine.config.max_position_embeddings;
    let request = Request {
        prompt: engine.encode(&prompt, options.add_bos)?,
        options,
        logprobs: None,
    };
    let mut failure = None;
    let generated = batch::generate(&engine, config, request, &mut |text| {
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
    if config.speculate == Speculation::Auto {
        eprintln!("auto:   {}", generated.speculation);
    }
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
    let drafts = summary
        .drafts
        .acceptance()
        .zip(summary.drafts.tokens_per_step());
    let drafts = drafts.map_or(String::new(), |(acceptance, tokens)| {
        format!(
            "drafts: {} of {} accepted ({:.1}%), {tokens:.2} tokens per step\n",
            summary.drafts.accepted,
            summary.drafts.drafted,
            100.0 * acceptance
        )
    });
    format!(
        "prompt: {} tokens, {:.1} tokens/s\nnew:    {} tokens{decode}\n{drafts}end:    {finish}\ncache:  {} bytes per token\n",
        summary.prompt_tokens,
        summary.prefill_tokens_per_second(),
        summary.new_tokens,
        config.cache_bytes_per_token(),
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use deepburn_infer::speculation::Drafts;

    use super::*;

    #[test]
    fn statistics_tell_speeds_drafts_and_the_reason_of_the_end() {
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
        summary.drafts = Drafts {
            steps: 2,
            tokens: 4,
            drafted: 3,
            accepted: 2,
        };
        let drafts = "drafts: 2 of 3 accepted (66.7%), 2.00 tokens per step\n";
        assert!(statistics(&summary, &config).contains(drafts));
        summary.new_tokens = 1;
        assert!(statistics(&summary, &config).contains("new:    1 tokens\n"));
    }

    #[test]
    fn values_are_read_or_refused_with_what_they_must_be() {
        let speculation = |text: &str| text.parse::<SpeculationSpec>().map(|spec| spec.0);
        assert_eq!(speculation("off"), Ok(Speculation::Off));
        assert_eq!(speculation("auto"), Ok(Speculation::Auto));
        assert_eq!(speculation("3"), Ok(Speculation::Depth(3)));
        let message = "must be off, auto or 1 to 64; found \"0\"".to_string();
        assert_eq!(speculation("0"), Err(message));
        assert_eq!(bias("13=-2.5"), Ok((13, -2.5)));
        assert_eq!(bias("13=-inf"), Ok((13, f32::NEG_INFINITY)));
        assert!(bias("a=1").is_err() && bias("13").is_err());
        assert_eq!((positive("1"), positive("0").is_err()), (Ok(1), true));
    }
}
