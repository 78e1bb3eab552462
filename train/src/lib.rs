//! Training for Deepburn: data, optimizer, schedules, load balancing and checkpoints on Burn's Learner.

pub mod average;
pub mod balance;
mod cluster;
pub mod config;
pub mod data;
pub mod learner;
pub mod loader;
pub mod metrics;
pub mod optimizer;
pub mod parallel;
pub mod pipeline;
pub mod plan;
pub mod precision;
pub mod report;
pub mod run;
pub mod schedule;
mod shards;
pub mod spike;
pub mod state;
pub mod step;
mod strategy;
