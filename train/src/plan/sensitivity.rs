//! How much the prediction depends on what it assumes.

use deepburn_model::config::ModelConfig;
use serde::Serialize;

use super::{Plan, PlanConfig, Prediction};
use crate::config::ConfigError;

/// A prediction with one thing changed.
#[derive(Clone, Debug, Serialize)]
pub struct Variant {
    /// What is changed.
    pub name: &'static str,
    /// As `--set` has it.
    pub set: String,
    /// What it comes to.
    pub prediction: Prediction,
}

/// A name, and what it does to a configuration.
type Change = (&'static str, fn(&mut PlanConfig) -> String);

const CHANGES: [Change; 8] = [
    ("products and attention 10 % faster", |config| {
        scale(
            "assumptions.rate_factor",
            &mut config.assumptions.rate_factor,
            1.1,
        )
    }),
    ("products and attention 10 % slower", |config| {
        scale(
            "assumptions.rate_factor",
            &mut config.assumptions.rate_factor,
            0.9,
        )
    }),
    ("memory 10 % slower", |config| {
        scale("cluster.hbm_gb_s", &mut config.cluster.hbm_gb_s, 0.9)
    }),
    ("half the network bandwidth", |config| {
        scale("cluster.ib_gb_s", &mut config.cluster.ib_gb_s, 0.5)
    }),
    ("no overlap", |config| {
        config.layout.overlap = false;
        "layout.overlap=false".to_owned()
    }),
    ("no node limit", |config| {
        config.layout.node_limit = false;
        "layout.node_limit=false".to_owned()
    }),
    ("the fullest expert has 1.5 times the mean", |config| {
        config.assumptions.expert_imbalance = 1.5;
        "assumptions.expert_imbalance=1.5".to_owned()
    }),
    ("communication needs no multiprocessors", |config| {
        config.layout.communication_sms = 0;
        "layout.communication_sms=0".to_owned()
    }),
];

/// The variants of a plan.
///
/// # Errors
/// As [`Plan::new`].
pub fn variants(model: &ModelConfig, config: &PlanConfig) -> Result<Vec<Variant>, ConfigError> {
    let variant = |(name, change): Change| {
        let mut config = config.clone();
        let set = change(&mut config);
        let prediction = Plan::new(model, &config)?.prediction;
        Ok(Variant {
            name,
            set,
            prediction,
        })
    };
    CHANGES.into_iter().map(variant).collect()
}

fn scale(key: &str, value: &mut f64, factor: f64) -> String {
    *value *= factor;
    format!("{key}={value}")
}
