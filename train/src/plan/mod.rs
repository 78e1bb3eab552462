//! Prediction of a training run on a cluster, as the report's sections 3 and 4.2 describe theirs.
//!
//! From the model's shape come the products of each part ([`gemm`]), from published rates how long they take ([`work`])
//! and how long tokens are on their way to their experts ([`all_to_all`]); parts make stages ([`stages`]), stages a
//! pipeline whose step is simulated action by action, and what a rank keeps is its [`memory`]. Every value has a name
//! and a source ([`assumptions`]). None of them is fitted to a training time.

pub mod all_to_all;
pub mod assumptions;
pub mod config;
pub mod gemm;
pub mod memory;
pub mod sensitivity;
pub mod stages;
mod step;
pub mod work;

use deepburn_model::config::ModelConfig;

pub use config::PlanConfig;
pub use step::{Prediction, RankTimes};

use crate::{
    config::ConfigError,
    pipeline::schedule::{Costs, Simulation, Timeline},
};
use all_to_all::{AllToAll, Hops};
use gemm::{Parameters, Part};
use memory::Memory;
use work::{Machine, Passes};

/// A planned run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What was asked for.
    pub config: PlanConfig,
    /// The model's size.
    pub parameters: Parameters,
    /// How far a token travels.
    pub hops: Hops,
    /// What that takes, once there and back.
    pub all_to_all: AllToAll,
    /// Passes of a layer with experts, if the model has any.
    pub moe_layer: Option<Passes>,
    /// In order.
    pub stages: Vec<Stage>,
    /// By pipeline rank: where a step goes, and what is in memory.
    pub ranks: Vec<(RankTimes, Memory)>,
    /// Mean costs of the stages, in seconds.
    pub mean: Costs,
    /// What each rank does.
    pub timeline: Timeline,
    /// When, in seconds.
    pub simulation: Simulation,
    /// What it comes to.
    pub prediction: Prediction,
    /// The same from a known number of GPU hours, if there is one.
    pub reported: Option<Prediction>,
}

/// A pipeline stage.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// What is in it.
    pub parts: Vec<Part>,
    /// What a micro-batch takes there.
    pub passes: Passes,
}

impl Stage {
    /// Its transformer layers, without those of multi-token prediction.
    pub fn layers(&self) -> usize {
        let parts = self.parts.iter().take_while(|&&part| part != Part::Head);
        parts.filter(|part| part.is_layer()).count()
    }
}

impl Plan {
    /// Plans a run.
    ///
    /// # Errors
    /// Sizes that do not fit together.
    pub fn new(model: &ModelConfig, config: &PlanConfig) -> Result<Self, ConfigError> {
        config.validate(model)?;
        let machine = Machine { model, config };
        let parts = stages::stages(model, config, |part| machine.passes(part).computation())?;
        let stages: Vec<Stage> = parts
            .iter()
            .map(|parts| {
                let mut passes = Passes::default();
                for &part in parts {
                    passes += machine.passes(part);
                }
                let parts = parts.clone();
                Stage { parts, passes }
            })
            .collect();
        let run = step::run(&machine, &stages)?;
        let memory = memory::of_ranks(model, config, &parts, &run.timeline);
        let moe = parts.iter().flatten().find(|&&part| part == Part::Moe);
        Ok(Self {
            config: config.clone(),
            parameters: Parameters::of(model),
            hops: Hops::new(model, config),
            all_to_all: AllToAll::new(model, config),
            moe_layer: moe.map(|&part| machine.passes(part)),
            ranks: run.ranks.into_iter().zip(memory).collect(),
            stages,
            mean: run.mean,
            timeline: run.timeline,
            simulation: run.simulation,
            prediction: run.prediction,
            reported: run.reported,
        })
    }
}

#[cfg(test)]
mod test_model {
    use deepburn_model::config::ModelConfig;

    use super::PlanConfig;

    /// Small enough to be counted by hand.
    pub(super) fn small() -> ModelConfig {
        let model = ModelConfig {
            vocab_size: 10,
            hidden_size: 8,
            intermediate_size: 16,
            moe_intermediate_size: 4,
            num_hidden_layers: 3,
            num_nextn_predict_layers: 1,
            num_attention_heads: 2,
            q_lora_rank: Some(6),
            kv_lora_rank: 4,
            qk_nope_head_dim: 4,
            qk_rope_head_dim: 2,
            v_head_dim: 4,
            n_routed_experts: 8,
            n_shared_experts: 1,
            num_experts_per_tok: 2,
            n_group: 4,
            topk_group: 1,
            norm_topk_prob: true,
            routed_scaling_factor: 1.0,
            first_k_dense_replace: 1,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_scaling: None,
            max_position_embeddings: 16,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            bos_token_id: None,
            eos_token_id: None,
        };
        model.validate().unwrap()
    }

    /// 8 pipelines of two ranks, experts on four nodes of two GPUs, four micro-batches of one sequence of 16 tokens.
    pub(super) fn small_plan() -> PlanConfig {
        let text = "
            [cluster]
            gpus = 16
            gpus_per_node = 2
            [layout]
            pp = 2
            ep = 8
            global_batch = 32
            sequence_length = 16
        ";
        PlanConfig::parse(text, &[]).unwrap()
    }
}
