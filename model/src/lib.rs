//! The DeepSeek-V3 architecture on Burn: multi-head latent attention (MLA), DeepSeekMoE with auxiliary-loss-free
//! balancing, multi-token prediction (MTP), and Hugging Face checkpoints.
//!
//! Start reading at [`transformer`]. Everything here is single-device code without an optimizer, and forward has
//! no side effects: expert loads and caches are values in the signatures.
//!
//! Letters in shapes: B batch, T tokens of a sequence, S cached tokens, D hidden_size, H heads, C kv_lora_rank,
//! Q q_lora_rank, N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, E experts, K chosen experts,
//! F moe_intermediate_size, W vocabulary.

pub mod attention;
pub mod checkpoint;
pub mod config;
mod held;
pub mod init;
pub mod layer;
pub mod loss;
pub mod mlp;
pub mod mmap;
pub mod moe;
pub mod mtp;
pub mod norm;
pub mod parameters;
pub mod projection;
mod recompute;
pub mod rope;
pub mod transformer;
