//! One answer: streamed to standard output, ended by the model, by a limit or by Ctrl-C.

use std::{
    future::poll_fn,
    io::{self, IsTerminal},
    ops::ControlFlow,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
};

use anyhow::{Context, bail};
use deepburn_infer::{
    chat_template::{ChatTemplate, Message, Role},
    engine::{Finish, Summary},
    service::{Event, Request, Service, Ticket},
};
use serde_json::Map;
use tokio::{runtime::Builder, sync::Notify};

use super::session::Session;
use crate::{INTERRUPTED, print_now};

/// What became of a message.
pub(super) enum Told {
    /// There is an answer, whole or in part, and this to say about it.
    Answered(String),
    /// Standard output was closed.
    NobodyReads,
}

/// Ctrl-C, which ends an answer if there is one and otherwise the process.
pub(super) struct Interrupts {
    answering: Arc<AtomicBool>,
    asked: Arc<Notify>,
}

impl Interrupts {
    /// Takes over Ctrl-C.
    pub(super) fn listen() -> anyhow::Result<Self> {
        let interrupts = Self {
            answering: Arc::default(),
            asked: Arc::default(),
        };
        let (answering, asked) = (
            Arc::clone(&interrupts.answering),
            Arc::clone(&interrupts.asked),
        );
        ctrlc::set_handler(move || {
            // The second one ends the process even if the answer does not end.
            if !answering.swap(false, Ordering::Relaxed) {
                std::process::exit(i32::from(INTERRUPTED));
            }
            asked.notify_waiters();
        })
        .context("cannot listen for Ctrl-C")?;
        Ok(interrupts)
    }
}

/// How an answer ended.
enum End {
    Finished(Summary),
    Interrupted,
    NobodyReads,
}

/// Says `text` to the model and shows its answer. Both become part of the conversation, unless there is no answer.
///
/// # Errors
/// A conversation that the model cannot take, or a failure on the way.
pub(super) fn tell(
    service: &Service,
    template: &ChatTemplate,
    session: &mut Session,
    text: String,
    interrupts: &Interrupts,
) -> anyhow::Result<Told> {
    session.messages.push(Message::new(Role::User, text));
    let mut shown = String::new();
    let end = ask(service, template, session)
        .and_then(|mut ticket| receive(&mut ticket, &mut shown, interrupts));
    if shown.is_empty() && !matches!(end, Ok(End::Finished(_))) {
        session.messages.pop();
    } else {
        session.messages.push(Message::new(Role::Assistant, &shown));
    }
    let statistics = match end? {
        End::Finished(summary) => statistics(&summary),
        End::Interrupted => "interrupted".to_owned(),
        End::NobodyReads => return Ok(Told::NobodyReads),
    };
    match print_now("\n").context("cannot write to standard output")? {
        ControlFlow::Continue(()) => Ok(Told::Answered(statistics)),
        ControlFlow::Break(()) => Ok(Told::NobodyReads),
    }
}

fn ask(
    service: &Service,
    template: &ChatTemplate,
    session: &mut Session,
) -> anyhow::Result<Ticket> {
    let prompt = template.render(&session.all(), true, &Map::new())?;
    let encoding = service.tokenizer().encode(prompt.as_str(), false);
    let Ok(encoding) = encoding else {
        bail!("the tokenizer cannot encode the prompt");
    };
    let request = Request {
        prompt: encoding.get_ids().to_vec(),
        options: session.next_options(),
        logprobs: None,
    };
    Ok(service.submit(request)?)
}

fn receive(
    ticket: &mut Ticket,
    shown: &mut String,
    interrupts: &Interrupts,
) -> anyhow::Result<End> {
    let runtime = Builder::new_current_thread()
        .build()
        .context("cannot wait for the answer")?;
    let terminal = io::stdout().is_terminal();
    // Before anybody can ask: only those that wait already are told.
    let mut interrupted = pin!(interrupts.asked.notified());
    interrupts.answering.store(true, Ordering::Relaxed);
    let end = runtime.block_on(async {
        loop {
            let next = poll_fn(|context| match interrupted.as_mut().poll(context) {
                Poll::Ready(()) => Poll::Ready(None),
                Poll::Pending => ticket.poll_next(context).map(Some),
            });
            let Some(event) = next.await else {
                return Ok(End::Interrupted);
            };
            let text = match event {
                Some(Event::Piece { text, .. }) => text,
                Some(Event::Finished(summary)) => return Ok(End::Finished(summary)),
                Some(Event::Failed(error)) => return Err(error.into()),
                None => bail!("the engine has stopped"),
            };
            *shown += &text;
            let text = if terminal { printable(&text) } else { text };
            if print_now(&text)
                .context("cannot write to standard output")?
                .is_break()
            {
                return Ok(End::NobodyReads);
            }
        }
    });
    interrupts.answering.store(false, Ordering::Relaxed);
    end
}

/// Without the characters that would steer a terminal.
fn printable(text: &str) -> String {
    let harmless = |c: &char| !c.is_control() || matches!(c, '\n' | '\t');
    text.chars().filter(harmless).collect()
}

fn statistics(summary: &Summary) -> String {
    let speed = summary.decode_tokens_per_second();
    let speed = speed.map(|speed| format!(", {speed:.1} tokens/s"));
    let accepted = summary.drafts.acceptance();
    let accepted =
        accepted.map(|share| format!(", {:.0} % of drafted tokens accepted", 100.0 * share));
    let end = match summary.finish {
        Finish::EndOfText | Finish::StopString(_) => "",
        Finish::MaxNewTokens => "; ended at max_new_tokens",
        Finish::ContextFull => "; ended as the context is full: /reset begins a new one",
        Finish::Cancelled => "; cancelled",
    };
    format!(
        "[{} tokens{}, first after {:.2} s; prompt {} tokens, {} of them kept from before{}{end}]",
        summary.new_tokens,
        speed.unwrap_or_default(),
        (summary.waited + summary.prefill).as_secs_f64(),
        summary.prompt_tokens,
        summary.reused_tokens,
        accepted.unwrap_or_default(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_is_shown() {
        assert_eq!(printable("a\x1b[2J\tb\r\n\u{9b}1m漢\0"), "a[2J\tb\n1m漢");
    }
}
