//! How the preparation of data shows: a bar per stage on a terminal, a line every few seconds elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use deepburn_train::data::{PrepareEvent, PrepareReport, SplitReport};
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};

/// Without a terminal, one line per stage and then one in so many seconds.
const INTERVAL: Duration = Duration::from_secs(5);
/// More warnings than these hide everything else; all of them are counted, and listed in `prepared.json`.
const PROBLEMS_SHOWN: u64 = 20;

/// Renders the events of a preparation on standard error.
pub(crate) struct Progress {
    terminal: bool,
    stage: Option<Stage>,
    problems: u64,
}

struct Stage {
    name: &'static str,
    total: u64,
    done: u64,
    bar: ProgressBar,
    printed: Instant,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            stage: None,
            problems: 0,
        }
    }

    /// Shows one event.
    pub(crate) fn event(&mut self, event: PrepareEvent) {
        match event {
            PrepareEvent::Stage { name, total } => self.begin(name, total),
            PrepareEvent::Advance(n) => self.advance(n),
            PrepareEvent::Problem(problem) => {
                self.problems += 1;
                if self.problems <= PROBLEMS_SHOWN {
                    self.line(&format!("warning: {problem}"));
                }
            }
            PrepareEvent::Cached(folder) => {
                self.line(&format!("data: already prepared in {}", folder.display()));
            }
            PrepareEvent::Finished(report) => {
                self.end();
                let hidden = self.problems.saturating_sub(PROBLEMS_SHOWN);
                if hidden > 0 {
                    eprintln!("warning: {hidden} more problems, listed in prepared.json");
                }
                eprintln!("{}", summary(&report));
            }
        }
    }

    fn begin(&mut self, name: &'static str, total: u64) {
        self.end();
        let bar = if self.terminal {
            let bar = ProgressBar::new(total)
                .with_style(style(total))
                .with_message(name);
            // A stage of unknown length tells nothing in between: the clock shows that it is alive.
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        } else {
            eprintln!("{name}");
            ProgressBar::hidden()
        };
        let printed = Instant::now();
        self.stage = Some(Stage {
            name,
            total,
            done: 0,
            bar,
            printed,
        });
    }

    fn advance(&mut self, n: u64) {
        let Some(stage) = &mut self.stage else { return };
        stage.done += n;
        stage.bar.inc(n);
        if !self.terminal && stage.printed.elapsed() >= INTERVAL {
            stage.printed = Instant::now();
            let of = match stage.total {
                0 => String::new(),
                total => format!(" of {}", HumanBytes(total)),
            };
            eprintln!("{}: {}{of}", stage.name, HumanBytes(stage.done));
        }
    }

    fn end(&mut self) {
        if let Some(stage) = self.stage.take() {
            stage.bar.finish_and_clear();
        }
    }

    /// Prints above the bar, so that drawing it does not tear the line.
    fn line(&self, text: &str) {
        match &self.stage {
            Some(stage) if self.terminal => stage.bar.suspend(|| eprintln!("{text}")),
            _ => eprintln!("{text}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // An error ends a preparation without an event.
        self.end();
    }
}

fn style(total: u64) -> ProgressStyle {
    let template = match total {
        0 => "{msg:<18} {spinner} {elapsed}",
        _ => "{msg:<18} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta:>4}",
    };
    ProgressStyle::with_template(template).expect("both templates are valid")
}

/// One line on what was prepared.
fn summary(report: &PrepareReport) -> String {
    let split = |name: &str, split: &SplitReport| {
        format!(
            "{name} {} documents, {}, {} tokens",
            HumanCount(split.documents),
            HumanBytes(split.bytes),
            HumanCount(split.tokens),
        )
    };
    let mut line = format!(
        "data: {} files; {}; {}; vocabulary {}",
        HumanCount(report.files),
        split("training", &report.train),
        split("validation", &report.valid),
        HumanCount(report.vocab_size as u64),
    );
    for (count, what) in [
        (report.fim_documents, "rearranged for infilling"),
        (report.duplicates, "duplicates left out"),
        (
            report.oversized_files,
            "registry files above 1 MiB left out",
        ),
        (report.problem_count, "problems"),
    ] {
        if count > 0 {
            line += &format!("; {} {what}", HumanCount(count));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_is_valid() {
        style(0);
        style(1);
    }

    #[test]
    fn the_summary_names_what_was_left_out() {
        let split = SplitReport {
            documents: 1200,
            bytes: 2048,
            tokens: 700,
        };
        let mut report = PrepareReport {
            format_version: 1,
            deepburn_version: String::new(),
            seed: 0,
            tokenizer_sha256: String::new(),
            vocab_size: 8192,
            eos_id: 1,
            bos_id: None,
            files: 3,
            duplicates: 0,
            oversized_files: 0,
            fim_documents: 0,
            train: split,
            valid: SplitReport::default(),
            problem_count: 0,
            problems: Vec::new(),
        };
        assert_eq!(
            summary(&report),
            "data: 3 files; training 1,200 documents, 2.00 KiB, 700 tokens; \
             validation 0 documents, 0 B, 0 tokens; vocabulary 8,192"
        );
        report.problem_count = 2;
        assert!(summary(&report).ends_with("; 2 problems"));
    }
}
