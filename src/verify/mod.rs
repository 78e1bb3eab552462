//! `deepburn verify`: recomputes the reference results that lie beside a checkpoint and compares them.
//!
//! One file per kind of reference. Each computes what it knows; [`comparison`] holds it against what the file has.

mod attention_probs;
mod comparison;
mod forward;
mod fp8;
mod generation;
mod gradients;
mod mtp;
mod reference;
mod report;
mod schedule_file;
mod schedules;
mod tokenizer;
mod tolerance;
mod training;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, ensure};
use burn::tensor::Device;
use deepburn_model::{checkpoint, config::ModelConfig, transformer::Transformer};
use serde_json::Value;

use crate::{device::DeviceSpec, print_now};
use reference::ReferenceFile;
use report::Report;
use tolerance::Bound;

/// The exit codes of this subcommand.
pub(crate) const EXIT_CODES: &str = "Exit codes:
  0    everything that was compared is within its tolerance
  1    something is not, or could not be computed
  2    nothing to verify, or wrong usage
  101  a bug in deepburn";

const KNOWN: [&str; 7] = [
    forward::FILE,
    generation::FILE,
    mtp::GRADIENTS,
    gradients::FILE,
    training::FILE,
    training::PARAMETERS,
    tokenizer::FILE,
];

/// Files of a checkpoint in the layout of Hugging Face that are no references.
const CHECKPOINT: [&str; 11] = [
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "meta.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
];

/// Recompute the reference results that lie beside a checkpoint, and compare them.
///
/// Reads reference.safetensors (forward pass), reference_generate.safetensors, reference_grads.safetensors,
/// reference_mtp_grads.safetensors, reference_train.safetensors with final_params.safetensors,
/// and tokenizer_cases.json; those that are not there are left out. FP8 arithmetic (fp8_linear*.safetensors) and
/// pipeline schedules (dualpipe*.json) need no checkpoint.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder with reference files, and the Hugging Face checkpoint that they are about
    dir: PathBuf,

    /// Where to compute: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceSpec,

    /// Write what was computed, named FILE.TENSOR as in the references
    #[arg(long, value_name = "OUT.safetensors")]
    dump: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut report = Report::new(args.dump.is_some());
    let known = references(&args.dir, &mut report)?;
    // What needs no checkpoint.
    let [schedules, known] = partition(known, schedules::is_schedule);
    for name in &schedules {
        schedules::verify(&args.dir, name, &mut report)?;
    }
    let [products, known] = partition(known, fp8::is_fp8);
    for name in &products {
        fp8::verify(&args.dir, name, &args.device.open()?, &mut report)?;
    }
    if !known.is_empty() {
        let subject = Subject::open(&args.dir, &args.device)?;
        verify(&subject, &known, &mut report)?;
    }
    if let Some(path) = &args.dump {
        let contents = report.dump().with_context(|| path.display().to_string())?;
        checkpoint::write_file(path, &contents)?;
    }
    let text = if args.json {
        serde_json::to_string_pretty(&report.json()).context("cannot write JSON")? + "\n"
    } else {
        report.text()
    };
    // Whether somebody reads to the end makes no difference.
    let _ = print_now(&text).context("cannot write to standard output")?;
    if report.is_empty() {
        eprintln!(
            "error: {}: nothing to verify: no result in any of {}, dualpipe*.json",
            args.dir.display(),
            KNOWN.join(", ")
        );
        return Ok(ExitCode::from(2));
    }
    Ok(if report.passes() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The checkpoint whose results are verified.
struct Subject<'a> {
    dir: &'a Path,
    device: Device,
    config: ModelConfig,
    /// How close results of the forward pass have to be.
    results: Bound,
}

