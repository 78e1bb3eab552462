//! The configuration of a training run: a TOML file and values set over it.

use std::path::{Path, PathBuf};

use deepburn_model::{loss::BalanceReading, projection::Arithmetic};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;

use crate::{
    data::{DataConfig, DataError},
    parallel::Mesh,
    pipeline::schedule::Schedule,
    precision::{Fp8Ablation, Precision},
    schedule::{LearningRate, Switch},
    spike::SpikeConfig,
};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, or a value of another type; the message names it.
    #[error("{path}: {what}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A `key=value` that cannot be set.
    #[error("--set {text}: {what}")]
    Set {
        /// As it was given.
        text: String,
        /// What is wrong with it.
        what: String,
    },
    /// A value that breaks a rule.
    #[error("{key} = {value}: {rule}")]
    Rule {
        /// The key, with its section.
        key: String,
        /// What was found.
        value: String,
        /// What holds for it.
        rule: String,
    },
    /// A value in `[data]` that breaks a rule.
    #[error(transparent)]
    Data(#[from] DataError),
}

/// A training run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// What is computed and kept in which type.
    #[serde(default)]
    pub precision: Precision,
    /// What is done worse than it can be, for an experiment.
    #[serde(default, skip_serializing_if = "AblationConfig::is_none")]
    pub ablation: AblationConfig,
    /// Where results go, and how long training takes.
    pub run: RunConfig,
    /// What is trained.
    pub model: ModelSource,
    /// What it is trained on.
    pub data: DataConfig,
    /// How much of it per step.
    pub batch: BatchConfig,
    /// AdamW and clipping.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Learning rate over the run.
    pub schedule: LearningRate,
    /// Weights of the losses, and balancing.
    #[serde(default)]
    pub loss: LossConfig,
    /// The average of the weights, if one is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaConfig>,
    /// What memory is saved on.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// When the held-out text is looked at.
    #[serde(default)]
    pub validation: ValidationConfig,
    /// When and how many checkpoints are kept.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// How many ranks train, and how they share the work.
    #[serde(default)]
    pub parallel: ParallelConfig,
}

/// `[ablation]`: experiments that show what a part of the recipe is good for, by leaving it out.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct AblationConfig {
    /// Of `precision = "fp8"`, on the CPU.
    pub fp8: Option<Fp8Ablation>,
}

impl AblationConfig {
    fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// `[run]`
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// Folder of the run: checkpoints and metrics.
    pub directory: PathBuf,
    /// Optimizer steps.
    pub steps: u64,
    /// Seed of weights, data order and selection.
    #[serde(default)]
    pub seed: u64,
}

/// `[model]`
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSource {
    /// A `config.json`, relative to the training configuration. Its vocabulary and special tokens are replaced by
    /// those of the tokenizer.
    pub config: PathBuf,
}

/// `[batch]`
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConfig {
    /// Sequences per micro-batch.
    pub sequences: usize,
    /// Tokens per sequence (4096 in the report).
    pub sequence_length: usize,
    /// Micro-batches per optimizer step.
    #[serde(default = "one")]
    pub accumulation: usize,
}

/// `[optimizer]`: AdamW (report section 4.2).
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment. Not in the report; PyTorch's default.
    pub epsilon: f64,
    /// Decoupled weight decay, on every parameter.
    pub weight_decay: f64,
    /// Largest global norm of the gradients.
    pub clip_norm: f64,
    /// What happens at gradients that are not finite.
    pub non_finite: NonFinite,
    /// What happens at a loss far above those before.
    pub spike: SpikeConfig,
}

/// What happens to a step whose gradients are not finite. A loss that is not ends the run.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NonFinite {
    /// The run ends before the optimizer step and names the tensors.
    #[default]
    Halt,
    /// The optimizer step is left out, and counted in the metrics.
    Skip,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            non_finite: NonFinite::Halt,
            spike: SpikeConfig::default(),
        }
    }
}

/// `[ema]`: an exponential moving average of the weights on the CPU (report section 3.2.3).
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EmaConfig {
    /// What is left of the average at each step.
    pub decay: f64,
}

