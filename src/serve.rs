//! `deepburn serve`: an HTTP server with OpenAI's interface.

use std::{
    io::IsTerminal,
    net::{IpAddr, TcpListener},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use clap::builder::NonEmptyStringValueParser;
use deepburn_infer::{
    server::{self, ApiKey, Limits, Server, Settings},
    service::ServiceConfig,
};
use tokio::sync::watch;

use crate::{generate::positive, model_service::ModelArgs, print_now, signals::at_first_signal};

const API_KEY: &str = "DEEPBURN_API_KEY";

/// Serve a model over HTTP with OpenAI's interface, and a page to try it at /.
///
/// It ends on Ctrl-C or SIGTERM, after the answers under way; on the second one at once. One line per request goes to
/// standard error.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// The model's name for clients [default: the name of its folder]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    name: Option<String>,

    /// Address to listen at; 0.0.0.0 lets other machines in
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,

    /// Port to listen at; 0 takes any that is free
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    port: u16,

    /// Key that clients have to send [default: that of the environment variable DEEPBURN_API_KEY, if any]
    #[arg(long, value_name = "KEY", value_parser = NonEmptyStringValueParser::new())]
    api_key: Option<String>,

    /// Requests that may wait; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = ServiceConfig::default().max_waiting)]
    max_waiting: usize,

    /// Texts that are continued together
    #[arg(long, value_name = "N", default_value_t = ServiceConfig::default().max_batch, value_parser = positive)]
    max_batch: usize,

    /// Prompt tokens per step: more read prompts faster, fewer delay running texts less
    #[arg(long, value_name = "N", default_value_t = ServiceConfig::default().prefill_chunk, value_parser = positive)]
    prefill_chunk: usize,

    /// Refuse longer prompts, in tokens [default: what the model can take]
    #[arg(long, value_name = "N")]
    max_prompt_tokens: Option<usize>,

    /// Most new tokens that a request may ask for
    #[arg(long, value_name = "N", default_value_t = Limits::default().new_tokens, value_parser = positive)]
    max_new_tokens: usize,

    /// Most seconds that a request may take, waiting included
    #[arg(long, value_name = "N", default_value_t = Limits::default().time.as_secs())]
    max_seconds: u64,
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    // The port first: that it is taken should not show only after the weights were read.
    let listener = TcpListener::bind((args.host, args.port))
        .with_context(|| format!("cannot listen at {}:{}", args.host, args.port))?;
    let config = ServiceConfig {
        max_waiting: args.max_waiting,
        max_batch: args.max_batch,
        prefill_chunk: args.prefill_chunk,
        ..ServiceConfig::default()
    };
    let model = args.model.open(config)?;
    let key = args.api_key.or_else(|| std::env::var(API_KEY).ok());
    let chat = model.template.is_some();
    let settings = Settings {
        model: args.name.unwrap_or_else(|| name(&args.model.model.dir)),
        api_key: key
            .filter(|key| !key.is_empty())
            .map(|key| ApiKey::new(&key)),
        add_bos: model.add_bos,
        bos: model.bos,
        limits: Limits {
            prompt_tokens: args.max_prompt_tokens.unwrap_or(usize::MAX),
            new_tokens: args.max_new_tokens,
            time: Duration::from_secs(args.max_seconds),
            ..Limits::default()
        },
    };
    let address = listener.local_addr()?;
    let welcome = format!(
        "serving {} at http://{address} ({})\n",
        settings.model,
        if chat {
            "chat and completions"
        } else {
            "completions only: the model has no chat template"
        },
    );
    let stop = stop_on_ctrl_c()?;
    // Nobody has to read it.
    let _ = print_now(&welcome).context("cannot write to standard output")?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the server's threads")?;
    let server = Server::new(model.service, model.template, settings);
    runtime.block_on(server::serve(server, listener, stopped(stop)))?;
    Ok(ExitCode::SUCCESS)
}

/// The last part of a path, as it is written or as it leads somewhere (`.`).
fn name(dir: &Path) -> String {
    let whole = dir.canonicalize();
    let name = whole.as_deref().unwrap_or(dir).file_name();
    name.map_or_else(
        || "model".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// Becomes true at the first signal; a second ends the process.
fn stop_on_ctrl_c() -> anyhow::Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    at_first_signal(move || {
        eprintln!("stopping after the answers under way; once more to stop at once");
        sender.send_replace(true);
    })?;
    Ok(receiver)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // The sender lives in the signal handler, to the end of the process.
    let _ = stop.wait_for(|stop| *stop).await;
}
