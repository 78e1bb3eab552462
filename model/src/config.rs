//! The validated shape of a model.
//!
//! Field names are those of Hugging Face's `config.json`; how that file is read and written is the business of
//! [`crate::checkpoint::hf_config`].

use thiserror::Error;

/// A value of `config.json` that cannot be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{key} = {value}: {rule}")]
pub struct ConfigError {
    /// The key.
    pub key: &'static str,
    /// What was found.
    pub value: String,
    /// What holds for it.
    pub rule: String,
}

impl ConfigError {
    pub(crate) fn new(
        key: &'static str,
        value: impl std::fmt::Debug,
        rule: impl Into<String>,
    ) -> Self {
        Self {
            key,
            value: format!("{value:?}"),
            rule: rule.into(),
        }
    }
}

/// Shape and constants of a DeepSeek-V3 model. Only [`ModelConfig::validate`] makes one that modules accept.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Tokens in the vocabulary, W.
    pub vocab_size: usize,
    /// Width of the residual stream, d in the report.
    pub hidden_size: usize,
    /// Width of dense feed-forward layers.
    pub intermediate_size: usize,
    /// Width of one expert.
    pub moe_intermediate_size: usize,
    /// Transformer layers, without multi-token prediction modules.
    pub num_hidden_layers: usize,
    /// Multi-token prediction depth, D.
    pub num_nextn_predict_layers: usize,
    /// Attention heads, H.
    pub num_attention_heads: usize,
    /// Rank of the query compression, d'_c. `None`: queries are projected directly.
    pub q_lora_rank: Option<usize>,
    /// Rank of the key-value compression, d_c: what the cache holds per token besides the shared key.
    pub kv_lora_rank: usize,
    /// Width per head of queries and keys without position, d_h.
    pub qk_nope_head_dim: usize,
    /// Width of the rotated part of queries and of the shared key, d_h^R.
    pub qk_rope_head_dim: usize,
    /// Width per head of values.
    pub v_head_dim: usize,
    /// Routed experts per layer, N_r.
    pub n_routed_experts: usize,
    /// Shared experts per layer, N_s.
    pub n_shared_experts: usize,
    /// Routed experts per token, K_r.
    pub num_experts_per_tok: usize,
    /// Groups of routed experts.
    pub n_group: usize,
    /// Groups that a token's experts come from, M.
    pub topk_group: usize,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the weights of the chosen experts.
    pub routed_scaling_factor: f64,
    /// Leading layers with a dense feed-forward part.
    pub first_k_dense_replace: usize,
    /// Epsilon of RMSNorm, except in the two latent norms (always 1e-6).
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Context extension, if any.
    pub rope_scaling: Option<YarnConfig>,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Whether the output head shares the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Standard deviation of the initial weights (report section 4.2: 0.006).
    pub initializer_range: f64,
    /// Beginning-of-text token.
    pub bos_token_id: Option<u32>,
    /// End-of-text token.
    pub eos_token_id: Option<u32>,
}

/// YaRN context extension (report section 4.3; Peng et al., 2023).
#[derive(Clone, Debug, PartialEq)]
pub struct YarnConfig {
    /// Extension factor, s.
    pub factor: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: usize,
    /// Rotations over the original context above which a frequency stays as it is.
    pub beta_fast: f64,
    /// Rotations over the original context below which a frequency is interpolated.
    pub beta_slow: f64,
    /// Attention scaling of the rotated parts, relative to `mscale_all_dim`.
    pub mscale: f64,
    /// Attention scaling of all parts: multiplies the softmax scale by its square.
    pub mscale_all_dim: f64,
}