/// `[memory]`
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryConfig {
    /// Whether the backward pass computes the outputs of RMSNorm and of MLA's up-projections again instead of keeping them
    /// (report section 3.2.3). Results are the same.
    pub recompute: bool,
}

/// `[loss]` (report sections 2.1.2, 2.2 and 4.2).
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    /// Weight of the MTP loss, lambda.
    pub mtp_weight: Switch,
    /// Bias update speed, gamma.
    pub bias_update_speed: Switch,
    /// Weight of the sequence-wise balance loss, alpha.
    pub sequence_balance_loss_weight: f64,
    /// Which experts that loss counts.
    pub balance_reading: Reading,
}

impl Default for LossConfig {
    fn default() -> Self {
        Self {
            mtp_weight: Switch::mtp_weight(),
            bias_update_speed: Switch::bias_speed(),
            sequence_balance_loss_weight: 1e-4,
            balance_reading: Reading::Paper,
        }
    }
}

/// [`BalanceReading`] as it is written.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Reading {
    /// The top K of the affinities alone (equation 18).
    Paper,
    /// The experts really used.
    Actual,
}

impl From<Reading> for BalanceReading {
    fn from(reading: Reading) -> Self {
        match reading {
            Reading::Paper => Self::Paper,
            Reading::Actual => Self::Actual,
        }
    }
}

/// `[validation]`
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationConfig {
    /// Steps between validations; one follows the last step in any case.
    pub interval: u64,
    /// Windows looked at, evenly spread over the split; all of it if there are fewer.
    pub windows: u64,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        Self {
            interval: 200,
            windows: 64,
        }
    }
}

/// `[checkpoint]`
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between checkpoints; one follows the last step in any case.
    pub interval: u64,
    /// Newest checkpoints that are kept.
    pub keep: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self {
            interval: 500,
            keep: 2,
        }
    }
}

/// `[parallel]` (report section 3.2)
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParallelConfig {
    /// Ranks that share the layers.
    pub pipeline: usize,
    /// Ranks that share the routed experts of a layer.
    pub expert: usize,
    /// How often all of that is repeated.
    pub data: usize,
    /// In which order a rank of a pipeline works.
    pub schedule: ScheduleName,
    /// Micro-batches of each pipeline in a step: `batch.accumulation` divided among them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batches: Option<usize>,
    /// Layers of each stage; as even as they can be if it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Whether stages keep only their inputs, and compute their forward passes again for the backward passes.
    pub recompute: bool,
    /// Whether the two passes of a pair F&B compute on two threads, one while tokens of the other travel to their experts
    /// and back. Nothing to a pipeline of one rank, to schedules without pairs, and to experts that are not divided.
    pub overlap: bool,
    /// What carries bytes between ranks that are processes. Those that are threads of one need nothing for it.
    pub communicator: CommunicatorName,
    /// Seconds that ranks wait for each other while nothing moves before they give up.
    pub deadline: u64,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self {
            pipeline: 1,
            expert: 1,
            data: 1,
            schedule: ScheduleName::OneFOneB,
            micro_batches: None,
            layers: None,
            recompute: false,
            overlap: true,
            communicator: CommunicatorName::Mpi,
            deadline: 600,
        }
    }
}

impl ParallelConfig {
    /// How the ranks are arranged.
    pub fn mesh(&self) -> Mesh {
        Mesh {
            data: self.data,
            pipeline: self.pipeline,
            expert: self.expert,
        }
    }
}

/// What carries bytes between processes.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CommunicatorName {
    /// MPI, which has started them.
    Mpi,
    /// NCCL, between their GPUs.
    Nccl,
}

/// [`Schedule`] as it is written.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub enum ScheduleName {
    /// 1F1B.
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// ZB1P.
    #[serde(rename = "zb1p")]
    ZeroBubble,
    /// DualPipe.
    #[serde(rename = "dualpipe")]
    DualPipe,
    /// DualPipeV.
    #[serde(rename = "dualpipe-v")]
    DualPipeV,
}

