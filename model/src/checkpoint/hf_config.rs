//! Hugging Face's `config.json` for `DeepseekV3ForCausalLM`: the one place that knows its keys and constants.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    StoredType,
    hf_quantization::{QuantizationConfig, known},
    hf_rope::{self, RopeScaling},
};
use crate::config::{ConfigError, ModelConfig};

/// `config.json` as it is written, with the keys that Deepburn does not interpret kept in `other`.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct HfConfig {
    #[serde(default)]
    architectures: Vec<String>,
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    moe_intermediate_size: usize,
    num_hidden_layers: usize,
    #[serde(default)]
    num_nextn_predict_layers: usize,
    num_attention_heads: usize,
    #[serde(default)]
    num_key_value_heads: Option<usize>,
    #[serde(default)]
    q_lora_rank: Option<usize>,
    kv_lora_rank: usize,
    qk_nope_head_dim: usize,
    qk_rope_head_dim: usize,
    v_head_dim: usize,
    n_routed_experts: usize,
    #[serde(default)]
    n_shared_experts: Option<usize>,
    num_experts_per_tok: usize,
    #[serde(default = "one")]
    n_group: usize,
    #[serde(default = "one")]
    topk_group: usize,
    #[serde(default = "default_topk_method")]
    topk_method: String,
    #[serde(default = "default_scoring")]
    scoring_func: String,
    #[serde(default = "default_true")]
    norm_topk_prob: bool,
    #[serde(default = "default_scaling")]
    routed_scaling_factor: f64,
    #[serde(default)]
    first_k_dense_replace: usize,
    #[serde(default = "one")]
    moe_layer_freq: usize,
    #[serde(default = "default_act")]
    hidden_act: String,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rope_theta: Option<f64>,
    #[serde(default)]
    rope_scaling: Option<RopeScaling>,
    /// What newer releases of transformers write in place of `rope_theta` and `rope_scaling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rope_parameters: Option<RopeScaling>,
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    attention_dropout: f64,
    #[serde(default = "default_range")]
    initializer_range: f64,
    #[serde(default)]
    bos_token_id: Option<u32>,
    #[serde(default)]
    eos_token_id: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quantization_config: Option<QuantizationConfig>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

