//! The rotary positions of Hugging Face's `config.json`: `rope_theta`, `rope_scaling` and the newer `rope_parameters`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{ConfigError, YarnConfig};

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct RopeScaling {
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    kind: Option<String>,
    /// The newer name of `type`; some files have both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rope_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rope_theta: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    factor: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    original_max_position_embeddings: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    beta_fast: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    beta_slow: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mscale: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mscale_all_dim: Option<f64>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// Base of the frequencies and context extension, from all keys that have a say in them.
pub(super) fn read(
    rope_theta: Option<f64>,
    scaling: Option<RopeScaling>,
    parameters: Option<RopeScaling>,
) -> Result<(f64, Option<YarnConfig>), ConfigError> {
    let of = |scaling: &Option<RopeScaling>| scaling.as_ref().and_then(|s| s.rope_theta);
    let rope_theta = agreed(
        ("rope_theta", rope_theta),
        ("rope_parameters.rope_theta", of(&parameters)),
    )?;
    let rope_theta = agreed(
        ("rope_theta", rope_theta),
        ("rope_scaling.rope_theta", of(&scaling)),
    )?;
    let scaling = scaling.map(YarnConfig::from_scaling).transpose()?;
    let parameters = parameters.map(YarnConfig::from_scaling).transpose()?;
    let yarn = match (scaling, parameters) {
        (Some(scaling), Some(parameters)) if scaling != parameters => {
            let rule = format!("must say what rope_scaling says: {scaling:?}");
            return Err(ConfigError::new("rope_parameters", parameters, rule));
        }
        (scaling, parameters) => scaling.or(parameters).flatten(),
    };
    Ok((rope_theta.unwrap_or(10000.0), yarn))
}

/// What two keys say of one thing, if they do not contradict each other.
fn agreed<T: Copy + PartialEq + std::fmt::Debug>(
    (first_key, first): (&str, Option<T>),
    (second_key, second): (&'static str, Option<T>),
) -> Result<Option<T>, ConfigError> {
    match (first, second) {
        (Some(first), Some(second)) if first != second => {
            let rule = format!("must equal {first_key} = {first:?}");
            Err(ConfigError::new(second_key, second, rule))
        }
        _ => Ok(first.or(second)),
    }
}

impl YarnConfig {
    fn from_scaling(scaling: RopeScaling) -> Result<Option<Self>, ConfigError> {
        let kind = agreed(
            ("type", scaling.kind.as_deref()),
            ("rope_scaling.rope_type", scaling.rope_type.as_deref()),
        )?;
        match kind.unwrap_or_default() {
            "" | "default" => return Ok(None),
            "yarn" => {}
            other => {
                return Err(ConfigError::new(
                    "rope_scaling.type",
                    other,
                    "must be \"yarn\"",
                ));
            }
        }
        let needed = |key, value: Option<f64>| {
            value.ok_or_else(|| ConfigError::new(key, "nothing", "yarn needs a number"))
        };
        Ok(Some(Self {
            factor: needed("rope_scaling.factor", scaling.factor)?,
            original_max_position_embeddings: needed(
                "rope_scaling.original_max_position_embeddings",
                scaling
                    .original_max_position_embeddings
                    .map(|length| length as f64),
            )? as usize,
            beta_fast: scaling.beta_fast.unwrap_or(32.0),
            beta_slow: scaling.beta_slow.unwrap_or(1.0),
            mscale: scaling.mscale.unwrap_or(1.0),
            mscale_all_dim: scaling.mscale_all_dim.unwrap_or(0.0),
        }))
    }
}

impl From<&YarnConfig> for RopeScaling {
    fn from(yarn: &YarnConfig) -> Self {
        Self {
            kind: Some("yarn".into()),
            factor: Some(yarn.factor),
            original_max_position_embeddings: Some(yarn.original_max_position_embeddings),
            beta_fast: Some(yarn.beta_fast),
            beta_slow: Some(yarn.beta_slow),
            mscale: Some(yarn.mscale),
            mscale_all_dim: Some(yarn.mscale_all_dim),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use crate::{
        checkpoint::{
            StoredType,
            hf_config::{parse, render},
        },
        config::tests::tiny,
    };

    #[test]
    fn keys_that_contradict_each_other_are_refused() {
        let with = |key: &str, value: Value| {
            let mut file: Value = serde_json::from_str(&render(&tiny(), StoredType::F32)).unwrap();
            file[key] = value;
            parse(&file.to_string()).map_err(|error| error.to_string())
        };
        let yarn = |kind: &str| {
            serde_json::json!({
                "type": "yarn",
                "rope_type": kind,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            })
        };
        assert!(
            with("rope_scaling", yarn("yarn"))
                .unwrap()
                .rope_scaling
                .is_some()
        );
        assert_eq!(
            with("rope_scaling", yarn("linear")).unwrap_err(),
            "rope_scaling.rope_type = \"linear\": must equal type = \"yarn\""
        );
        assert_eq!(
            with("rope_parameters", serde_json::json!({"rope_theta": 5000.0})).unwrap_err(),
            "rope_parameters.rope_theta = 5000.0: must equal rope_theta = 10000.0"
        );
        let mut file: Value = serde_json::from_str(&render(&tiny(), StoredType::F32)).unwrap();
        file["rope_scaling"] = yarn("yarn");
        file["rope_parameters"] = yarn("yarn");
        assert!(parse(&file.to_string()).is_ok());
        file["rope_parameters"]["factor"] = 8.into();
        let message = parse(&file.to_string()).unwrap_err().to_string();
        assert!(
            message.contains("must say what rope_scaling says"),
            "{message}"
        );
    }
}
