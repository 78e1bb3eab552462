//! What `chat` and `serve` share: a model, ready to answer many requests.

use deepburn_infer::{
    chat_template::{self, ChatTemplate},
    service::{Service, ServiceConfig},
};

use crate::{
    generate::{SpeculationSpec, positive},
    model_dir::{self, ModelChoice},
};

/// Where the model is and how it computes.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    pub(crate) model: ModelChoice,

    /// Draft tokens with the model's prediction modules: off, so many per step, or auto, as many as there are modules
    /// while that is measured to be faster
    #[arg(long, value_name = "off|auto|K", default_value = "off")]
    speculate: SpeculationSpec,

    /// Hold the latents of at most this many tokens, of all texts and of prompts kept for reuse together
    #[arg(long, value_name = "N", default_value_t = ServiceConfig::default().cached_tokens, value_parser = positive)]
    cached_tokens: usize,
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
        let dir = model_dir::resolve(&self.model.dir)?;
        // Before the weights, which take longer.
        let template = ChatTemplate::read(&dir)?;
        let add_bos = chat_template::adds_bos_token(&dir)?;
        let engine = self.model.open_at(&dir)?;
        let bos = engine.bos();
        let config = ServiceConfig {
            cached_tokens: self.cached_tokens,
            speculate: self.speculate.for_model(&engine.config)?,
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
