//! Training for Deepburn: data, optimizer, schedules, load balancing and checkpoints on Burn's Learner.

pub mod data;
