//! Whether a batch drafts tokens, and how many.

use super::Batch;
use crate::{
    engine::EngineError,
    payoff::Payoff,
    speculation::{Speculation, SpeculationState},
};

/// What is done about drafting.
#[derive(Clone, Copy, Debug)]
pub(super) enum Drafting {
    Off,
    NoModules,
    Fixed(usize),
    Measured(usize, Payoff),
}

impl Drafting {
    /// What was asked for, as far as a model with so many prediction modules can do it.
    pub(super) fn new(speculate: Speculation, modules: usize) -> Self {
        match speculate {
            Speculation::Off | Speculation::Depth(0) => Self::Off,
            _ if modules == 0 => Self::NoModules,
            Speculation::Depth(depth) => Self::Fixed(depth),
            Speculation::Auto => Self::Measured(modules, Payoff::default()),
        }
    }
}

impl Batch<'_> {
    /// Whether tokens are drafted.
    pub fn speculation(&self) -> SpeculationState {
        match self.drafting {
            Drafting::Off => SpeculationState::Off,
            Drafting::NoModules => SpeculationState::NoModules,
            Drafting::Fixed(depth) => SpeculationState::On { depth },
            Drafting::Measured(_, payoff) => match payoff.result() {
                None => SpeculationState::Measuring,
                Some(measured) => SpeculationState::Measured {
                    kept: measured.pays(),
                    with: measured.with,
                    without: measured.without,
                },
            },
        }
    }

    /// Prediction modules that are kept up to date.
    pub(super) fn modules(&self) -> usize {
        let modules = self.engine.model.mtp.len();
        match self.drafting {
            Drafting::Off | Drafting::NoModules => 0,
            Drafting::Fixed(depth) => depth.min(modules),
            Drafting::Measured(depth, payoff) => match payoff.result() {
                Some(measured) if !measured.pays() => 0,
                _ => depth.min(modules),
            },
        }
    }

    /// Drafts for the next step; whether it did.
    pub(super) fn draft_next(&mut self) -> Result<bool, EngineError> {
        let depth = match self.drafting {
            Drafting::Fixed(depth) => depth,
            Drafting::Measured(depth, payoff) if payoff.drafts() => depth,
            _ => return Ok(false),
        };
        let mut room = Vec::new();
        for index in 0..self.running.len() {
            let sequence = &self.running[index];
            let wanted = match sequence.is_decoding() {
                true => sequence.room_for_drafts().min(depth),
                false => 0,
            };
            // Drafts are worth no other text's room.
            let positions = sequence.tokens.len() + wanted;
            let has_room = wanted > 0 && self.reserve(index, positions);
            room.push(if has_room { wanted } else { 0 });
        }
        self.draft(depth, &room)?;
        Ok(room.iter().any(|&drafts| drafts > 0))
    }

    /// Adds a step of decoding to what decides about drafting; forgets what the modules have read if it does not pay.
    pub(super) fn measure(&mut self, drafted: Option<bool>, seconds: f64, tokens: u64) {
        let Drafting::Measured(_, payoff) = &mut self.drafting else {
            return;
        };
        let open = payoff.result().is_none();
        payoff.record(drafted, seconds, tokens);
        let given_up = payoff.result().is_some_and(|measured| !measured.pays());
        if open && given_up {
            self.pages.forget_all();
            for sequence in &mut self.running {
                sequence.forget_ahead();
            }
        }
    }
}
