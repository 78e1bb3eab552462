//! Grouped matrix products and expert routing for mixture-of-experts models, as operations on Burn tensors.
//!
//! Every operation has a reference made of plain Burn tensor operations, which defines it and serves every
//! device, and a native CPU version for the Flex backend where that pays. Which one runs depends on the device
//! and the element type only, as each function documents; both are differentiable and tested against each other.
//!
//! | operation | Flex f32, f64 | every other device and type |
//! |---|---|---|
//! | [`routing::select_experts`] | native, one pass per token | reference |
//! | [`permute::Permutation::by_expert`] | native counting sort | reference |
//! | [`permute::permute`], [`permute::combine`] | native, hand-written backward | reference, Burn's autodiff |
//! | [`grouped_gemm::grouped_matmul`] | native, hand-written backward | reference, Burn's autodiff |
//! | [`attention::causal_attention`] | native for f32, hand-written backward | reference, Burn's autodiff |
//! | [`cross_entropy::cross_entropy`] | native for f32, hand-written backward | reference, Burn's autodiff |
//! | [`rms_norm::rms_norm`] | native for f32, hand-written backward | reference, Burn's autodiff |
//! | [`swiglu::swiglu`] | native for f32, hand-written backward | reference, Burn's autodiff |
//!
//! The crate knows sizes, groups and element types, and nothing of any model.

pub mod attention;
pub mod cross_entropy;
mod flex;
mod gemm;
pub mod grouped_gemm;
pub mod permute;
pub mod rms_norm;
pub mod routing;
pub mod swiglu;
mod vector;
