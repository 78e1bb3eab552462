//! Several ranks as threads of one process.

mod data;
mod experts;
mod four_ranks;
mod overlap;
mod routes;
mod suite;
mod threads;

use deepburn_model::{checkpoint::hf_config, config::ModelConfig};

/// The shape in `configs/model/tiny.json`.
fn tiny() -> ModelConfig {
    let text = include_str!("../../../configs/model/tiny.json");
    hf_config::parse(text).expect("a shape of this repository")
}

/// Reproducible numbers between -1 and 1.
fn numbers(seed: u64, length: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(&mut next).take(length).collect()
}
