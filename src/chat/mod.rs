//! `deepburn chat`: a conversation in the terminal, or line by line through a pipe.

mod answer;
mod command;
mod input;
mod session;

use std::{io::IsTerminal, process::ExitCode};

use anyhow::{Context, bail};
use clap::{CommandFactory, error::ErrorKind};
use deepburn_infer::service::ServiceConfig;

use self::{
    answer::{Interrupts, Told},
    command::{Command, Line},
    input::{Input, Read},
    session::Session,
};
use crate::{model_service::ModelArgs, print_now};

const HELP: &str = "\
/help                     this list
/reset                    forget the conversation, keep the system message
/system [TEXT]            set the system message and forget the conversation; without a text there is none
/set                      show the settings
/set NAME VALUE           temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens or seed; a dash
                          switches off those that can be
/save FILE                write the conversation, as JSON
/load FILE                go on with a conversation that was saved
/quit                     end, as Ctrl-D does
Ctrl-C ends an answer. A line that begins with // is said with one slash less.
";

/// Talk with a model.
///
/// Answers go to standard output as they are generated, all else to standard error. Without a terminal every line of
/// standard input is a message. /help lists the commands.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,

    /// What stands above the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Divides the logits: below 1 likely tokens become likelier; 0 always takes the likeliest
    #[arg(
        long,
        value_name = "T",
        default_value_t = 0.7,
        allow_negative_numbers = true
    )]
    temperature: f32,

    /// Choose among the fewest likeliest tokens whose probabilities add up to P
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,

    /// End an answer after this many tokens
    #[arg(long, value_name = "N", default_value_t = 2048)]
    max_new_tokens: usize,

    /// Seed of the random choices
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut session = Session::new(args.system.clone());
    let sampler = &mut session.options.sampler;
    sampler.temperature = args.temperature;
    sampler.top_p = args.top_p;
    sampler.seed = args.seed;
    session.options.max_new_tokens = args.max_new_tokens;
    if let Err(error) = session.options.validate() {
        crate::Cli::command()
            .error(ErrorKind::ValueValidation, error)
            .exit();
    }
    let model = args.model.open(ServiceConfig {
        max_batch: 1,
        ..ServiceConfig::default()
    })?;
    let Some(template) = &model.template else {
        bail!(
            "{}: the model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): \
             deepburn generate continues texts with it",
            args.model.model.dir.display()
        );
    };
    let interrupts = Interrupts::listen()?;
    let mut input = Input::new()?;
    if input.is_terminal() {
        eprintln!("/help lists the commands, Ctrl-C ends an answer, Ctrl-D the conversation");
    }
    loop {
        let line = match input.read()? {
            Read::Line(line) => line,
            Read::Nothing => continue,
            Read::End => break,
        };
        let text = match Line::parse(&line) {
            Ok(Line::Nothing) => continue,
            Ok(Line::Said(text)) => text,
            Ok(Line::Command(Command::Quit)) => break,
            Ok(Line::Command(command)) => {
                // What does not work ends no conversation.
                match obey(command, &mut session) {
                    Ok(reply) => eprint!("{reply}"),
                    Err(error) => eprintln!("error: {}", crate::with_causes(&error)),
                }
                continue;
            }
            Err(what) => {
                eprintln!("error: {what}");
                continue;
            }
        };
        let told = answer::tell(&model.service, template, &mut session, text, &interrupts);
        match told.context("cannot answer") {
            Ok(Told::Answered(statistics)) => eprintln!("{statistics}"),
            Ok(Told::NobodyReads) => break,
            Err(error) if std::io::stdin().is_terminal() => {
                eprintln!("error: {}", crate::with_causes(&error));
            }
            Err(error) => return Err(error),
        }
    }
    if input.is_terminal() {
        let _ = print_now("\n").context("cannot write to standard output")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Carries a command out; what there is to say about it.
fn obey(command: Command, session: &mut Session) -> anyhow::Result<String> {
    match command {
        Command::Help => Ok(HELP.to_owned()),
        Command::Reset => {
            session.reset();
            Ok("the conversation is forgotten\n".to_owned())
        }
        Command::System(text) => {
            session.system = text;
            session.reset();
            Ok("the conversation begins anew\n".to_owned())
        }
        Command::Save(path) => {
            session.save(&path)?;
            Ok(format!(
                "{}: {} messages\n",
                path.display(),
                session.messages.len()
            ))
        }
        Command::Load(path) => {
            session.load(&path)?;
            Ok(format!(
                "{}: {} messages\n",
                path.display(),
                session.messages.len()
            ))
        }
        Command::Settings => Ok(session.settings()),
        Command::Set { name, value } => {
            session.set(&name, &value)?;
            Ok(session.settings())
        }
        Command::Quit => Ok(String::new()),
    }
}
