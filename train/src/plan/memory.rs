//! What a rank keeps in memory (report, sections 3.2.3 and 3.3).

use deepburn_model::config::ModelConfig;
use serde::Serialize;

use super::{config::PlanConfig, gemm::Part};
use crate::pipeline::schedule::Timeline;

/// Bytes on each GPU of a rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Memory {
    /// As they are computed with.
    pub weights: f64,
    /// As they are accumulated.
    pub gradients: f64,
    /// Master weights and moments, spread over the replicas (ZeRO-1).
    pub optimizer: f64,
    /// Of all micro-batches that are on their way, at the worst moment.
    pub activations: f64,
}

impl Memory {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.weights + self.gradients + self.optimizer + self.activations
    }
}

/// Parameters that a GPU of a rank has.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Held {
    /// All but routed experts.
    pub shared: f64,
    /// Its routed experts.
    pub experts: f64,
}

impl Held {
    /// Those of the stages of a rank. The embedding of multi-token prediction and the head are the main model's, where
    /// they are on the same rank (section 3.2.3); otherwise the rank of the head has a copy of the embedding.
    pub fn of(model: &ModelConfig, ep: usize, parts: &[Part]) -> Self {
        let mut held = Self::default();
        for part in parts {
            let [shared, experts] = part.stored(model, ep);
            held.shared += shared as f64;
            held.experts += experts as f64;
        }
        let apart = |needed: Part| parts.contains(&needed) && !parts.contains(&Part::Embedding);
        let tied = model.tie_word_embeddings && apart(Part::Head);
        if apart(Part::Merge) || tied {
            held.shared += Part::Embedding.parameters(model) as f64;
        }
        held
    }

    /// Those whose optimizer state a GPU has.
    pub fn owned(&self, config: &PlanConfig) -> f64 {
        let [shared, experts] = replicas(config);
        self.shared / shared + self.experts / experts
    }
}

/// GPUs that have the same parameters: of all but experts, and of experts.
pub fn replicas(config: &PlanConfig) -> [f64; 2] {
    let all = (config.data_parallel() * config.copies()) as f64;
    [all, all / config.layout.ep as f64]
}

/// For each rank, given the parts of its stages.
pub fn of_ranks(
    model: &ModelConfig,
    config: &PlanConfig,
    stages: &[Vec<Part>],
    timeline: &Timeline,
) -> Vec<Memory> {
    let placement = timeline.placement;
    let kept = timeline.peak_kept(|rank, direction| {
        let parts = stages[placement.stage(rank, direction)].iter();
        parts.map(|&part| activations(model, config, part)).sum()
    });
    let assumed = &config.assumptions;
    let memory = |(rank, activations): (usize, f64)| {
        let held = Held::of(model, config.layout.ep, &parts_of(stages, timeline, rank));
        let all = held.shared + held.experts;
        Memory {
            weights: all * assumed.weight_bytes,
            gradients: all * assumed.gradient_bytes,
            optimizer: held.owned(config) * (assumed.master_bytes + assumed.moments_bytes),
            activations,
        }
    };
    kept.into_iter().enumerate().map(memory).collect()
}

/// The parts of all stages of a rank.
pub fn parts_of(stages: &[Vec<Part>], timeline: &Timeline, rank: usize) -> Vec<Part> {
    let directions = timeline.placement.directions().iter();
    let stage = |&direction| stages[timeline.placement.stage(rank, direction)].clone();
    directions.flat_map(stage).collect()
}

