//! Text generation for Deepburn: choosing tokens and turning them into text as they come.

pub mod sampler;
pub mod text;
