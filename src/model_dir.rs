//! Which model a command uses: in a folder as Hugging Face lays it out, or in the folder of a training run.

use std::path::{Path, PathBuf};

use anyhow::bail;
use deepburn_infer::engine::Engine;
use deepburn_kernels::compact::CompactFormat;

use crate::device::DeviceSpec;

/// A model, where it computes and how its weights are held.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelChoice {
    /// Folder of a Hugging Face checkpoint, or of a training run (its newest checkpoint)
    #[arg(long = "model", value_name = "DIR")]
    pub(crate) dir: PathBuf,

    /// Where to compute: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: DeviceSpec,

    /// How to hold the large matrices: f32, or rounded to bf16 or fp8 for a half or a quarter of the memory and faster
    /// decoding
    #[arg(
        long,
        value_name = "f32|bf16|fp8",
        value_enum,
        hide_possible_values = true,
        default_value_t
    )]
    weights: HeldWeights,
}

/// The values of `--weights`.
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum HeldWeights {
    #[default]
    F32,
    Bf16,
    Fp8,
}

impl ModelChoice {
    /// Opens it.
    ///
    /// # Errors
    /// A folder, a device or weights that cannot be used.
    pub(crate) fn open(&self) -> anyhow::Result<Engine> {
        self.open_at(&resolve(&self.dir)?)
    }

    /// As [`open`](Self::open), from the checkpoint that [`resolve`] has found.
    pub(crate) fn open_at(&self, dir: &Path) -> anyhow::Result<Engine> {
        let device = self.device.open()?;
        let format = match self.weights {
            HeldWeights::F32 => None,
            HeldWeights::Bf16 => Some(CompactFormat::Bf16),
            HeldWeights::Fp8 => Some(CompactFormat::Fp8),
        };
        Ok(Engine::open_held(dir, &device, format)?)
    }
}

/// The checkpoint that `dir` is, or the newest one of the training run that it is.
///
/// # Errors
/// A path that is neither; the message says what was looked for.
pub(crate) fn resolve(dir: &Path) -> anyhow::Result<PathBuf> {
    if !dir.exists() {
        bail!("{}: there is no such folder", dir.display());
    }
    let latest = dir.join("checkpoints").join("latest");
    let found = [dir, &latest]
        .into_iter()
        .find(|candidate| candidate.join("config.json").is_file());
    match found {
        Some(checkpoint) => Ok(checkpoint.to_owned()),
        None => bail!(
            "{0}: no model there: looked for {0}/config.json (a checkpoint) and \
             {0}/checkpoints/latest/config.json (a training run)",
            dir.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn checkpoints_come_before_runs_and_nothing_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let message = resolve(&dir.join("gone")).unwrap_err().to_string();
        assert!(
            message.ends_with("gone: there is no such folder"),
            "{message}"
        );
        let message = resolve(dir).unwrap_err().to_string();
        assert!(message.contains("/config.json (a checkpoint)"), "{message}");
        assert!(
            message.contains("/checkpoints/latest/config.json (a"),
            "{message}"
        );

        let latest = dir.join("checkpoints/latest");
        fs::create_dir_all(&latest).unwrap();
        fs::write(latest.join("config.json"), "").unwrap();
        assert_eq!(resolve(dir).unwrap(), latest);
        fs::write(dir.join("config.json"), "").unwrap();
        assert_eq!(resolve(dir).unwrap(), dir);
    }
}
