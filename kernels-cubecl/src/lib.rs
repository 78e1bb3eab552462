//! Grouped matrix products and expert routing for mixture-of-experts models, as operations on Burn tensors.
//!
//! Every operation has a reference made of plain Burn tensor operations, which defines it and serves every
//! device, and native versions where that pays: for the Flex backend on the CPU, and as CubeCL kernels for wgpu and
//! CUDA (features `wgpu` and `cuda`). Which one runs depends on the device, the element type and the number of experts
//! only, as each function documents; all are differentiable, unless they say otherwise, and tested against each other.
//!
//! | operation | Flex f32, f64 | CubeCL devices | every other device and type |
//! |---|---|---|---|
//! | [`routing::route`] | reference around `select_experts` | f32, f16, bf16: one kernel, hand-written backward | reference, Burn's autodiff |
//! | [`routing::select_experts`] | native, one pass per token | f32: one kernel | reference |
//! | [`permute::Permutation::by_expert`] | native counting sort | counting sort in three kernels | reference |
//! | [`permute::permute`], [`permute::combine`] | native, hand-written backward | f32, f16, bf16: native, hand-written backward | reference, Burn's autodiff |
//! | [`grouped_gemm::grouped_matmul`] | native, hand-written backward | f32, f16, bf16: native, hand-written backward | reference, Burn's autodiff |
//! | [`attention::causal_attention`] | native for f32, hand-written backward | reference | reference, Burn's autodiff |
//! | [`mla_decode::mla_decode`] | reference | f32, f16, bf16: two kernels, forward only | reference, forward only |
//! | [`cross_entropy::cross_entropy`] | native for f32, hand-written backward | reference | reference, Burn's autodiff |
//! | [`rms_norm::rms_norm`] | native for f32, hand-written backward | reference | reference, Burn's autodiff |
//! | [`swiglu::swiglu`] | native for f32, hand-written backward | reference | reference, Burn's autodiff |
//! | [`fp8::quantize`] | native for f32, not differentiable | f32: one kernel | reference |
//! | [`fp8::matmul_nt`] | native, not differentiable | CUDA: tensor cores; wgpu: reference | reference |
//! | `fp8::native::grouped_matmul_nt` | none | CUDA: tensor cores, forward only | none |
//! | [`fp8::linear`] | f32, of the two above, with hand-written backward | as on Flex | reference, forward only |
//!
//! The crate knows sizes, groups and element types, and nothing of any model.

pub mod attention;
pub mod cross_entropy;
mod cube;
#[cfg(feature = "cuda")]
pub mod cuda_source;
mod flex;
pub mod fp8;
mod gemm;
pub mod grouped_gemm;
pub mod mla_decode;
pub mod permute;
pub mod rms_norm;
pub mod routing;
pub mod swiglu;
mod vector;
