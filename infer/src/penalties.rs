//! Changes to the logits before a token is chosen: bias, and penalties for tokens that were there already.

use std::collections::{BTreeMap, HashMap};

use crate::sampler::SamplerError;

/// What is added to logits or taken from them. The default changes nothing.
///
/// In this order: the bias is added; `repetition` divides positive logits of tokens in the prompt or the new text and
/// multiplies negative ones (Keskar et al., 2019, as in transformers); of tokens in the new text, `frequency` times their
/// count and `presence` once are subtracted (as in OpenAI's interface).
#[derive(Clone, Debug, PartialEq)]
pub struct Penalties {
    /// 1 changes nothing, more discourages repetition.
    pub repetition: f32,
    /// Per occurrence in the new text.
    pub frequency: f32,
    /// For at least one occurrence in the new text.
    pub presence: f32,
    /// Added to the logits of these tokens; -inf rules a token out.
    pub bias: BTreeMap<u32, f32>,
}

impl Default for Penalties {
    fn default() -> Self {
        Self {
            repetition: 1.0,
            frequency: 0.0,
            presence: 0.0,
            bias: BTreeMap::new(),
        }
    }
}

impl Penalties {
    /// Whether all logits stay as they are.
    pub fn is_neutral(&self) -> bool {
        *self == Self::default()
    }

    /// Checks every field against its rule.
    ///
    /// # Errors
    /// The first field that breaks its rule.
    pub fn validate(&self) -> Result<(), SamplerError> {
        let refuse = |field, value: f32, rule| {
            let value = value.to_string();
            Err(SamplerError::Config { field, value, rule })
        };
        if !(self.repetition.is_finite() && self.repetition > 0.0) {
            let rule = "must be finite and above 0";
            return refuse("repetition_penalty", self.repetition, rule);
        }
        for (field, value) in [
            ("frequency_penalty", self.frequency),
            ("presence_penalty", self.presence),
        ] {
            if !value.is_finite() {
                return refuse(field, value, "must be finite");
            }
        }
        let wrong = |bias: &&f32| bias.is_nan() || **bias == f32::INFINITY;
        match self.bias.values().find(wrong) {
            Some(&bias) => refuse("logit_bias", bias, "must be a number or -inf"),
            None => Ok(()),
        }
    }

    /// Changes the logits of one step.
    ///
    /// # Shapes
    /// - `logits`: `[W]`; tokens of `seen` and of the bias from W on are passed over
    pub fn apply(&self, logits: &mut [f32], seen: &Seen) {
        for (&token, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for (&token, counts) in &seen.counts {
            let Some(logit) = logits.get_mut(token as usize) else {
                continue;
            };
            *logit = match *logit {
                positive if positive > 0.0 => positive / self.repetition,
                negative => negative * self.repetition,
            };
            if counts.new > 0 {
                *logit -= self.frequency * counts.new as f32 + self.presence;
            }
        }
    }
}

/// Which tokens a sequence has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    counts: HashMap<u32, Counts>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    new: u32,
}

impl Seen {
    /// The tokens of a prompt.
    pub fn of_prompt(prompt: &[u32]) -> Self {
        let counts = prompt.iter().map(|&token| (token, Counts::default()));
        Self {
            counts: counts.collect(),
        }
    }

    /// Adds a new token.
    pub fn push(&mut self, token: u32) {
        self.counts.entry(token).or_default().new += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition, token by token of the vocabulary.
    fn definition(penalties: &Penalties, logits: &[f32], prompt: &[u32], new: &[u32]) -> Vec<f32> {
        let at = |token: usize| {
            let is = |t: &&u32| **t as usize == token;
            let mut logit = logits[token];
            logit += penalties.bias.get(&(token as u32)).unwrap_or(&0.0);
            if prompt.iter().chain(new).any(|t| is(&t)) {
                logit = if logit > 0.0 {
                    logit / penalties.repetition
                } else {
                    logit * penalties.repetition
                };
            }
            match new.iter().filter(is).count() {
                0 => logit,
                n => logit - (penalties.frequency * n as f32 + penalties.presence),
            }
        };
        (0..logits.len()).map(at).collect()
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            logits in proptest::collection::vec(-5.0_f32..5.0, 1..20),
            prompt in proptest::collection::vec(0_u32..25, 0..20),
            new in proptest::collection::vec(0_u32..25, 0..20),
            (repetition, frequency, presence) in (0.5_f32..2.0, -2.0_f32..2.0, -2.0_f32..2.0),
            bias in proptest::collection::btree_map(0_u32..25, -9.0_f32..9.0, 0..5),
        ) {
            let penalties = Penalties { repetition, frequency, presence, bias };
            penalties.validate().unwrap();
            let mut seen = Seen::of_prompt(&prompt);
            new.iter().for_each(|&token| seen.push(token));
            let mut found = logits.clone();
            penalties.apply(&mut found, &seen);
            prop_assert_eq!(found, definition(&penalties, &logits, &prompt, &new));
        }
    }

    #[test]
    fn the_default_changes_nothing_and_minus_infinity_rules_out() {
        let mut seen = Seen::of_prompt(&[0, 1]);
        seen.push(1);
        let logits = [1.0, -2.0, 0.5, f32::NEG_INFINITY];
        let mut found = logits;
        assert!(Penalties::default().is_neutral());
        Penalties::default().apply(&mut found, &seen);
        assert_eq!(found, logits);
        let banned = Penalties {
            bias: BTreeMap::from([(0, f32::NEG_INFINITY)]),
            ..Penalties::default()
        };
        assert!(!banned.is_neutral());
        banned.validate().unwrap();
        banned.apply(&mut found, &seen);
        assert_eq!(found[0], f32::NEG_INFINITY);
    }

    #[test]
    fn validation_names_the_field_the_value_and_the_rule() {
        let refused = |penalties: Penalties| penalties.validate().unwrap_err().to_string();
        let default = Penalties::default;
        for (penalties, field) in [
            (
                Penalties {
                    repetition: 0.0,
                    ..default()
                },
                "`repetition_penalty` is 0",
            ),
            (
                Penalties {
                    frequency: f32::NAN,
                    ..default()
                },
                "`frequency_penalty` is NaN",
            ),
            (
                Penalties {
                    presence: f32::INFINITY,
                    ..default()
                },
                "`presence_penalty` is inf",
            ),
            (
                Penalties {
                    bias: BTreeMap::from([(3, f32::NAN)]),
                    ..default()
                },
                "`logit_bias` is NaN",
            ),
        ] {
            let message = refused(penalties);
            assert!(message.contains(field), "{message}");
        }
    }
}