impl ModelConfig {
    /// Checks every rule that the modules rely on.
    ///
    /// # Errors
    /// The first broken rule, with key and value.
    pub fn validate(self) -> Result<Self, ConfigError> {
        let positive = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("v_head_dim", self.v_head_dim),
            ("n_routed_experts", self.n_routed_experts),
            ("num_experts_per_tok", self.num_experts_per_tok),
            ("n_group", self.n_group),
            ("topk_group", self.topk_group),
            ("max_position_embeddings", self.max_position_embeddings),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
        ];
        /// Far above any real size; keeps products of sizes within 64 bits.
        const LARGEST: usize = 1 << 24;
        for (key, value) in positive {
            if !(1..=LARGEST).contains(&value) {
                return Err(ConfigError::new(
                    key,
                    value,
                    format!("must be 1 to {LARGEST}"),
                ));
            }
        }
        let small = [
            ("n_shared_experts", self.n_shared_experts),
            ("num_nextn_predict_layers", self.num_nextn_predict_layers),
            ("first_k_dense_replace", self.first_k_dense_replace),
        ];
        for (key, value) in small {
            if value > 1 << 16 {
                return Err(ConfigError::new(key, value, "must be at most 65536"));
            }
        }
        if !self.qk_rope_head_dim.is_multiple_of(2) {
            let rule = "must be even: rotary positions turn pairs";
            return Err(ConfigError::new(
                "qk_rope_head_dim",
                self.qk_rope_head_dim,
                rule,
            ));
        }
        if self.first_k_dense_replace > self.num_hidden_layers {
            let rule = format!(
                "must be at most num_hidden_layers = {}",
                self.num_hidden_layers
            );
            return Err(ConfigError::new(
                "first_k_dense_replace",
                self.first_k_dense_replace,
                rule,
            ));
        }
        self.validate_routing()?;
        for (key, value) in [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
            ("initializer_range", self.initializer_range),
            ("routed_scaling_factor", self.routed_scaling_factor),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ConfigError::new(key, value, "must be a positive number"));
            }
        }
        for (key, id) in [
            ("bos_token_id", self.bos_token_id),
            ("eos_token_id", self.eos_token_id),
        ] {
            if let Some(id) = id.filter(|&id| id as usize >= self.vocab_size) {
                let rule = format!("must be below vocab_size = {}", self.vocab_size);
                return Err(ConfigError::new(key, id, rule));
            }
        }
        if let Some(yarn) = &self.rope_scaling {
            yarn.validate()?;
        }
        Ok(self)
    }

    fn validate_routing(&self) -> Result<(), ConfigError> {
        let (experts, groups) = (self.n_routed_experts, self.n_group);
        if !experts.is_multiple_of(groups) {
            let rule = format!("must divide n_routed_experts = {experts}");
            return Err(ConfigError::new("n_group", groups, rule));
        }
        if self.topk_group > groups {
            let rule = format!("must be at most n_group = {groups}");
            return Err(ConfigError::new("topk_group", self.topk_group, rule));
        }
        let reachable = self.topk_group * (experts / groups);
        if self.num_experts_per_tok > reachable {
            let rule = format!(
                "must be at most {reachable}, the experts in topk_group = {} of n_group = {groups} groups",
                self.topk_group
            );
            return Err(ConfigError::new(
                "num_experts_per_tok",
                self.num_experts_per_tok,
                rule,
            ));
        }
        Ok(())
    }

    /// Width of one head's queries and keys.
    pub fn qk_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Whether the feed-forward part of `layer` is dense.
    pub fn is_dense(&self, layer: usize) -> bool {
        layer < self.first_k_dense_replace
    }

    /// Bytes that the cache holds per token in the layers of the main model, in single precision.
    pub fn cache_bytes_per_token(&self) -> usize {
        self.num_hidden_layers * self.cache_width() * size_of::<f32>()
    }

    /// Elements that the cache holds per token and layer.
    pub fn cache_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }
}

impl YarnConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        for (key, value) in [
            ("rope_scaling.factor", self.factor),
            ("rope_scaling.beta_fast", self.beta_fast),
            ("rope_scaling.beta_slow", self.beta_slow),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ConfigError::new(key, value, "must be a positive number"));
            }
        }
        for (key, value) in [
            ("rope_scaling.mscale", self.mscale),
            ("rope_scaling.mscale_all_dim", self.mscale_all_dim),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError::new(
                    key,
                    value,
                    "must be zero or a positive number",
                ));
            }
        }
        if self.original_max_position_embeddings == 0 {
            let key = "rope_scaling.original_max_position_embeddings";
            return Err(ConfigError::new(key, 0, "must be positive"));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small valid shape with every part in it.
    pub(crate) fn tiny() -> ModelConfig {
        ModelConfig {
            vocab_size: 64,
            hidden_size: 32,
            intermediate_size: 48,
            moe_intermediate_size: 16,
            num_hidden_layers: 3,
            num_nextn_predict_layers: 1,
            num_attention_heads: 2,
            q_lora_rank: Some(16),
            kv_lora_rank: 8,
            qk_nope_head_dim: 8,
            qk_rope_head_dim: 4,
            v_head_dim: 8,
            n_routed_experts: 8,
            n_shared_experts: 1,
            num_experts_per_tok: 2,
            n_group: 4,
            topk_group: 2,
            norm_topk_prob: true,
            routed_scaling_factor: 2.5,
            first_k_dense_replace: 1,
            rms_norm_eps: 1e-6,
            rope_theta: 10000.0,
            rope_scaling: None,
            max_position_embeddings: 128,
            tie_word_embeddings: false,
            initializer_range: 0.02,
            bos_token_id: Some(0),
            eos_token_id: Some(1),
        }
    }

    #[test]
    fn errors_name_key_value_and_rule() {
        let refused = |change: &dyn Fn(&mut ModelConfig)| {
            let mut config = tiny();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert!(tiny().validate().is_ok());
        assert_eq!(
            refused(&|c| c.num_experts_per_tok = 5),
            "num_experts_per_tok = 5: must be at most 4, the experts in topk_group = 2 of n_group = 4 groups"
        );
        assert_eq!(
            refused(&|c| c.n_group = 3),
            "n_group = 3: must divide n_routed_experts = 8"
        );
        assert_eq!(
            refused(&|c| c.topk_group = 5),
            "topk_group = 5: must be at most n_group = 4"
        );
        assert_eq!(
            refused(&|c| c.qk_rope_head_dim = 5),
            "qk_rope_head_dim = 5: must be even: rotary positions turn pairs"
        );
        assert_eq!(
            refused(&|c| c.hidden_size = 0),
            "hidden_size = 0: must be 1 to 16777216"
        );
        assert_eq!(
            refused(&|c| c.first_k_dense_replace = 4),
            "first_k_dense_replace = 4: must be at most num_hidden_layers = 3"
        );
        assert_eq!(
            refused(&|c| c.rms_norm_eps = f64::NAN),
            "rms_norm_eps = NaN: must be a positive number"
        );
        assert_eq!(
            refused(&|c| c.eos_token_id = Some(64)),
            "eos_token_id = 64: must be below vocab_size = 64"
        );
    }
}
