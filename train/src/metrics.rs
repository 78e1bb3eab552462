//! `metrics.jsonl`: a line per step and per validation, written at once.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use deepburn_model::checkpoint::{CheckpointError, write_file};
use serde::{Deserialize, Serialize};

use crate::report::StepReport;

/// A line of the log.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// A training step.
    Train(StepReport),
    /// The held-out windows after a step.
    Validation(StepReport),
}

impl Record {
    /// What does not depend on time and memory: runs that repeat each other have the same.
    #[must_use]
    pub fn lasting(mut self) -> Self {
        let (Self::Train(report) | Self::Validation(report)) = &mut self;
        report.tokens_per_second = None;
        report.memory_bytes = None;
        self
    }

    fn step(&self) -> u64 {
        match self {
            Self::Train(report) | Self::Validation(report) => report.step,
        }
    }
}

/// The log of a run.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens the log in a run's folder for going on after `step`: what a lost part of the run wrote is cut off, so
    /// that every step has one line.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn open(run: &Path, step: u64) -> Result<Self, CheckpointError> {
        let path = run.join("metrics.jsonl");
        let error = |source| CheckpointError::Io {
            path: path.clone(),
            source,
        };
        if path.exists() {
            let kept: String = read(&path)
                .map_err(error)?
                .into_iter()
                .filter(|record| record.step() <= step)
                .map(|record| line(&record))
                .collect();
            write_file(&path, kept.as_bytes())?;
        }
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(error)?;
        Ok(Self { path, file })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// What the file system answers.
    pub fn write(&mut self, record: &Record) -> Result<(), CheckpointError> {
        self.file
            .write_all(line(record).as_bytes())
            .map_err(|source| CheckpointError::Io {
                path: self.path.clone(),
                source,
            })
    }
}

/// The records of a log. A last line that was cut short by a crash is left out.
///
/// # Errors
/// What the file system answers, or a line that is not a record.
pub fn read(path: &Path) -> io::Result<Vec<Record>> {
    let text = std::fs::read_to_string(path)?;
    let complete = text.rfind('\n').map_or("", |end| &text[..=end]);
    complete
        .lines()
        .enumerate()
        .map(|(number, line)| {
            serde_json::from_str(line)
                .map_err(|error| io::Error::other(format!("line {}: {error}", number + 1)))
        })
        .collect()
}

fn line(record: &Record) -> String {
    serde_json::to_string(record).expect("numbers and strings") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn going_on_cuts_what_a_lost_part_of_the_run_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let record = |step| {
            Record::Train(StepReport {
                step,
                main: 0.1,
                ..StepReport::default()
            })
        };
        let mut log = MetricsLog::open(dir.path(), 0).unwrap();
        for step in 1..=4 {
            log.write(&record(step)).unwrap();
        }
        log.file.write_all(b"{\"kind\":\"tra").unwrap();
        let mut log = MetricsLog::open(dir.path(), 2).unwrap();
        log.write(&record(3)).unwrap();
        let found = read(&dir.path().join("metrics.jsonl")).unwrap();
        assert_eq!(found, [record(1), record(2), record(3)]);
    }
}
