//! Text generation for Deepburn: choosing tokens and turning them into text as they come.
//!
//! Start reading at [`engine`].

pub mod engine;
pub mod sampler;
pub mod text;
