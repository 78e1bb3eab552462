//! Text generation for Deepburn: choosing tokens and turning them into text as they come.
//!
//! Start reading at [`engine`].

pub mod batch;
pub mod benchmark;
pub mod chat_template;
pub mod engine;
pub mod evaluation;
pub mod grammar;
pub mod logprobs;
mod pages;
mod payoff;
pub mod penalties;
pub mod placement;
pub mod rejection;
pub mod sampler;
pub mod server;
pub mod service;
pub mod speculation;
pub mod text;
