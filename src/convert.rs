//! `deepburn convert`: the same weights in another type.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use burn::tensor::Device;
use clap::ValueEnum;
use deepburn_model::{
    checkpoint::{self, SaveOptions, StoredType},
    parameters::{self, Parameter},
};
use deepburn_train::state::AVERAGE;
use indicatif::{HumanBytes, HumanCount};

use crate::{model_dir, print_now};

/// What goes with the weights, where it is there.
const COMPANIONS: [&str; 4] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
];

/// Write a checkpoint with its weights in another type.
///
/// Reads f32, f16, bf16 and FP8 in one file or in shards, as far as memory holds the model in single precision. From
/// FP8 to f32 nothing is lost.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of a Hugging Face checkpoint, or of a training run (its newest checkpoint)
    #[arg(value_name = "IN")]
    input: PathBuf,

    /// Folder to write, which must not be there yet
    #[arg(value_name = "OUT")]
    output: PathBuf,

    /// The type of the weights
    #[arg(long, value_enum)]
    dtype: Dtype,

    /// Write the average of the weights that a training run keeps where its configuration has `ema`, instead of its weights
    #[arg(long)]
    ema: bool,

    /// Split the weights into files of at most this many bytes; KB, MB and GB are powers of 1000
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    max_shard_size: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Dtype {
    /// Single precision
    F32,
    /// bfloat16, the selection biases in single precision
    Bf16,
    /// As DeepSeek publishes: projections in FP8 with a scale per 128 x 128 block, the others in bfloat16
    Fp8,
}

impl From<Dtype> for StoredType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::Bf16,
            Dtype::Fp8 => Self::Fp8,
        }
    }
}

/// Runs the subcommand.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.output.symlink_metadata().is_ok() {
        bail!(
            "{}: is already there; convert writes to a new folder",
            args.output.display()
        );
    }
    let input = model_dir::resolve(&args.input)?;
    let weights_in = match args.ema {
        false => input.clone(),
        true => input.join(AVERAGE),
    };
    if !weights_in.exists() {
        bail!(
            "{}: there is no such folder; a training run keeps an average of its weights with ema.decay",
            weights_in.display()
        );
    }
    let (config, model) = checkpoint::load(&weights_in, &Device::flex())?;
    let options = SaveOptions {
        max_shard_bytes: args.max_shard_size,
        dtype: args.dtype.into(),
    };
    checkpoint::write_directory(&args.output, |dir| -> anyhow::Result<()> {
        checkpoint::save(&model, &config, dir, &options)?;
        copy_companions(&input, dir)
    })?;

    let count: usize = parameters::list(&model).iter().map(Parameter::len).sum();
    let (files, bytes) = weights(&args.output)?;
    let summary = format!(
        "{}: {} parameters in {files} {}, {} bytes ({})\n",
        args.output.display(),
        HumanCount(count as u64),
        if files == 1 { "file" } else { "files" },
        HumanCount(bytes),
        HumanBytes(bytes),
    );
    // Whether somebody reads it makes no difference.
    let _ = print_now(&summary).context("cannot write to standard output")?;
    Ok(ExitCode::SUCCESS)
}

fn copy_companions(from: &Path, to: &Path) -> anyhow::Result<()> {
    for name in COMPANIONS {
        let path = from.join(name);
        if path.exists() {
            let contents = fs::read(&path).with_context(|| path.display().to_string())?;
            checkpoint::write_file(&to.join(name), &contents)?;
        }
    }
    Ok(())
}

/// How many files of weights are in a folder, and their bytes.
fn weights(dir: &Path) -> anyhow::Result<(usize, u64)> {
    let cannot_list = || format!("cannot list {}", dir.display());
    let (mut files, mut bytes) = (0, 0);
    for entry in dir.read_dir().with_context(cannot_list)? {
        let entry = entry.with_context(cannot_list)?;
        if entry
            .file_name()
            .to_string_lossy()
            .ends_with(".safetensors")
        {
            files += 1;
            bytes += entry.metadata().with_context(cannot_list)?.len();
        }
    }
    Ok((files, bytes))
}

/// A positive number of bytes, KB, MB or GB.
fn parse_size(text: &str) -> Result<u64, String> {
    let units = [("GB", 1_000_000_000), ("MB", 1_000_000), ("KB", 1_000)];
    let (number, unit) = units
        .iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)))
        .unwrap_or((text, 1));
    let size = number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    size.filter(|&size| size > 0)
        .ok_or_else(|| "must be a whole positive number of bytes, KB, MB or GB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_numbers_of_a_unit() {
        assert_eq!(parse_size("5GB"), Ok(5_000_000_000));
        assert_eq!(parse_size("300MB"), Ok(300_000_000));
        assert_eq!(parse_size("20KB"), Ok(20_000));
        assert_eq!(parse_size("17"), Ok(17));
        for wrong in ["", "GB", "0", "0MB", "1.5GB", "-1", "5TB", "99999999999GB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
