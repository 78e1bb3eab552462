//! Writing the two splits: tokenising, infilling, and counting what goes where.

use std::{ops::ControlFlow, path::Path};

use super::{
    cache::FORMAT_VERSION,
    config::DataConfig,
    corpus::{self, Document, Item},
    error::DataError,
    fim::{self, FimTokens, Parts},
    report::{PROBLEMS_KEPT, PrepareEvent, PrepareReport, SplitReport},
    select::Selection,
    shards::ShardWriter,
    tokenizer::Tokenizer,
};

/// Text that is tokenised at a time.
const BATCH: usize = 8 << 20;

/// The splits on their way to disk.
pub(crate) struct Writing<'a> {
    config: &'a DataConfig,
    tokenizer: &'a Tokenizer,
    fim: Option<FimTokens>,
    train: ShardWriter,
    valid: ShardWriter,
    report: PrepareReport,
    batch: Vec<Document>,
    waiting: usize,
}

impl<'a> Writing<'a> {
    pub(crate) fn new(
        config: &'a DataConfig,
        seed: u64,
        tokenizer: &'a Tokenizer,
        folder: &Path,
    ) -> Result<Self, DataError> {
        let fim = if config.fim_rate > 0.0 {
            Some(tokenizer.fim_tokens()?)
        } else {
            None
        };
        let vocab_size = tokenizer.vocab_size();
        let report = PrepareReport {
            format_version: FORMAT_VERSION,
            deepburn_version: env!("CARGO_PKG_VERSION").to_owned(),
            seed,
            tokenizer_sha256: String::new(),
            vocab_size,
            eos_id: tokenizer.eos_id(),
            bos_id: tokenizer.bos_id(),
            files: 0,
            duplicates: 0,
            oversized_files: 0,
            fim_documents: 0,
            train: SplitReport::default(),
            valid: SplitReport::default(),
            problem_count: 0,
            problems: Vec::new(),
        };
        Ok(Self {
            config,
            tokenizer,
            fim,
            train: ShardWriter::create(&folder.join("train"), vocab_size)?,
            valid: ShardWriter::create(&folder.join("valid"), vocab_size)?,
            report,
            batch: Vec::new(),
            waiting: 0,
        })
    }
    /// Writes every document of the selection, and tells what came of it.
    pub(crate) fn run(
        mut self,
        selection: &Selection,
        on_event: &mut dyn FnMut(PrepareEvent),
    ) -> Result<PrepareReport, DataError> {
        let total = selection.files.iter().map(|file| file.size).sum();
        on_event(PrepareEvent::Stage {
            name: "Tokenising",
            total,
        });
        corpus::read(self.config, selection, &mut |item| {
            match item {
                Item::Document(document) => {
                    self.waiting += document.text.len();
                    self.batch.push(document);
                }
                Item::Duplicate => self.report.duplicates += 1,
                Item::Read(bytes) => on_event(PrepareEvent::Advance(bytes)),
                Item::Problem(problem) => {
                    self.report.problem_count += 1;
                    if self.report.problems.len() < PROBLEMS_KEPT {
                        self.report.problems.push(problem.clone());
                    }
                    on_event(PrepareEvent::Problem(problem));
                }
            }
            if self.waiting >= BATCH {
                self.flush()?;
            }
            Ok(ControlFlow::Continue(()))
        })?;
        self.flush()?;

        let mut report = self.report;
        report.files = selection.files.len() as u64;
        report.duplicates += selection.duplicates;
        report.oversized_files = selection.oversized;
        let documents = report.train.documents + report.valid.documents;
        let empty = |split, hint| {
            Err(DataError::EmptySplit {
                split,
                documents,
                hint,
            })
        };
        if report.train.documents == 0 {
            return empty(
                "training",
                "the first document must fit into every max_bytes",
            );
        }
        if report.valid.documents == 0 && self.config.validation_fraction > 0.0 {
            return empty(
                "validation",
                "give more documents, raise data.validation_fraction, or set it to 0 to train without one",
            );
        }
        self.train.finish()?;
        self.valid.finish()?;
        Ok(report)
    }

    /// Tokenises the documents that wait and appends them to their splits.
    fn flush(&mut self) -> Result<(), DataError> {
        self.waiting = 0;
        let batch = std::mem::take(&mut self.batch);
        let mut training = self.report.train.documents;
        let mut plans = Vec::with_capacity(batch.len());
        let mut texts = Vec::with_capacity(batch.len());
        for document in &batch {
            let validation = document.is_validation(self.config.validation_fraction);
            let parts = if validation {
                None
            } else {
                training += 1;
                let (rate, seed) = (self.config.fim_rate, self.report.seed);
                fim::split(&document.text, rate, seed, training - 1)
            };
            match parts {
                Some(parts) => texts.extend([parts.prefix, parts.middle, parts.suffix]),
                None => texts.push(document.text.as_str()),
            }
            plans.push((document.text.len() as u64, validation, parts.is_some()));
        }
        let mut encoded = self.tokenizer.encode_batch(&texts)?.into_iter();
        let mut next = || encoded.next().expect("one encoding per text");
        for (bytes, validation, infilling) in plans {
            let mut tokens = match (infilling, self.fim) {
                (true, Some(marks)) => {
                    let [prefix, middle, suffix] = &[next(), next(), next()];
                    self.report.fim_documents += 1;
                    fim::arrange(
                        marks,
                        Parts {
                            prefix,
                            middle,
                            suffix,
                        },
                    )
                }
                _ => next(),
            };
            tokens.push(self.tokenizer.eos_id());
            let (writer, split) = match validation {
                true => (&mut self.valid, &mut self.report.valid),
                false => (&mut self.train, &mut self.report.train),
            };
            writer.push(&tokens)?;
            split.documents += 1;
            split.bytes += bytes;
            split.tokens += tokens.len() as u64;
        }
        Ok(())
    }
}
