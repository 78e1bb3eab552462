#![doc = include_str!("../README.md")]

pub mod adamw;
pub mod attention;
pub mod awake;
pub mod bf16;
pub mod compact;
pub mod cross_entropy;
mod cube;
#[cfg(feature = "cuda")]
pub mod cuda_source;
pub mod elsewhere;
mod few_rows;
mod flex;
pub mod fp8;
mod gemm;
pub mod grouped_gemm;
pub mod grouped_swiglu;
pub mod linear;
pub mod mla_decode;
pub mod mla_paged;
mod parts;
pub mod permute;
pub mod rms_norm;
pub mod rope;
pub mod routing;
pub mod swiglu;
mod vector;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod warp;
pub mod weight_grad;