fn one() -> usize {
    1
}
fn default_true() -> bool {
    true
}
fn default_topk_method() -> String {
    "noaux_tc".into()
}
fn default_scoring() -> String {
    "sigmoid".into()
}
fn default_act() -> String {
    "silu".into()
}
fn default_eps() -> f64 {
    1e-6
}
fn default_scaling() -> f64 {
    1.0
}
fn default_range() -> f64 {
    0.02
}

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HfConfigError {
    /// Not JSON, a missing key, or a value of another type; the message names key and place.
    #[error("{0}")]
    Syntax(#[from] serde_json::Error),
    /// A value that breaks a rule.
    #[error(transparent)]
    Rule(#[from] ConfigError),
}

/// Reads a model's shape from the text of a `config.json`.
///
/// # Errors
/// Text that is not such a file, or a value that this architecture does not know or that breaks a rule of
/// [`ModelConfig::validate`].
pub fn parse(text: &str) -> Result<ModelConfig, HfConfigError> {
    Ok(parse_for_weights(text)?.0)
}

/// As [`parse`], and whether the file says how weights of type F8_E4M3 are scaled.
pub(super) fn parse_for_weights(text: &str) -> Result<(ModelConfig, bool), HfConfigError> {
    let file: HfConfig = serde_json::from_str(text)?;
    let quantized = file.quantization_config.is_some();
    Ok((ModelConfig::try_from(file)?, quantized))
}

/// The text of a `config.json` that transformers loads as `DeepseekV3ForCausalLM`, beside weights of the given type.
pub fn render(config: &ModelConfig, dtype: StoredType) -> String {
    let torch_dtype = match dtype {
        StoredType::F32 => "float32",
        // What of an FP8 checkpoint is not quantised.
        StoredType::Bf16 | StoredType::Fp8 => "bfloat16",
    };
    let mut other = Map::new();
    other.insert("torch_dtype".into(), torch_dtype.into());
    other.insert("use_cache".into(), true.into());
    let file = HfConfig {
        architectures: vec!["DeepseekV3ForCausalLM".into()],
        model_type: "deepseek_v3".into(),
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        moe_intermediate_size: config.moe_intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_nextn_predict_layers: config.num_nextn_predict_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: Some(config.num_attention_heads),
        q_lora_rank: config.q_lora_rank,
        kv_lora_rank: config.kv_lora_rank,
        qk_nope_head_dim: config.qk_nope_head_dim,
        qk_rope_head_dim: config.qk_rope_head_dim,
        v_head_dim: config.v_head_dim,
        n_routed_experts: config.n_routed_experts,
        n_shared_experts: Some(config.n_shared_experts),
        num_experts_per_tok: config.num_experts_per_tok,
        n_group: config.n_group,
        topk_group: config.topk_group,
        topk_method: default_topk_method(),
        scoring_func: default_scoring(),
        norm_topk_prob: config.norm_topk_prob,
        routed_scaling_factor: config.routed_scaling_factor,
        first_k_dense_replace: config.first_k_dense_replace,
        moe_layer_freq: 1,
        hidden_act: default_act(),
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: Some(config.rope_theta),
        rope_scaling: config.rope_scaling.as_ref().map(RopeScaling::from),
        rope_parameters: None,
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings,
        attention_bias: false,
        attention_dropout: 0.0,
        initializer_range: config.initializer_range,
        bos_token_id: config.bos_token_id,
        eos_token_id: config.eos_token_id,
        quantization_config: (dtype == StoredType::Fp8).then(QuantizationConfig::published),
        other,
    };
    serde_json::to_string_pretty(&file).expect("strings, numbers and maps with string keys") + "\n"
}

impl TryFrom<HfConfig> for ModelConfig {
    type Error = ConfigError;

    fn try_from(file: HfConfig) -> Result<Self, ConfigError> {
        known("model_type", &file.model_type, &["deepseek_v3"])?;
        known("scoring_func", &file.scoring_func, &["sigmoid"])?;
        known("topk_method", &file.topk_method, &["noaux_tc"])?;
        known("hidden_act", &file.hidden_act, &["silu"])?;
        if file.attention_bias {
            let rule = "must be false: the projections of MLA have no bias";
            return Err(ConfigError::new("attention_bias", true, rule));
        }
        if file.attention_dropout != 0.0 {
            return Err(ConfigError::new(
                "attention_dropout",
                file.attention_dropout,
                "must be 0",
            ));
        }
        if file.moe_layer_freq != 1 {
            return Err(ConfigError::new(
                "moe_layer_freq",
                file.moe_layer_freq,
                "must be 1",
            ));
        }
        if let Some(heads) = file
            .num_key_value_heads
            .filter(|&h| h != file.num_attention_heads)
        {
            let rule = format!(
                "must equal num_attention_heads = {}",
                file.num_attention_heads
            );
            return Err(ConfigError::new("num_key_value_heads", heads, rule));
        }
        if let Some(quantization) = &file.quantization_config {
            quantization.validate()?;
        }
        let (rope_theta, rope_scaling) =
            hf_rope::read(file.rope_theta, file.rope_scaling, file.rope_parameters)?;
        ModelConfig {
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            moe_intermediate_size: file.moe_intermediate_size,
            num_hidden_layers: file.num_hidden_layers,
            num_nextn_predict_layers: file.num_nextn_predict_layers,
            num_attention_heads: file.num_attention_heads,
            q_lora_rank: file.q_lora_rank,
            kv_lora_rank: file.kv_lora_rank,
            qk_nope_head_dim: file.qk_nope_head_dim,
            qk_rope_head_dim: file.qk_rope_head_dim,
            v_head_dim: file.v_head_dim,
            n_routed_experts: file.n_routed_experts,
            n_shared_experts: file.n_shared_experts.unwrap_or(0),
            num_experts_per_tok: file.num_experts_per_tok,
            n_group: file.n_group,
            topk_group: file.topk_group,
            norm_topk_prob: file.norm_topk_prob,
            routed_scaling_factor: file.routed_scaling_factor,
            first_k_dense_replace: file.first_k_dense_replace,
            rms_norm_eps: file.rms_norm_eps,
            rope_theta,
            rope_scaling,
            max_position_embeddings: file.max_position_embeddings,
            tie_word_embeddings: file.tie_word_embeddings,
            initializer_range: file.initializer_range,
            bos_token_id: file.bos_token_id,
            eos_token_id: file.eos_token_id,
        }
        .validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{YarnConfig, tests::tiny};

    #[test]
    fn written_files_read_back_the_same() {
        let mut config = tiny();
        assert_eq!(parse(&render(&config, StoredType::F32)).unwrap(), config);
        config.q_lora_rank = None;
        config.rope_scaling = Some(YarnConfig {
            factor: 40.0,
            original_max_position_embeddings: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: 1.0,
            mscale_all_dim: 1.0,
        });
        assert_eq!(parse(&render(&config, StoredType::Bf16)).unwrap(), config);
    }

    #[test]
    fn unknown_methods_are_refused_by_name() {
        let changed = |key: &str, value: Value| {
            let mut file: Map<String, Value> =
                serde_json::from_str(&render(&tiny(), StoredType::F32)).unwrap();
            file.insert(key.into(), value);
            parse(&Value::from(file).to_string())
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            changed("scoring_func", "softmax".into()),
            "scoring_func = \"softmax\": must be one of [\"sigmoid\"]"
        );
        assert_eq!(
            changed("topk_method", "greedy".into()),
            "topk_method = \"greedy\": must be one of [\"noaux_tc\"]"
        );
        assert_eq!(
            changed("moe_layer_freq", 2.into()),
            "moe_layer_freq = 2: must be 1"
        );
        assert!(changed("hidden_size", "wide".into()).contains("expected usize"));
        assert_eq!(
            changed(
                "rope_scaling",
                serde_json::json!({"type": "linear", "factor": 2})
            ),
            "rope_scaling.type = \"linear\": must be \"yarn\""
        );
    }

    #[test]
    fn newer_rope_parameters_are_read() {
        let mut file: Map<String, Value> =
            serde_json::from_str(&render(&tiny(), StoredType::F32)).unwrap();
        file.remove("rope_theta");
        file.remove("rope_scaling");
        let parameters = serde_json::json!({"rope_type": "default", "rope_theta": 5000.0});
        file.insert("rope_parameters".into(), parameters);
        assert_eq!(
            parse(&Value::from(file).to_string()).unwrap().rope_theta,
            5000.0
        );
    }
}