impl From<ScheduleName> for Schedule {
    fn from(name: ScheduleName) -> Self {
        match name {
            ScheduleName::OneFOneB => Self::OneFOneB,
            ScheduleName::ZeroBubble => Self::ZeroBubble,
            ScheduleName::DualPipe => Self::DualPipe,
            ScheduleName::DualPipeV => Self::DualPipeV,
        }
    }
}

fn one() -> usize {
    1
}

impl TrainConfig {
    /// Reads a file and sets values over it, each `section.key=value` with a TOML value or a bare string.
    ///
    /// # Errors
    /// An unreadable file, an unknown key, or a value that breaks a rule.
    pub fn read(path: &Path, set: &[String]) -> Result<Self, ConfigError> {
        let mut config = read::<Self>(path, set)?.validate()?;
        let folder = path.parent().unwrap_or(Path::new(""));
        config.model.config = folder.join(&config.model.config);
        Ok(config)
    }

    fn validate(mut self) -> Result<Self, ConfigError> {
        let positive = [
            ("run.steps", self.run.steps),
            ("batch.sequences", self.batch.sequences as u64),
            ("batch.accumulation", self.batch.accumulation as u64),
            ("validation.interval", self.validation.interval),
            ("validation.windows", self.validation.windows),
            ("checkpoint.interval", self.checkpoint.interval),
            ("checkpoint.keep", self.checkpoint.keep as u64),
            ("parallel.pipeline", self.parallel.pipeline as u64),
            ("parallel.expert", self.parallel.expert as u64),
            ("parallel.data", self.parallel.data as u64),
            ("parallel.deadline", self.parallel.deadline),
        ];
        for (key, value) in positive {
            if value == 0 {
                return Err(ConfigError::rule(key, value, "must be positive"));
            }
        }
        if let (Some(ablation), Precision::Fp32 | Precision::Bf16) =
            (self.ablation.fp8, self.precision)
        {
            let rule = "is an experiment with precision = \"fp8\"";
            return Err(ConfigError::rule("ablation.fp8", json!(ablation), rule));
        }
        if self.batch.sequence_length < 2 {
            let rule = "must be at least 2";
            return Err(ConfigError::rule(
                "batch.sequence_length",
                self.batch.sequence_length,
                rule,
            ));
        }
        let optimizer = &self.optimizer;
        for (key, beta) in [("beta1", optimizer.beta1), ("beta2", optimizer.beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(ConfigError::rule(
                    &format!("optimizer.{key}"),
                    beta,
                    "must be at least 0, below 1",
                ));
            }
        }
        let not_negative = [
            ("optimizer.weight_decay", optimizer.weight_decay),
            (
                "loss.sequence_balance_loss_weight",
                self.loss.sequence_balance_loss_weight,
            ),
            ("loss.mtp_weight.first", self.loss.mtp_weight.first),
            ("loss.mtp_weight.then", self.loss.mtp_weight.then),
            (
                "loss.bias_update_speed.first",
                self.loss.bias_update_speed.first,
            ),
            (
                "loss.bias_update_speed.then",
                self.loss.bias_update_speed.then,
            ),
        ];
        for (key, value) in not_negative {
            if !(value.is_finite() && value >= 0.0) {
                return Err(ConfigError::rule(
                    key,
                    value,
                    "must be zero or a positive number",
                ));
            }
        }
        for (key, value) in [
            ("optimizer.epsilon", optimizer.epsilon),
            ("optimizer.clip_norm", optimizer.clip_norm),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ConfigError::rule(key, value, "must be a positive number"));
            }
        }
        if let Some((key, value, rule)) = optimizer.spike.problem() {
            let key = format!("optimizer.spike.{key}");
            return Err(ConfigError::rule(&key, value, rule));
        }
        if let Some(EmaConfig { decay }) = self.ema
            && !(decay > 0.0 && decay < 1.0)
        {
            let rule = "must be above 0, below 1";
            return Err(ConfigError::rule("ema.decay", decay, rule));
        }
        if let Some((key, value, rule)) = self.schedule.problem() {
            return Err(ConfigError::rule(&format!("schedule.{key}"), value, rule));
        }
        self.data.validate()?;
        self.share_micro_batches()?;
        Ok(self)
    }

    /// How the model computes.
    pub fn arithmetic(&self) -> Arithmetic {
        Arithmetic {
            ablation: self.ablation.fp8.map(Into::into),
            recompute: self.memory.recompute,
            ..self.precision.arithmetic()
        }
    }

    /// Divides the micro-batches of a step among the pipelines, or adds up those of the pipelines where the step does not
    /// say.
    fn share_micro_batches(&mut self) -> Result<(), ConfigError> {
        let parallel = &mut self.parallel;
        let pipelines = parallel.data.saturating_mul(parallel.expert);
        let accumulation = &mut self.batch.accumulation;
        match parallel.micro_batches {
            Some(each) if *accumulation == 1 => *accumulation = each.saturating_mul(pipelines),
            _ => (),
        }
        let each = *accumulation / pipelines;
        if each.saturating_mul(pipelines) != *accumulation
            || parallel.micro_batches.is_some_and(|asked| asked != each)
        {
            let per_pipeline = match parallel.micro_batches {
                Some(asked) => format!("parallel.micro_batches {asked}"),
                None => "a whole number".into(),
            };
            let rule =
                format!("must be parallel.data x parallel.expert {pipelines} times {per_pipeline}");
            return Err(ConfigError::rule(
                "batch.accumulation",
                *accumulation,
                &rule,
            ));
        }
        let schedule = Schedule::from(parallel.schedule);
        let timeline = schedule.timeline(parallel.pipeline, each);
        timeline.map_err(|refused| {
            if refused.field == "ranks" {
                return ConfigError::rule("parallel.pipeline", refused.value, &refused.rule);
            }
            let rule = match pipelines {
                1 => refused.rule,
                _ => format!(
                    "{} in each of {pipelines} pipelines, not {each}",
                    refused.rule
                ),
            };
            ConfigError::rule("batch.accumulation", *accumulation, &rule)
        })?;
        Ok(())
    }

    /// Micro-batches of each pipeline in a step.
    pub fn micro_batches_per_pipeline(&self) -> usize {
        self.batch.accumulation / self.parallel.mesh().pipelines()
    }

    /// Tokens predicted per optimizer step.
    pub fn tokens_per_step(&self) -> u64 {
        let batch = &self.batch;
        (batch.sequences * batch.sequence_length * batch.accumulation) as u64
    }
}

