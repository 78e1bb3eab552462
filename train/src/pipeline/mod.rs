//! Pipeline parallelism: which rank computes which stage of which micro-batch, and when.

pub mod schedule;
