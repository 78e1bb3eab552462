//! Where the weights of a model are: in a folder as Hugging Face lays it out, or in the folder of a training run.

use std::path::{Path, PathBuf};

use anyhow::bail;

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
