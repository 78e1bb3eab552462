//! Text generation for Deepburn: choosing tokens and turning them into text as they come.
//!
//! Start reading at [`engine`].

pub mod engine;
pub mod logprobs;
pub mod penalties;
pub mod sampler;
pub mod service;
pub mod speculation;
pub mod text;
