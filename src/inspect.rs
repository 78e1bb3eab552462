//! `deepburn inspect`: the shape of a model, its parameters, and what the files of a checkpoint hold.

use std::{
    collections::BTreeMap,
    fmt::Write,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use burn::tensor::Device;
use deepburn_model::{
    checkpoint,
    config::ModelConfig,
    mmap::MappedFile,
    parameters::{self, ParameterCount},
    transformer::Transformer,
};
use deepburn_train::precision::{BYTES_OF_AVERAGE, Precision};
use indicatif::{HumanBytes, HumanCount};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::{model_dir, print_now};

const COUNTED: &str = "\
Total: embedding and output head included, MTP modules apart. Active: what one token is multiplied with, so only
its chosen experts; the embedding is a lookup and not counted, unless it is the output head as well. MTP modules:
without the embedding and the head, which they share with the main model.
";

/// Show the shape of a model, count its parameters and list the files of a checkpoint.
///
/// No weights are read: of *.safetensors files only the headers.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A config.json, the folder of a checkpoint, or the folder of a training run
    path: PathBuf,

    /// List every stored tensor with its type and shape
    #[arg(long)]
    tensors: bool,

    /// Say what training it in this precision keeps in memory: fp32, bf16 or fp8
    #[arg(long, value_name = "PRECISION", value_parser = precision)]
    training: Option<Precision>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn precision(name: &str) -> Result<Precision, String> {
    serde_json::from_value(json!(name)).map_err(|error| error.to_string())
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let report = Report::read(&args.path)?;
    let text = if args.json {
        let mut value = report.json(args.tensors);
        if let Some(precision) = args.training {
            value["training_bytes"] = report.training(precision).into_iter().collect();
            value["average_bytes"] = json!(report.average());
        }
        serde_json::to_string_pretty(&value).context("cannot write JSON")? + "\n"
    } else {
        let mut text = report.text(args.tensors);
        if let Some(precision) = args.training {
            report.training_text(&mut text, precision);
        }
        text
    };
    // Whether somebody reads to the end makes no difference.
    let _ = print_now(&text).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

struct Report {
    path: PathBuf,
    config: ModelConfig,
    count: ParameterCount,
    /// `None` for a configuration alone.
    files: Option<Vec<WeightFile>>,
}

struct WeightFile {
    name: String,
    bytes: u64,
    tensors: Vec<StoredTensor>,
}

struct StoredTensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

impl Report {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let path = if path.is_file() {
            path.to_owned()
        } else {
            model_dir::resolve(path)?
        };
        let config = checkpoint::read_config(&path)?;
        // Parameters are made when first used: this model takes no memory for them.
        let listed = parameters::list(&Transformer::new(&config, 0, &Device::flex()));
        Ok(Self {
            count: ParameterCount::of(&listed, &config),
            files: path.is_dir().then(|| weight_files(&path)).transpose()?,
            config,
            path,
        })
    }

    fn text(&self, tensors: bool) -> String {
        let mut text = format!("{}\n\n", self.path.display());
        for (key, value) in keys(&self.config) {
            line(&mut text, format_args!("{key:<26}{value}"));
        }
        let (total, active) = (self.count.total(), self.count.active());
        let headline = format!(
            "\nparameters: {} total, {} active per token\n",
            human_total(total),
            human_active(active)
        );
        line(&mut text, format_args!("{headline}"));
        row(&mut text, "", "total", "active");
        for (part, total, active) in parts(&self.count) {
            row(&mut text, part, &exact(total), &exact(active));
        }
        row(&mut text, "sum", &exact(total), &exact(active));
        row(&mut text, "MTP modules", &exact(self.count.mtp), "");
        line(&mut text, format_args!("\n{COUNTED}"));
        let cache = self.config.cache_bytes_per_token();
        line(
            &mut text,
            format_args!("latent cache: {} bytes per token in float32", exact(cache)),
        );
        if let Some(files) = &self.files {
            text.push('\n');
            files_text(&mut text, files, tensors);
        }
        text
    }

    /// Bytes that training keeps for the parameters, MTP modules included, whatever the batch.
    fn training(&self, precision: Precision) -> [(&'static str, usize); 3] {
        let parameters = self.count.total() + self.count.mtp;
        let bytes = precision.bytes_per_parameter();
        bytes.map(|(part, bytes)| (part, bytes * parameters))
    }

    /// Bytes on the CPU if the run keeps an average of the weights.
    fn average(&self) -> u64 {
        (BYTES_OF_AVERAGE * (self.count.total() + self.count.mtp)) as u64
    }

    fn training_text(&self, text: &mut String, precision: Precision) {
        let parts = self.training(precision);
        let sum = parts.iter().map(|(_, bytes)| *bytes as u64).sum();
        let parts = parts.map(|(part, bytes)| format!("{part} {}", HumanBytes(bytes as u64)));
        let name = json!(precision);
        let name = name.as_str().unwrap_or_default();
        line(
            text,
            format_args!(
                "\ntraining in {name}: {} = {}, and the activations of a batch; with [ema] {} more on the CPU",
                parts.join(" + "),
                HumanBytes(sum),
                HumanBytes(self.average())
            ),
        );
    }

    fn json(&self, tensors: bool) -> Value {
        let config: serde_json::Map<String, Value> = keys(&self.config)
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect();
        let parts: serde_json::Map<String, Value> = parts(&self.count)
            .into_iter()
            .map(|(part, total, active)| {
                (
                    part.replace(' ', "_"),
                    json!({ "total": total, "active": active }),
                )
            })
            .collect();
        let mut report = json!({
            "path": self.path,
            "config": config,
            "parameters": {
                "total": self.count.total(),
                "active": self.count.active(),
                "mtp": self.count.mtp,
                "parts": parts,
            },
            "cache_bytes_per_token": self.config.cache_bytes_per_token(),
        });
        if let Some(files) = &self.files {
            report["files"] = files.iter().map(|file| file.json(tensors)).collect();
        }
        report
    }
}

/// The keys of `config.json` that shape the model.
fn keys(config: &ModelConfig) -> Vec<(&'static str, Value)> {
    let yarn = config.rope_scaling.as_ref().map(|yarn| {
        json!({
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
        })
    });
    vec![
        ("vocab_size", json!(config.vocab_size)),
        ("hidden_size", json!(config.hidden_size)),
        ("intermediate_size", json!(config.intermediate_size)),
        ("moe_intermediate_size", json!(config.moe_intermediate_size)),
        ("num_hidden_layers", json!(config.num_hidden_layers)),
        ("first_k_dense_replace", json!(config.first_k_dense_replace)),
        (
            "num_nextn_predict_layers",
            json!(config.num_nextn_predict_layers),
        ),
        ("num_attention_heads", json!(config.num_attention_heads)),
        ("q_lora_rank", json!(config.q_lora_rank)),
        ("kv_lora_rank", json!(config.kv_lora_rank)),
        ("qk_nope_head_dim", json!(config.qk_nope_head_dim)),
        ("qk_rope_head_dim", json!(config.qk_rope_head_dim)),
        ("v_head_dim", json!(config.v_head_dim)),
        ("n_routed_experts", json!(config.n_routed_experts)),
        ("n_shared_experts", json!(config.n_shared_experts)),
        ("num_experts_per_tok", json!(config.num_experts_per_tok)),
        ("n_group", json!(config.n_group)),
        ("topk_group", json!(config.topk_group)),
        ("routed_scaling_factor", json!(config.routed_scaling_factor)),
        (
            "max_position_embeddings",
            json!(config.max_position_embeddings),
        ),
        ("rope_theta", json!(config.rope_theta)),
        ("rope_scaling", json!(yarn)),
        ("tie_word_embeddings", json!(config.tie_word_embeddings)),
    ]
}

/// Parts of the main model: all parameters, and those active per token.
fn parts(count: &ParameterCount) -> [(&'static str, usize, usize); 8] {
    let tied = count.head == 0;
    [
        (
            "embedding",
            count.embedding,
            if tied { count.embedding } else { 0 },
        ),
        ("attention", count.attention, count.attention),
        ("dense layers", count.dense, count.dense),
        ("routed experts", count.routed_experts, count.active_experts),
        ("shared experts", count.shared_experts, count.shared_experts),
        ("routers", count.routers, count.routers),
        ("norms", count.norms, count.norms),
        ("output head", count.head, count.head),
    ]
}

fn weight_files(dir: &Path) -> anyhow::Result<Vec<WeightFile>> {
    let cannot_list = || format!("cannot list {}", dir.display());
    let mut names = Vec::new();
    for entry in dir.read_dir().with_context(cannot_list)? {
        let name = entry.with_context(cannot_list)?.file_name();
        let name = name.to_string_lossy().into_owned();
        if name.ends_with(".safetensors") {
            names.push(name);
        }
    }
    names.sort();
    names
        .into_iter()
        .map(|name| WeightFile::read(dir, name))
        .collect()
}

impl WeightFile {
    fn read(dir: &Path, name: String) -> anyhow::Result<Self> {
        let path = dir.join(&name);
        let what = || path.display().to_string();
        // Mapped: of the weights themselves nothing is read.
        let file = MappedFile::open(&path).with_context(what)?;
        let parsed = SafeTensors::deserialize(file.bytes()).with_context(what)?;
        let mut tensors: Vec<StoredTensor> = parsed
            .iter()
            .map(|(name, view)| StoredTensor {
                name: name.to_owned(),
                dtype: view.dtype().to_string(),
                shape: view.shape().to_vec(),
            })
            .collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self {
            name,
            bytes: file.bytes().len() as u64,
            tensors,
        })
    }

    /// Number of tensors of each type.
    fn dtypes(&self) -> BTreeMap<&str, usize> {
        let mut dtypes = BTreeMap::new();
        for tensor in &self.tensors {
            *dtypes.entry(tensor.dtype.as_str()).or_default() += 1;
        }
        dtypes
    }

    fn json(&self, tensors: bool) -> Value {
        let mut value = json!({
            "name": self.name,
            "bytes": self.bytes,
            "tensors": self.tensors.len(),
            "dtypes": self.dtypes(),
        });
        if tensors {
            let list = self.tensors.iter();
            value["list"] = list
                .map(|t| json!({ "name": t.name, "dtype": t.dtype, "shape": t.shape }))
                .collect();
        }
        value
    }
}

fn files_text(text: &mut String, files: &[WeightFile], tensors: bool) {
    if files.is_empty() {
        line(
            text,
            format_args!("weights: no *.safetensors beside config.json"),
        );
    }
    for file in files {
        let dtypes: Vec<String> = file
            .dtypes()
            .iter()
            .map(|(dtype, count)| format!("{} {dtype}", exact(*count)))
            .collect();
        let (size, dtypes) = (HumanBytes(file.bytes), dtypes.join(", "));
        line(
            text,
            format_args!(
                "{}: {} bytes ({size}), tensors: {dtypes}",
                file.name,
                exact(file.bytes as usize)
            ),
        );
        for tensor in file.tensors.iter().filter(|_| tensors) {
            line(
                text,
                format_args!("  {} {} {:?}", tensor.name, tensor.dtype, tensor.shape),
            );
        }
    }
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    writeln!(text, "{content}").expect("a string takes whatever is written to it");
}

fn row(text: &mut String, part: &str, total: &str, active: &str) {
    let content = format!("{part:<16}{total:>18}{active:>18}");
    line(text, format_args!("{}", content.trim_end()));
}

fn exact(count: usize) -> String {
    HumanCount(count as u64).to_string()
}

/// One decimal of the largest unit that fits: 671.0B.
fn human_total(count: usize) -> String {
    human(count, 1)
}

/// As DeepSeek's report writes activated parameters, 37B: no decimals from 10B on.
fn human_active(count: usize) -> String {
    human(count, if count >= 10_000_000_000 { 0 } else { 1 })
}

fn human(count: usize, decimals: usize) -> String {
    let units = [(1e9, "B"), (1e6, "M"), (1e3, "K")];
    match units.iter().find(|(size, _)| count as f64 >= *size) {
        Some((size, unit)) => format!("{:.decimals$}{unit}", count as f64 / size),
        None => count.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_rounded_as_the_report_rounds_them() {
        assert_eq!(human_total(671_026_419_200), "671.0B");
        assert_eq!(human_active(36_625_618_432), "37B");
        assert_eq!(human_active(9_960_000_000), "10.0B");
        assert_eq!(human_active(2_800_000_000), "2.8B");
        assert_eq!(human_total(24_012_345), "24.0M");
        assert_eq!(human_active(11_612_345), "11.6M");
        assert_eq!(human_total(1_000), "1.0K");
        assert_eq!(human_total(999), "999");
        assert_eq!(exact(671_026_419_200), "671,026,419,200");
    }

    #[test]
    fn parts_add_up_to_the_sums() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for tied in [false, true] {
            let path = root.join("tests/fixtures/tiny-mtp");
            let config = ModelConfig {
                tie_word_embeddings: tied,
                ..checkpoint::read_config(&path).unwrap()
            };
            let listed = parameters::list(&Transformer::new(&config, 0, &Device::flex()));
            let count = ParameterCount::of(&listed, &config);
            let parts = parts(&count);
            let sum = |of: fn(&(&str, usize, usize)) -> usize| parts.iter().map(of).sum::<usize>();
            assert_eq!(sum(|part| part.1), count.total());
            assert_eq!(sum(|part| part.2), count.active());
        }
    }
}
