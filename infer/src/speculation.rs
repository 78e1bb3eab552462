//! Speculative decoding with the multi-token prediction modules (report section 5.4.3).

use std::fmt;

/// Whether tokens are drafted ahead of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speculation {
    /// One token per step.
    #[default]
    Off,
    /// So many drafted tokens per step.
    Depth(usize),
    /// As many as the model has modules, as long as that is measured to be faster than one token per step.
    Auto,
}

/// What became of drafted tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drafts {
    /// Steps of the model after the prompt.
    pub steps: u64,
    /// Tokens that came out of these steps.
    pub tokens: u64,
    /// Tokens that were drafted.
    pub drafted: u64,
    /// Those of them that the model agreed with.
    pub accepted: u64,
}

impl Drafts {
    /// Accepted of drafted tokens; `None` if none was drafted.
    pub fn acceptance(&self) -> Option<f64> {
        (self.drafted > 0).then(|| self.accepted as f64 / self.drafted as f64)
    }

    /// New tokens per step of the model; `None` if there was no step.
    pub fn tokens_per_step(&self) -> Option<f64> {
        (self.steps > 0).then(|| self.tokens as f64 / self.steps as f64)
    }
}

/// Whether tokens are drafted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum SpeculationState {
    /// It was not asked for.
    #[default]
    Off,
    /// The model has no prediction modules.
    NoModules,
    /// So many tokens per step.
    On {
        /// Drafted tokens per step.
        depth: usize,
    },
    /// It is being measured whether it pays.
    Measuring,
    /// Measured, in seconds per new token.
    Measured {
        /// Whether it goes on.
        kept: bool,
        /// With drafts.
        with: f64,
        /// Without.
        without: f64,
    },
}

impl fmt::Display for SpeculationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::NoModules => f.write_str("off: the model has no prediction modules"),
            Self::On { depth } => write!(f, "{depth} tokens per step"),
            Self::Measuring => f.write_str("being measured"),
            Self::Measured {
                kept,
                with,
                without,
            } => write!(
                f,
                "{}: {:.1} ms per token with, {:.1} without",
                if *kept { "on" } else { "off" },
                with * 1e3,
                without * 1e3
            ),
        }
    }
}

impl std::ops::AddAssign for Drafts {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.tokens += other.tokens;
        self.drafted += other.drafted;
        self.accepted += other.accepted;
    }
}
