//! What is planned: a TOML file with sections `[cluster]`, `[layout]`, `[training]` and `[assumptions]`, and values set
//! over it. Defaults are those of the report's training of DeepSeek-V3; [`super::assumptions`] has their sources.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use deepburn_model::config::ModelConfig;
use serde::{Deserialize, Serialize};

use crate::{
    config::{ConfigError, parse, read},
    pipeline::schedule::{Route, Schedule},
};

/// The whole file.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanConfig {
    /// The machines.
    pub cluster: Cluster,
    /// How the model and its batch lie on them.
    pub layout: Layout,
    /// What is trained, and on how much.
    pub training: Training,
    /// Rates that are reached, and sizes of what is kept and sent.
    pub assumptions: Assumptions,
}

/// `[cluster]`
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cluster {
    /// All GPUs.
    pub gpus: usize,
    /// GPUs that NVLink connects.
    pub gpus_per_node: usize,
    /// Dense FP8 peak of a GPU; only for utilisation.
    pub fp8_peak_tflops: f64,
    /// Dense BF16 peak of a GPU; only for utilisation.
    pub bf16_peak_tflops: f64,
    /// Streaming multiprocessors of a GPU.
    pub sms: usize,
    /// Memory of a GPU, in 10^9 bytes.
    pub hbm_gb: f64,
    /// Its bandwidth.
    pub hbm_gb_s: f64,
    /// NVLink bandwidth of a GPU, one way.
    pub nvlink_gb_s: f64,
    /// Network bandwidth of a GPU, one way.
    pub ib_gb_s: f64,
    /// From the start of a transfer between nodes to its first byte.
    pub latency_us: f64,
}

/// `[layout]`
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Layout {
    /// Pipeline ranks.
    pub pp: usize,
    /// GPUs that share the experts of a layer.
    pub ep: usize,
    /// Order of forward and backward passes.
    pub schedule: Schedule,
    /// Layers of each stage; none for a balanced partition.
    pub layers_per_stage: Vec<usize>,
    /// Sequences of a micro-batch.
    pub micro_batch: usize,
    /// Sequences of an optimizer step, on all GPUs.
    pub global_batch: usize,
    /// Tokens of a sequence.
    pub sequence_length: usize,
    /// Whether pairs hide communication behind computation.
    pub overlap: bool,
    /// Multiprocessors that communicate meanwhile.
    pub communication_sms: usize,
    /// Whether a token's experts come from `topk_group` groups only.
    pub node_limit: bool,
    /// Whether outputs of norms are computed again on the way back.
    pub recompute_norms: bool,
    /// Whether queries, keys and values are.
    pub recompute_up_projections: bool,
    /// Whether outputs of SwiGLU are.
    pub recompute_swiglu: bool,
}

/// `[training]`
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Training {
    /// A `config.json`, relative to the file.
    pub model: PathBuf,
    /// Whether products are in FP8; if not, in BF16.
    pub fp8: bool,
    /// All tokens.
    pub tokens: f64,
    /// Rent.
    pub usd_per_gpu_hour: f64,
    /// What it took in reality, to be printed beside; 0 if not known.
    pub reported_gpu_hours: f64,
}

/// `[assumptions]`
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Assumptions {
    /// FP8 product with an inner dimension of 512, all multiprocessors; those below likewise.
    pub fp8_tflops_k512: f64,
    /// Inner dimension 1536.
    pub fp8_tflops_k1536: f64,
    /// Inner dimension 2048.
    pub fp8_tflops_k2048: f64,
    /// Inner dimension 7168.
    pub fp8_tflops_k7168: f64,
    /// Inner dimension 16384.
    pub fp8_tflops_k16384: f64,
    /// BF16 products.
    pub bf16_tflops: f64,
    /// Attention between queries and keys, forward.
    pub attention_forward_tflops: f64,
    /// Attention, backward.
    pub attention_backward_tflops: f64,
    /// Factor on all rates above.
    pub rate_factor: f64,
    /// Reached part of `hbm_gb_s`.
    pub hbm_efficiency: f64,
    /// Reached part of `nvlink_gb_s`.
    pub nvlink_efficiency: f64,
    /// Reached part of `ib_gb_s` when tokens are dispatched.
    pub dispatch_efficiency: f64,
    /// Reached part of `ib_gb_s` when results are combined, and for all other transfers.
    pub combine_efficiency: f64,
    /// Tokens of the GPU with the most, relative to the mean: factor on the experts' products.
    pub expert_imbalance: f64,
    /// Per element of a dispatched token in FP8, its scales included.
    pub fp8_bytes: f64,
    /// Per element of everything that is in BF16.
    pub bf16_bytes: f64,
    /// Per element of the attention output that is kept.
    pub attention_output_bytes: f64,
    /// Per weight as it is computed with.
    pub weight_bytes: f64,
    /// Per gradient as it is accumulated.
    pub gradient_bytes: f64,
    /// Per gradient as it is summed over replicas.
    pub reduced_gradient_bytes: f64,
    /// Per weight as the optimizer keeps it.
    pub master_bytes: f64,
    /// Per weight, of both moments.
    pub moments_bytes: f64,
}

