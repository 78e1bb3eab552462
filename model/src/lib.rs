//! The DeepSeek-V3 architecture on Burn: multi-head latent attention (MLA), DeepSeekMoE with auxiliary-loss-free
//! balancing, multi-token prediction (MTP), and Hugging Face checkpoints.

pub mod mmap;