/// Bytes that a part keeps of one micro-batch from its forward to its backward pass.
fn activations(model: &ModelConfig, config: &PlanConfig, part: Part) -> f64 {
    let (layout, assumed) = (&config.layout, &config.assumptions);
    let (wide, narrow) = match config.training.fp8 {
        true => (assumed.bf16_bytes, 1.0),
        false => (assumed.bf16_bytes, assumed.bf16_bytes),
    };
    let attended = match config.training.fp8 {
        true => assumed.attention_output_bytes,
        false => wide,
    };
    const SINGLE: f64 = 4.0;
    let (hidden, heads) = (model.hidden_size as f64, model.num_attention_heads as f64);
    let attention = || {
        let latents = (model.q_lora_rank.unwrap_or(0) + model.cache_width()) as f64;
        let output = heads * model.v_head_dim as f64;
        // Inputs of attention, of the feed-forward part, and what the up-projections start from.
        let mut kept = wide * (2.0 * hidden + latents) + attended * output + SINGLE * heads;
        if !layout.recompute_norms {
            kept += narrow * (2.0 * hidden + latents);
        }
        let queries = heads * model.qk_head_dim() as f64;
        // Without a compression there is nothing to compute queries from but the product itself.
        let queries_again = layout.recompute_up_projections && model.q_lora_rank.is_some();
        if !queries_again {
            kept += wide * queries;
        }
        if !layout.recompute_up_projections {
            let keys_and_values = model.qk_nope_head_dim + model.v_head_dim;
            kept += wide * heads * keys_and_values as f64;
        }
        kept
    };
    // Inputs of SwiGLU are twice as wide as its output.
    let swiglu = |width: usize| {
        let again = layout.recompute_swiglu;
        narrow * width as f64 * if again { 2.0 } else { 3.0 }
    };
    let per_token = match part {
        Part::Embedding => 0.0,
        Part::Dense => attention() + swiglu(model.intermediate_size),
        Part::Moe => {
            let chosen = model.num_experts_per_tok;
            let width = model.moe_intermediate_size * (chosen + model.n_shared_experts);
            // What arrived for the experts here, and the gate's scores.
            let arrived = narrow * hidden * chosen as f64;
            attention() + arrived + swiglu(width) + SINGLE * model.n_routed_experts as f64
        }
        Part::Merge => wide * 2.0 * hidden,
        Part::Head | Part::SharedHead => wide * hidden,
    };
    per_token * config.tokens() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::test_model::{small, small_plan};

    /// By hand, per token: inputs 2 x 8 and latents 6 + 6 in BF16 are 56 bytes, attention 8 x 1.5, two heads' sums 8:
    /// 76. Dense 2 x 16; MoE 2 x 8 arrived, 2 x 4 x 3 inside, 8 x 4 scores. 16 tokens.
    #[test]
    fn activations_are_what_the_report_keeps() {
        let (model, mut config) = (small(), small_plan());
        let kept = |config: &PlanConfig, part| activations(&model, config, part) / 16.0;
        assert_eq!(kept(&config, Part::Dense), 76.0 + 32.0);
        assert_eq!(kept(&config, Part::Moe), 76.0 + 16.0 + 24.0 + 32.0);
        assert_eq!(kept(&config, Part::Head), 16.0);
        // Norms 28 in FP8, queries 2 x 12 and keys and values 2 x 16 in BF16, SwiGLU 16 in FP8.
        config.layout.recompute_norms = false;
        assert_eq!(kept(&config, Part::Dense), 108.0 + 28.0);
        config.layout.recompute_up_projections = false;
        assert_eq!(kept(&config, Part::Dense), 136.0 + 24.0 + 32.0);
        config.layout.recompute_swiglu = false;
        assert_eq!(kept(&config, Part::Dense), 192.0 + 16.0);
    }

    /// 8 pipelines and two copies are 16 replicas, of experts over 8 GPUs 2.
    #[test]
    fn optimizer_state_is_spread_over_the_replicas() {
        let (model, config) = (small(), small_plan());
        assert_eq!(replicas(&config), [16.0, 2.0]);
        let held = Held::of(&model, 8, &[Part::Moe]);
        assert_eq!((held.shared, held.experts), (490.0, 96.0));
        assert_eq!(held.owned(&config), 490.0 / 16.0 + 48.0);
        let apart = Held::of(&model, 8, &[Part::Merge]);
        assert_eq!(apart.shared, 144.0 + 80.0);
        let together = Held::of(&model, 8, &[Part::Embedding, Part::Merge]);
        assert_eq!(together.shared, 144.0 + 80.0);
    }
}