impl ConfigError {
    fn syntax(error: impl std::fmt::Display) -> Self {
        Self::Syntax {
            path: PathBuf::new(),
            what: error.to_string().trim_end().to_owned(),
        }
    }

    fn in_file(self, file: &Path) -> Self {
        match self {
            Self::Syntax { what, .. } => Self::Syntax {
                path: file.to_owned(),
                what,
            },
            other => other,
        }
    }

    pub(crate) fn rule(key: &str, value: impl std::fmt::Display, rule: &str) -> Self {
        Self::Rule {
            key: key.to_owned(),
            value: value.to_string(),
            rule: rule.to_owned(),
        }
    }
}

/// A TOML file of any shape, with values set over it.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, set: &[String]) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    parse(&text, set).map_err(|error| error.in_file(path))
}

/// The text of such a file.
pub(crate) fn parse<T: DeserializeOwned>(text: &str, set: &[String]) -> Result<T, ConfigError> {
    let mut table: toml::Table = text.parse().map_err(ConfigError::syntax)?;
    for text in set {
        assign(&mut table, text)?;
    }
    // Through text again, so that messages about types and unknown keys show the line.
    toml::from_str(&toml::to_string(&table).map_err(ConfigError::syntax)?)
        .map_err(ConfigError::syntax)
}

