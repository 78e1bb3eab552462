//! How far work has come that is counted: a bar on a terminal, a line every few seconds elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{HumanCount, ProgressBar, ProgressStyle};

/// Without a terminal, one line in so many seconds.
const INTERVAL: Duration = Duration::from_secs(5);

/// Shows on standard error how much of something is done.
pub(crate) struct Counting {
    what: &'static str,
    total: u64,
    bar: Option<ProgressBar>,
    printed: Instant,
}

impl Counting {
    /// Begins to count `total` of `what`.
    pub(crate) fn new(what: &'static str, total: usize) -> Self {
        let total = total as u64;
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total)
                .with_style(style())
                .with_message(what);
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self {
            what,
            total,
            bar,
            printed: Instant::now(),
        }
    }

    /// So much is done; `note` says more.
    pub(crate) fn set(&mut self, done: usize, note: impl FnOnce() -> String) {
        let done = done as u64;
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_prefix(note());
        } else if self.printed.elapsed() >= INTERVAL {
            self.printed = Instant::now();
            let (done, total) = (HumanCount(done), HumanCount(self.total));
            eprintln!("{}: {done} of {total} {}", self.what, note());
        }
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style() -> ProgressStyle {
    let template = "{msg} {wide_bar} {human_pos}/{human_len} {prefix} {eta:>4}";
    ProgressStyle::with_template(template).expect("the template is valid")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_template_is_valid() {
        super::style();
    }
}
