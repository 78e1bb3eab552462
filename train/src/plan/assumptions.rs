//! Where every value of a plan is from.

use serde::Serialize;

use super::config::PlanConfig;

/// A value and its source.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Assumption {
    /// `section.key`, as it is set.
    pub key: &'static str,
    /// As it is used.
    pub value: String,
    /// The default, where the value differs from it.
    pub default: Option<String>,
    /// Where the default is from.
    pub source: &'static str,
}

/// What the formulas leave out or take for granted without a number.
pub const NOTES: [&str; 8] = [
    "Products have the published rate of their inner dimension, interpolated over its logarithm; backward passes too.",
    "A pair takes as long as the longer of its computation and its communication; everything else hides nothing.",
    "Multiprocessors that communicate slow down products and attention, not what memory bandwidth limits.",
    "A product's input and output gradient are quantised in passes over memory of their own (section 3.5.2).",
    "Experts of a token are any of those that routing can reach, all equally likely.",
    "Gradients are summed and weights gathered after the backward passes, exposed; ZeRO-1 spans both copies of a stage.",
    "The batch is constant: the growth from 3072 over the first 469B tokens (section 4.2) is left out.",
    "Left out: data loading, checkpoints, failures, kernel launches, clipping, logits and buffers in memory.",
];

/// DeepGEMM's table of products with 4096 rows on an H800, as first published.
const GEMM: &str = "DeepGEMM README (Feb 2025), H800";
const GEMM_7168: &str = "DeepGEMM README (Feb 2025), H800: 4096x4096x7168; grouped 4x8192: 1297";
const GEMM_2048: &str = "DeepGEMM README (Feb 2025), H800: 4096x7168x2048; grouped 4x8192: 1099";
const OWN: &str = "own choice: in no source";
const DATASHEET: &str = "H100 SXM datasheet, dense; the H800 computes alike";

/// In the order that they are shown in.
const SOURCES: [(&str, &str); 50] = [
    ("cluster.gpus", "section 3.1"),
    ("cluster.gpus_per_node", "section 3.1"),
    ("cluster.fp8_peak_tflops", DATASHEET),
    ("cluster.bf16_peak_tflops", DATASHEET),
    ("cluster.sms", "section 3.5.1"),
    (
        "cluster.hbm_gb",
        "H100 SXM datasheet; the H800 has the same",
    ),
    (
        "cluster.hbm_gb_s",
        "H100 SXM datasheet; the H800 has the same",
    ),
    ("cluster.nvlink_gb_s", "section 3.2.2"),
    ("cluster.ib_gb_s", "section 3.2.2"),
    ("cluster.latency_us", OWN),
    ("layout.pp", "section 3.2"),
    ("layout.ep", "section 3.2"),
    ("layout.schedule", "section 3.2.1"),
    (
        "layout.layers_per_stage",
        "not in the report: the longest rank as short as moves of a layer make it",
    ),
    (
        "layout.micro_batch",
        "DeepEP README: 4096 tokens per batch in pre-training",
    ),
    ("layout.global_batch", "section 4.2, from 469B tokens on"),
    ("layout.sequence_length", "section 4.2"),
    ("layout.overlap", "section 3.2.1, figure 4"),
    ("layout.communication_sms", "sections 3.2.2 and 3.5.1"),
    ("layout.node_limit", "sections 2.1.2 and 4.2"),
    ("layout.recompute_norms", "section 3.2.3"),
    ("layout.recompute_up_projections", "section 3.2.3"),
    ("layout.recompute_swiglu", "section 3.3.3"),
    ("training.model", "section 4.2"),
    ("training.fp8", "section 3.3"),
    ("training.tokens", "section 4.2"),
    ("training.usd_per_gpu_hour", "table 1"),
    ("training.reported_gpu_hours", "table 1, pre-training"),
    ("assumptions.fp8_tflops_k512", GEMM),
    ("assumptions.fp8_tflops_k1536", GEMM),
    ("assumptions.fp8_tflops_k2048", GEMM_2048),
    ("assumptions.fp8_tflops_k7168", GEMM_7168),
    ("assumptions.fp8_tflops_k16384", GEMM),
    (
        "assumptions.bf16_tflops",
        "FBGEMM issue 2546: 8192^3 on H100",
    ),
    (
        "assumptions.attention_forward_tflops",
        "FlashAttention-3 paper: causal, head width 128, length 4096, H100",
    ),
    (
        "assumptions.attention_backward_tflops",
        "FlashAttention-3 paper: backward, head width 128, length 4096, H100",
    ),
    ("assumptions.rate_factor", "for sensitivity"),
    (
        "assumptions.hbm_efficiency",
        "FlashMLA README: 3000 of 3350 GB/s, H800",
    ),
    (
        "assumptions.nvlink_efficiency",
        "DeepEP README: 153 of 160 GB/s, EP 8, H800",
    ),
    (
        "assumptions.dispatch_efficiency",
        "DeepEP README (Feb 2025), EP 64: 46 of 50 GB/s, own node counted, so x 7/8",
    ),
    (
        "assumptions.combine_efficiency",
        "DeepEP README (Feb 2025), EP 64: 45 of 50 GB/s, own node counted, so x 7/8",
    ),
    (
        "assumptions.expert_imbalance",
        "balanced, as in DeepSeek's published profile",
    ),
    (
        "assumptions.fp8_bytes",
        "section 3.3.2: a byte, and 4 for the scale of 128",
    ),
    ("assumptions.bf16_bytes", "section 3.3.3"),
    ("assumptions.attention_output_bytes", "section 3.3.3: E5M6"),
    ("assumptions.weight_bytes", "section 3.3, figure 6: BF16"),
    ("assumptions.gradient_bytes", "section 3.3.3: FP32"),
    (
        "assumptions.reduced_gradient_bytes",
        "as they are accumulated; not in the report",
    ),
    ("assumptions.master_bytes", "section 3.3.3: FP32"),
    ("assumptions.moments_bytes", "section 3.3.3: two in BF16"),
];

/// All values of a plan, section by section.
pub fn table(config: &PlanConfig) -> Vec<Assumption> {
    let (values, defaults) = (config.values(), PlanConfig::default().values());
    let row = |&(key, source): &(&'static str, &'static str)| {
        let value = values.get(key)?;
        let default = defaults.get(key).filter(|default| *default != value);
        Some(Assumption {
            key,
            value: text(value),
            default: default.map(text),
            source,
        })
    };
    SOURCES.iter().filter_map(row).collect()
}

fn text(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Float(number) if number.abs() >= 1e6 => format!("{number:e}"),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Array(list) if list.is_empty() => "balanced".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field without a source, or a source without a field, is a mistake.
    #[test]
    fn every_value_has_a_source() {
        let fields: Vec<String> = PlanConfig::default().values().into_keys().collect();
        let mut sources = SOURCES.map(|(key, _)| key.to_owned());
        sources.sort();
        assert_eq!(fields, sources);
    }

    #[test]
    fn a_changed_value_shows_its_default() {
        let mut config = PlanConfig::default();
        config.cluster.ib_gb_s = 25.0;
        let table = table(&config);
        let changed: Vec<_> = table.iter().filter(|row| row.default.is_some()).collect();
        assert_eq!(changed.len(), 1);
        assert_eq!(changed[0].key, "cluster.ib_gb_s");
        assert_eq!(changed[0].value, "25");
        assert_eq!(changed[0].default.as_deref(), Some("50"));
        assert_eq!(changed[0].source, "section 3.2.2");
    }
}