impl Default for Cluster {
    fn default() -> Self {
        Self {
            gpus: 2048,
            gpus_per_node: 8,
            fp8_peak_tflops: 1979.0,
            bf16_peak_tflops: 989.0,
            sms: 132,
            hbm_gb: 80.0,
            hbm_gb_s: 3350.0,
            nvlink_gb_s: 160.0,
            ib_gb_s: 50.0,
            latency_us: 5.0,
        }
    }
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            pp: 16,
            ep: 64,
            schedule: Schedule::DualPipe,
            layers_per_stage: Vec::new(),
            micro_batch: 1,
            global_batch: 15360,
            sequence_length: 4096,
            overlap: true,
            communication_sms: 20,
            node_limit: true,
            recompute_norms: true,
            recompute_up_projections: true,
            recompute_swiglu: true,
        }
    }
}

impl Default for Training {
    fn default() -> Self {
        Self {
            model: "../model/deepseek-v3-671b.json".into(),
            fp8: true,
            tokens: 14.8e12,
            usd_per_gpu_hour: 2.0,
            reported_gpu_hours: 0.0,
        }
    }
}

impl Default for Assumptions {
    fn default() -> Self {
        Self {
            fp8_tflops_k512: 590.0,
            fp8_tflops_k1536: 990.0,
            fp8_tflops_k2048: 1025.0,
            fp8_tflops_k7168: 1304.0,
            fp8_tflops_k16384: 1358.0,
            bf16_tflops: 585.0,
            attention_forward_tflops: 579.0,
            attention_backward_tflops: 542.0,
            rate_factor: 1.0,
            hbm_efficiency: 0.896,
            nvlink_efficiency: 0.956,
            dispatch_efficiency: 0.805,
            combine_efficiency: 0.7875,
            expert_imbalance: 1.0,
            fp8_bytes: 1.03125,
            bf16_bytes: 2.0,
            attention_output_bytes: 1.5,
            weight_bytes: 2.0,
            gradient_bytes: 4.0,
            reduced_gradient_bytes: 4.0,
            master_bytes: 4.0,
            moments_bytes: 4.0,
        }
    }
}

impl PlanConfig {
    /// Reads a file and sets values over it, each `section.key=value`.
    ///
    /// # Errors
    /// An unreadable file, an unknown key, or a value of another type. Rules are checked when the model is known.
    pub fn read(path: &Path, set: &[String]) -> Result<Self, ConfigError> {
        read(path, set)
    }

    /// Where the model's shape is, for a configuration that was read from `path`.
    pub fn model_path(&self, path: &Path) -> PathBuf {
        let folder = path.parent().unwrap_or(Path::new(""));
        folder.join(&self.training.model)
    }

    /// As [`PlanConfig::read`], for the text of a file.
    ///
    /// # Errors
    /// As there.
    pub fn parse(text: &str, set: &[String]) -> Result<Self, ConfigError> {
        parse(text, set)
    }

    /// Pipelines side by side.
    pub fn data_parallel(&self) -> usize {
        self.cluster.gpus / self.layout.pp
    }

    /// Nodes that the experts of a layer are on.
    pub fn expert_nodes(&self) -> usize {
        (self.layout.ep / self.cluster.gpus_per_node).max(1)
    }

    /// Micro-batches of a step that go through one pipeline, in both directions.
    pub fn micro_batches(&self) -> usize {
        self.layout.global_batch / self.data_parallel() / self.layout.micro_batch
    }

    /// Tokens of a micro-batch.
    pub fn tokens(&self) -> usize {
        self.layout.micro_batch * self.layout.sequence_length
    }

    /// Ranks of a pipeline that have the same stage.
    pub fn copies(&self) -> usize {
        match self.layout.schedule.placement(self.layout.pp).route {
            Route::BothWays => 2,
            Route::OneWay | Route::Folded => 1,
        }
    }

