//! Pipeline parallelism: which rank computes which stage of which micro-batch, and when.

pub mod copies;
pub mod execute;
pub mod layout;
pub mod schedule;
pub mod stage;
pub mod trainee;