impl<'a> Subject<'a> {
    fn open(dir: &'a Path, device: &DeviceSpec) -> anyhow::Result<Self> {
        let config = checkpoint::read_config(dir)?;
        let path = dir.join("config.json");
        let what = || path.display().to_string();
        let text = fs::read_to_string(&path).with_context(what)?;
        let keys: Value = serde_json::from_str(&text).with_context(what)?;
        let wide = ["rope_scaling", "quantization_config"].map(|key| !keys[key].is_null());
        Ok(Self {
            dir,
            device: device.open()?,
            config,
            results: match wide {
                [false, false] => tolerance::RESULTS,
                _ => tolerance::RESULTS_WIDE,
            },
        })
    }

    fn model(&self) -> anyhow::Result<Transformer> {
        Ok(checkpoint::load(self.dir, &self.device)?.1)
    }

    /// A model with gradients, and the device that its inputs belong on.
    fn trainable(&self) -> anyhow::Result<(Transformer, Device)> {
        let device = self.device.clone().autodiff();
        Ok((checkpoint::load(self.dir, &device)?.1, device))
    }
}

fn verify(subject: &Subject, known: &BTreeSet<String>, report: &mut Report) -> anyhow::Result<()> {
    if known.contains(forward::FILE) {
        forward::verify(subject, report)?;
    }
    if known.contains(generation::FILE) {
        generation::verify(subject, report)?;
    }
    if known.contains(mtp::GRADIENTS) {
        mtp::verify_gradients(subject, report)?;
    }
    if known.contains(gradients::FILE) {
        gradients::verify(subject, report)?;
    }
    let parameters = known.contains(training::PARAMETERS);
    // Parameters without the steps that lead to them are an error that names what is missing.
    if parameters || known.contains(training::FILE) {
        training::verify(subject, parameters, report)?;
    }
    if known.contains(tokenizer::FILE) {
        tokenizer::verify(subject, report)?;
    }
    Ok(())
}

/// The reference files in `dir` that are known; others are listed in the report.
fn references(dir: &Path, report: &mut Report) -> anyhow::Result<BTreeSet<String>> {
    ensure!(dir.is_dir(), "{}: there is no such folder", dir.display());
    let cannot_list = || format!("cannot list {}", dir.display());
    let mut names = BTreeSet::new();
    for entry in dir.read_dir().with_context(cannot_list)? {
        let name = entry.with_context(cannot_list)?.file_name();
        names.insert(name.to_string_lossy().into_owned());
    }
    for name in &names {
        if is_unknown(name) {
            let tensors = if name.ends_with(".safetensors") {
                let file = ReferenceFile::read(dir, name)?;
                file.names().into_iter().map(str::to_owned).collect()
            } else {
                vec!["the whole file".to_owned()]
            };
            report.skip(name, tensors, "a file that is not known");
        }
    }
    names.retain(|name| is_known(name));
    Ok(names)
}

/// The names that are of one kind, and the others.
fn partition(names: BTreeSet<String>, kind: fn(&str) -> bool) -> [BTreeSet<String>; 2] {
    let (these, others) = names.into_iter().partition(|name| kind(name));
    [these, others]
}

/// Whether a file is a reference of a known kind.
fn is_known(name: &str) -> bool {
    KNOWN.contains(&name) || fp8::is_fp8(name) || schedules::is_schedule(name)
}

/// Whether a file looks like references, but of no kind that is known.
fn is_unknown(name: &str) -> bool {
    let is_data = name.ends_with(".safetensors") || name.ends_with(".json");
    let is_shard = name.starts_with("model-") && name.ends_with(".safetensors");
    is_data && !is_shard && !is_known(name) && !CHECKPOINT.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_references_weights_or_unknown() {
        for name in KNOWN.into_iter().chain(CHECKPOINT) {
            assert!(!is_unknown(name), "{name}");
        }
        assert!(!is_unknown("model-00001-of-00003.safetensors"));
        assert!(!is_unknown("README.md"));
        assert!(is_known("fp8_linear_codec.safetensors"));
        assert!(is_known("dualpipe_pp4_m8.json"));
        for name in ["fp8.safetensors", "fp8_linear.json", "pipe.json"] {
            assert!(is_unknown(name), "{name}");
        }
    }
}