    /// Checks what all formulas rely on.
    ///
    /// # Errors
    /// The first broken rule, with key and value.
    pub fn validate(&self, model: &ModelConfig) -> Result<(), ConfigError> {
        self.numbers()?;
        let Self {
            cluster, layout, ..
        } = self;
        let divides = |key, value, (name, whole): (&str, usize)| match whole.is_multiple_of(value) {
            true => Ok(()),
            false => {
                let rule = format!("must divide {name} = {whole}");
                Err(ConfigError::rule(key, value, &rule))
            }
        };
        let gpus = ("cluster.gpus", cluster.gpus);
        divides("cluster.gpus_per_node", cluster.gpus_per_node, gpus)?;
        divides("layout.pp", layout.pp, gpus)?;
        let pipelines = (
            "the number of pipelines, cluster.gpus / layout.pp",
            self.data_parallel(),
        );
        divides("layout.ep", layout.ep, pipelines)?;
        let experts = ("n_routed_experts of the model", model.n_routed_experts);
        divides("layout.ep", layout.ep, experts)?;
        let node = cluster.gpus_per_node;
        if !layout.ep.is_multiple_of(node) && !node.is_multiple_of(layout.ep) {
            let rule = format!("must be a multiple or a divisor of cluster.gpus_per_node = {node}");
            return Err(ConfigError::rule("layout.ep", layout.ep, &rule));
        }
        let (nodes, groups) = (self.expert_nodes(), model.n_group);
        if layout.node_limit && !nodes.is_multiple_of(groups) && !groups.is_multiple_of(nodes) {
            let rule = format!(
                "spreads experts over {nodes} nodes, which must be a multiple or a divisor of n_group = {groups} \
                 unless layout.node_limit = false"
            );
            return Err(ConfigError::rule("layout.ep", layout.ep, &rule));
        }
        let turn = self.data_parallel() * layout.micro_batch;
        if !layout.global_batch.is_multiple_of(turn) {
            let rule = format!(
                "must be a multiple of {turn}: layout.micro_batch = {} for each of {} pipelines",
                layout.micro_batch,
                self.data_parallel()
            );
            let key = "layout.global_batch";
            return Err(ConfigError::rule(key, layout.global_batch, &rule));
        }
        if layout.communication_sms >= cluster.sms {
            let rule = format!("must be below cluster.sms = {}", cluster.sms);
            let key = "layout.communication_sms";
            return Err(ConfigError::rule(key, layout.communication_sms, &rule));
        }
        if layout.sequence_length > model.max_position_embeddings {
            let most = model.max_position_embeddings;
            let rule = format!("must be at most max_position_embeddings = {most} of the model");
            let key = "layout.sequence_length";
            return Err(ConfigError::rule(key, layout.sequence_length, &rule));
        }
        Ok(())
    }

    /// Every number of the file that is not in a list is positive, and none is so large that products overflow.
    fn numbers(&self) -> Result<(), ConfigError> {
        const ZERO_IS_FINE: [&str; 4] = [
            "cluster.latency_us",
            "layout.communication_sms",
            "training.usd_per_gpu_hour",
            "training.reported_gpu_hours",
        ];
        for (key, value) in self.values() {
            let (number, most) = match value {
                toml::Value::Integer(number) => (number as f64, (1 << 24) as f64),
                toml::Value::Float(number) => (number, 1e18),
                _ => continue,
            };
            let zero = ZERO_IS_FINE.contains(&key.as_str());
            if !(0.0..=most).contains(&number) || number == 0.0 && !zero {
                let least = if zero { "from 0" } else { "above 0" };
                let rule = format!("must be a number {least}, at most {most:e}");
                return Err(ConfigError::rule(&key, number, &rule));
            }
        }
        for (key, part) in [
            ("hbm_efficiency", self.assumptions.hbm_efficiency),
            ("nvlink_efficiency", self.assumptions.nvlink_efficiency),
            ("dispatch_efficiency", self.assumptions.dispatch_efficiency),
            ("combine_efficiency", self.assumptions.combine_efficiency),
        ] {
            if part > 1.0 {
                let key = format!("assumptions.{key}");
                return Err(ConfigError::rule(&key, part, "must be at most 1"));
            }
        }
        if self.assumptions.expert_imbalance < 1.0 {
            let (key, value) = (
                "assumptions.expert_imbalance",
                self.assumptions.expert_imbalance,
            );
            return Err(ConfigError::rule(key, value, "must be at least 1"));
        }
        Ok(())
    }

    /// All values by `section.key`.
    pub fn values(&self) -> BTreeMap<String, toml::Value> {
        let sections = toml::Table::try_from(self).expect("every field is a TOML value");
        let fields = sections.into_iter().flat_map(|(section, fields)| {
            let toml::Value::Table(fields) = fields else {
                unreachable!("every field of the file is a section");
            };
            let named = move |(key, value)| (format!("{section}.{key}"), value);
            fields.into_iter().map(named)
        });
        fields.collect()
    }
}
