//! Ctrl-C and SIGTERM: the first asks for an end, a second one later ends the process.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use anyhow::Context;

use crate::INTERRUPTED;

/// Signals this soon after the first are the same one: some programs send it to a process and again to its group.
const SAME: Duration = Duration::from_secs(1);

/// Calls `ask` at the first signal.
///
/// # Errors
/// If the system does not let this process listen.
pub(crate) fn at_first_signal(ask: impl Fn() + Send + 'static) -> anyhow::Result<()> {
    let first: OnceLock<Instant> = OnceLock::new();
    let heard = move || match first.get() {
        Some(first) if first.elapsed() > SAME => std::process::exit(i32::from(INTERRUPTED)),
        Some(_) => {}
        None => {
            first.get_or_init(Instant::now);
            ask();
        }
    };
    ctrlc::set_handler(heard).context("cannot listen for Ctrl-C")
}
