//! What `chat` and `serve` share: a model, ready to answer many requests.

use std::{path::PathBuf, str::FromStr};

use deepburn_infer::{
    chat_template::{self, ChatTemplate},
    engine::Engine,
    service::{Service, ServiceConfig},
    speculation::Speculation,
};

use crate::{device::DeviceSpec, model_dir};

/// Where the model is and how it computes.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// Folder of a Hugging Face checkpoint, or of a training run (its newest checkpoint)
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,

    /// Where to compute: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceSpec,

    /// Draft tokens with the model's prediction modules: off, a number of tokens per step, or auto, which measures
    /// whether it pays
    #[arg(long, value_name = "off|auto|K", default_value = "off")]
    speculate: SpeculateArg,

    /// Hold the latents of at most this many tokens, of all texts and of prompts kept for reuse together
    #[arg(long, value_name = "N", default_value_t = ServiceConfig::default().cached_tokens)]
    cached_tokens: usize,
}

/// `--speculate` as it is written.
#[derive(Clone, Copy, Debug, PartialEq)]
struct SpeculateArg(Speculation);

impl FromStr for SpeculateArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("off", _) => Ok(Self(Speculation::Off)),
            ("auto", _) => Ok(Self(Speculation::Auto)),
            (_, Ok(depth)) if depth > 0 => Ok(Self(Speculation::Depth(depth))),
            _ => Err(format!(
                "must be off, auto or a number above 0; found {text:?}"
            )),
        }
    }
}

/// A model that answers.
pub(crate) struct Model {
    pub(crate) service: Service,
    pub(crate) template: Option<ChatTemplate>,
    /// Whether its tokenizer puts the beginning-of-text token before a text.
    pub(crate) add_bos: bool,
    pub(crate) bos: Option<u32>,
}

impl ModelArgs {
    /// Opens the model and starts its service, with `config` for what these arguments leave open.
    ///
    /// # Errors
    /// A model that cannot be read or used.
    pub(crate) fn open(&self, config: ServiceConfig) -> anyhow::Result<Model> {
        let dir = model_dir::resolve(&self.model)?;
        let device = self.device.open()?;
        // Before the weights, which take longer.
        let template = ChatTemplate::read(&dir)?;
        let add_bos = chat_template::adds_bos_token(&dir)?;
        let engine = Engine::open(&dir, &device)?;
        let bos = engine.bos();
        let config = ServiceConfig {
            cached_tokens: self.cached_tokens,
            speculate: self.speculate.0,
            ..config
        };
        Ok(Model {
            service: Service::start(engine, config),
            template,
            add_bos,
            bos,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speculation_is_off_auto_or_a_depth() {
        let parsed = |text: &str| text.parse::<SpeculateArg>().map(|argument| argument.0);
        assert_eq!(parsed("off"), Ok(Speculation::Off));
        assert_eq!(parsed("auto"), Ok(Speculation::Auto));
        assert_eq!(parsed("2"), Ok(Speculation::Depth(2)));
        for text in ["", "0", "-1", "on"] {
            let message = format!("must be off, auto or a number above 0; found {text:?}");
            assert_eq!(parsed(text), Err(message));
        }
    }
}
