//! `quantization_config` of Hugging Face's `config.json`: the keys of DeepSeek's FP8 checkpoints.

use serde::{Deserialize, Serialize};

use deepburn_kernels::fp8::TILE;

use crate::config::ConfigError;

/// How weights of type F8_E4M3 are to be read. Activations are not quantised here; a scheme
/// other than the dynamic one would bring tensors of its own.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct QuantizationConfig {
    #[serde(default = "default_activation_scheme")]
    activation_scheme: String,
    #[serde(default = "default_fmt")]
    fmt: String,
    quant_method: String,
    #[serde(default)]
    weight_block_size: Option<Vec<usize>>,
}

fn default_activation_scheme() -> String {
    "dynamic".into()
}
fn default_fmt() -> String {
    "e4m3".into()
}

/// An error unless a value is one of those expected.
pub(super) fn known(key: &'static str, value: &str, expected: &[&str]) -> Result<(), ConfigError> {
    if expected.contains(&value) {
        return Ok(());
    }
    let rule = format!("must be one of {expected:?}");
    Err(ConfigError::new(key, value, rule))
}

impl QuantizationConfig {
    /// That of DeepSeek's own checkpoints.
    pub(super) fn published() -> Self {
        Self {
            activation_scheme: default_activation_scheme(),
            fmt: default_fmt(),
            quant_method: "fp8".into(),
            weight_block_size: Some(vec![TILE; 2]),
        }
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        known(
            "quantization_config.quant_method",
            &self.quant_method,
            &["fp8"],
        )?;
        known("quantization_config.fmt", &self.fmt, &["e4m3"])?;
        known(
            "quantization_config.activation_scheme",
            &self.activation_scheme,
            &["dynamic"],
        )?;
        let expected = [TILE; 2];
        let found = self.weight_block_size.as_deref().unwrap_or_default();
        if found != expected {
            // An absent size would be one scale per tensor, which other publishers use.
            let key = "quantization_config.weight_block_size";
            return Err(ConfigError::new(
                key,
                found,
                format!("must be {expected:?}"),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use crate::{
        checkpoint::{
            StoredType,
            hf_config::{parse, parse_for_weights, render},
        },
        config::tests::tiny,
    };

    #[test]
    fn quantized_weights_are_announced_as_upstream_announces_them() {
        let config = tiny();
        let (read, quantized) = parse_for_weights(&render(&config, StoredType::Bf16)).unwrap();
        assert_eq!((read, quantized), (config.clone(), false));
        let text = render(&config, StoredType::Fp8);
        let (read, quantized) = parse_for_weights(&text).unwrap();
        assert_eq!((read, quantized), (config, true));
        let file: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(file["torch_dtype"], "bfloat16");
        let published = serde_json::json!({
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        });
        assert_eq!(file["quantization_config"], published);
        for (key, value, message) in [
            (
                "quant_method",
                "gptq".into(),
                "= \"gptq\": must be one of [\"fp8\"]",
            ),
            (
                "fmt",
                "e5m2".into(),
                "= \"e5m2\": must be one of [\"e4m3\"]",
            ),
            (
                "activation_scheme",
                "static".into(),
                "= \"static\": must be one of [\"dynamic\"]",
            ),
            (
                "weight_block_size",
                serde_json::json!([1, 128]),
                "= [1, 128]: must be [128, 128]",
            ),
            ("weight_block_size", Value::Null, "= []: must be [128, 128]"),
        ] {
            let mut file = file.clone();
            file["quantization_config"][key] = value;
            assert_eq!(
                parse(&file.to_string()).unwrap_err().to_string(),
                format!("quantization_config.{key} {message}")
            );
        }
    }
}
