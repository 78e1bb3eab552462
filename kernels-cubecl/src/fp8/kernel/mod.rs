//! FP8 on the device: quantisation for every device, matrix products for NVIDIA's tensor cores.

#[cfg(feature = "cuda")]
pub(crate) mod grouped;
#[cfg(feature = "cuda")]
pub(crate) mod hopper;
#[cfg(feature = "cuda")]
pub(crate) mod portable;
pub(crate) mod quantize;
#[cfg(feature = "cuda")]
mod sources;

#[cfg(feature = "cuda")]
pub(crate) use sources::sources;

/// Elements of the inner size that share a scale.
const TILE: u32 = crate::fp8::TILE as u32;