fn assign(table: &mut toml::Table, text: &str) -> Result<(), ConfigError> {
    let wrong = |what: &str| ConfigError::Set {
        text: text.to_owned(),
        what: what.to_owned(),
    };
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| wrong("expected section.key=value"))?;
    let mut names: Vec<&str> = key.trim().split('.').collect();
    let last = names
        .pop()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| wrong("expected a key"))?;
    let mut place = table;
    for name in names {
        place = place
            .entry(name)
            .or_insert_with(|| toml::Table::new().into())
            .as_table_mut()
            .ok_or_else(|| wrong(&format!("{name} is a value, not a section")))?;
    }
    let value = value.trim();
    // What is not a TOML value is a string that needs no quotes on a command line.
    let parsed = format!("value = {value}").parse::<toml::Table>();
    let parsed = parsed.ok().and_then(|mut table| table.remove("value"));
    place.insert(last.to_owned(), parsed.unwrap_or_else(|| value.into()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        [run]
        directory = "runs/x"
        steps = 10
        [model]
        config = "../model/tiny.json"
        [data]
        sources = [{ path = "corpus" }]
        tokenizer = { vocab_size = 300, max_train_bytes = 1000000 }
        [batch]
        sequences = 2
        sequence_length = 16
        [schedule]
        peak = 1e-3
        warmup_steps = 2
    "#;

    fn read(set: &[&str]) -> Result<TrainConfig, String> {
        let set: Vec<String> = set.iter().map(|&text| text.to_owned()).collect();
        parse(TEXT, &set)
            .and_then(TrainConfig::validate)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_the_reports() {
        let config = read(&[]).unwrap();
        assert_eq!(
            (config.optimizer.beta1, config.optimizer.beta2),
            (0.9, 0.95)
        );
        assert_eq!(config.loss.bias_update_speed.first, 0.001);
        assert_eq!(config.tokens_per_step(), 32);
    }

    #[test]
    fn values_are_set_over_the_file() {
        let config = read(&[
            "run.steps=20",
            "run.directory=runs/y",
            "loss.mtp_weight.first=0.2",
        ]);
        // A partly given table lacks the others.
        assert!(config.unwrap_err().contains("missing field"));
        let config = read(&[
            "run.steps=20",
            "run.directory = runs/y",
            "optimizer.clip_norm=0.5",
        ]);
        let config = config.unwrap();
        assert_eq!((config.run.steps, config.optimizer.clip_norm), (20, 0.5));
        assert_eq!(config.run.directory, Path::new("runs/y"));
    }

    #[test]
    fn errors_name_what_is_wrong() {
        assert!(
            read(&["run.stepps=20"])
                .unwrap_err()
                .contains("unknown field `stepps`")
        );
        assert!(
            read(&["run.steps=many"])
                .unwrap_err()
                .contains("expected u64")
        );
        assert_eq!(
            read(&["run.steps=0"]).unwrap_err(),
            "run.steps = 0: must be positive"
        );
        assert_eq!(
            read(&["steps"]).unwrap_err(),
            "--set steps: expected section.key=value"
        );
        assert_eq!(
            read(&["run.steps.x=1"]).unwrap_err(),
            "--set run.steps.x=1: steps is a value, not a section"
        );
        assert_eq!(
            read(&["optimizer.beta2=1"]).unwrap_err(),
            "optimizer.beta2 = 1: must be at least 0, below 1"
        );
        assert_eq!(
            read(&["ablation.fp8=per-tensor"]).unwrap_err(),
            "ablation.fp8 = \"per-tensor\": is an experiment with precision = \"fp8\""
        );
        assert_eq!(
            read(&["ema.decay=1"]).unwrap_err(),
            "ema.decay = 1: must be above 0, below 1"
        );
        assert_eq!(
            read(&["optimizer.spike.window=7"]).unwrap_err(),
            "optimizer.spike.window = 7: must be at least 8"
        );
        let unknown = read(&["precision=fp8", "ablation.fp8=per-row"]).unwrap_err();
        assert!(unknown.contains("unknown variant `per-row`"), "{unknown}");
        assert_eq!(
            read(&["schedule.decay_end=0.1"]).unwrap_err(),
            "schedule.decay_end = 0.1: must be decay_start to 1"
        );
    }
}
