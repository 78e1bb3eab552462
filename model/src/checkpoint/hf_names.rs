//! From the names of our parameters to those of Hugging Face's checkpoints: identity, but for what is listed here.
//!
//! - The main model's modules are under `model.`, its head is not.
//! - MTP module k is stored as layer `num_hidden_layers + k`, its block's parts beside its own.
//! - Matrices are stored transposed, `[out, in]`, except the embedding.
//! - Experts, which we stack, are stored one by one.

/// How a parameter is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// As it is.
    AsIs(String),
    /// Transposed.
    Transposed(String),
    /// Expert e as the transposed matrix `prefix + e + suffix`.
    Experts {
        /// Before the expert's number.
        prefix: String,
        /// After it.
        suffix: String,
    },
}

/// How the parameter at `path` of a model of `layers` layers is stored.
pub fn stored(path: &str, layers: usize) -> Stored {
    let name = rename(path, layers);
    if let Some((prefix, projection)) = name.rsplit_once(".experts.") {
        return Stored::Experts {
            prefix: format!("{prefix}.experts."),
            suffix: format!(".{projection}.weight"),
        };
    }
    let is_matrix = name.ends_with("_proj.weight")
        || name.ends_with("_mqa.weight")
        || name.ends_with(".gate.weight")
        || name == "lm_head.weight";
    if is_matrix {
        Stored::Transposed(name)
    } else {
        Stored::AsIs(name)
    }
}

/// The copies of shared matrices that the layer of an MTP module holds: (copy, original) names.
pub fn mtp_copies(layers: usize, depth: usize, tied: bool) -> [(String, String); 2] {
    let layer = format!("model.layers.{}", layers + depth);
    let embedding = "model.embed_tokens.weight".to_owned();
    let head = if tied {
        embedding.clone()
    } else {
        "lm_head.weight".to_owned()
    };
    [
        (format!("{layer}.embed_tokens.weight"), embedding),
        (format!("{layer}.shared_head.head.weight"), head),
    ]
}

/// The name of the block scales that belong to the FP8 weight `name`.
pub fn scales_of(name: &str) -> String {
    format!("{name}{SCALES}")
}

/// The name of the FP8 weight that the block scales `name` belong to.
pub fn scaled_by(name: &str) -> Option<&str> {
    name.strip_suffix(SCALES)
}

const SCALES: &str = "_scale_inv";

/// Whether published FP8 checkpoints hold the tensor `name` in FP8: the projections of attention, feed-forward parts and
/// experts. Embedding, heads, norms, routers and the projection of MTP modules are not among them.
pub fn is_quantized(name: &str) -> bool {
    (name.ends_with("_proj.weight") || name.ends_with("_mqa.weight"))
        && !name.ends_with(".eh_proj.weight")
}

/// Whether the tensor `name` is in single precision in every checkpoint: the selection bias, which is updated by steps
/// that vanish beside it in a shorter type.
pub fn is_always_f32(name: &str) -> bool {
    name.ends_with(".e_score_correction_bias")
}

fn rename(path: &str, layers: usize) -> String {
    // The enum that holds the query projections is a field of ours.
    let path = path.replace(".self_attn.query.", ".self_attn.");
    if path.starts_with("lm_head.") {
        return path;
    }
    if let Some((depth, rest)) = path
        .strip_prefix("mtp.")
        .and_then(|rest| rest.split_once('.'))
    {
        let depth: usize = depth.parse().expect("a list is indexed by numbers");
        let rest = rest.strip_prefix("block.").unwrap_or(rest);
        return format!("model.layers.{}.{rest}", layers + depth);
    }
    format!("model.{path}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_layouts_are_those_of_published_checkpoints() {
        let as_is = |path, name: &str| assert_eq!(stored(path, 61), Stored::AsIs(name.into()));
        let turned =
            |path, name: &str| assert_eq!(stored(path, 61), Stored::Transposed(name.into()));
        as_is("embed_tokens.weight", "model.embed_tokens.weight");
        as_is("norm.weight", "model.norm.weight");
        turned("lm_head.weight", "lm_head.weight");
        turned(
            "layers.3.self_attn.query.q_a_proj.weight",
            "model.layers.3.self_attn.q_a_proj.weight",
        );
        as_is(
            "layers.3.self_attn.query.q_a_layernorm.weight",
            "model.layers.3.self_attn.q_a_layernorm.weight",
        );
        turned(
            "layers.0.self_attn.kv_a_proj_with_mqa.weight",
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        );
        turned("layers.4.mlp.gate.weight", "model.layers.4.mlp.gate.weight");
        as_is(
            "layers.4.mlp.gate.e_score_correction_bias",
            "model.layers.4.mlp.gate.e_score_correction_bias",
        );
        turned(
            "layers.4.mlp.shared_experts.up_proj.weight",
            "model.layers.4.mlp.shared_experts.up_proj.weight",
        );
        turned("mtp.0.eh_proj.weight", "model.layers.61.eh_proj.weight");
        as_is(
            "mtp.0.shared_head.norm.weight",
            "model.layers.61.shared_head.norm.weight",
        );
        as_is(
            "mtp.1.block.input_layernorm.weight",
            "model.layers.62.input_layernorm.weight",
        );
        assert_eq!(
            stored("mtp.0.block.mlp.experts.down_proj", 61),
            Stored::Experts {
                prefix: "model.layers.61.mlp.experts.".into(),
                suffix: ".down_proj.weight".into()
            }
        );
    }

    #[test]
    fn projections_are_quantized_and_nothing_else() {
        for (name, expected) in [
            ("model.embed_tokens.weight", false),
            ("lm_head.weight", false),
            ("model.norm.weight", false),
            ("model.layers.3.self_attn.q_proj.weight", true),
            ("model.layers.3.self_attn.q_a_proj.weight", true),
            ("model.layers.3.self_attn.q_a_layernorm.weight", false),
            ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", true),
            ("model.layers.3.self_attn.o_proj.weight", true),
            ("model.layers.0.mlp.gate_proj.weight", true),
            ("model.layers.3.mlp.gate.weight", false),
            ("model.layers.3.mlp.gate.e_score_correction_bias", false),
            ("model.layers.3.mlp.experts.7.down_proj.weight", true),
            ("model.layers.3.mlp.shared_experts.up_proj.weight", true),
            ("model.layers.61.eh_proj.weight", false),
            ("model.layers.61.shared_head.head.weight", false),
        ] {
            assert_eq!(is_quantized(name), expected, "{name}");
        }
        let weight = "model.layers.3.self_attn.o_proj.weight";
        assert_eq!(scaled_by(&scales_of(weight)), Some(weight));
        assert_eq!(scaled_by(weight), None);
    }
}
