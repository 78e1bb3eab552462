//! From a configuration to two splits of tokens on disk, done once per content.

use std::{fs, ops::ControlFlow};

use super::{
    cache::{self, Prepared, REPORT, Staging, TOKENIZER},
    config::{DataConfig, TokenizerConfig},
    corpus::{self, Item},
    error::DataError,
    hash::{hex, sha256},
    report::{PrepareEvent, PrepareReport},
    select::{Selection, select},
    shards::write_durably,
    splits::Writing,
    tokenizer::Tokenizer,
};

/// Prepares the data, or finds it prepared below [`DataConfig::cache_dir`].
///
/// The folder's name is a hash of everything that decides on its contents: the configuration, the seed, and path,
/// size and contents of each file. Training documents may be rearranged for infilling; validation documents
/// never are, so that validation losses compare across rates.
///
/// # Errors
/// If the configuration is invalid, a source is empty, input is refused, a split comes out empty, or the disk fails.
pub fn prepare(
    config: &DataConfig,
    seed: u64,
    on_event: &mut dyn FnMut(PrepareEvent),
) -> Result<Prepared, DataError> {
    config.validate()?;
    let total = config.max_bytes.unwrap_or(0);
    on_event(PrepareEvent::Stage {
        name: "Reading files",
        total,
    });
    let selection = select(config, seed, &mut |bytes| {
        on_event(PrepareEvent::Advance(bytes))
    })?;
    let folder = config.cache_dir.join(cache::key(config, seed, &selection)?);
    if folder.join(REPORT).exists() {
        let prepared = Prepared::open(&folder)?;
        on_event(PrepareEvent::Cached(folder));
        on_event(PrepareEvent::Finished(prepared.report.clone()));
        return Ok(prepared);
    }

    let staging = Staging::create(&folder)?;
    let (tokenizer, json) = make_tokenizer(config, &selection, on_event)?;
    let json_path = staging.path.join(TOKENIZER);
    write_durably(&json_path, &json)?;
    let report =
        Writing::new(config, seed, &tokenizer, &staging.path)?.run(&selection, on_event)?;
    let report = PrepareReport {
        tokenizer_sha256: hex(&sha256(&json)),
        ..report
    };
    let text = serde_json::to_vec_pretty(&report).expect("a report has string keys only");
    write_durably(&staging.path.join(REPORT), &text)?;
    staging.publish(&folder)?;
    let prepared = Prepared::open(&folder)?;
    on_event(PrepareEvent::Finished(prepared.report.clone()));
    Ok(prepared)
}

/// Loads or trains the tokenizer; also its file's contents.
fn make_tokenizer(
    config: &DataConfig,
    selection: &Selection,
    on_event: &mut dyn FnMut(PrepareEvent),
) -> Result<(Tokenizer, Vec<u8>), DataError> {
    let (vocab_size, max_train_bytes) = match &config.tokenizer {
        TokenizerConfig::File(path) => {
            let bytes = fs::read(path).map_err(DataError::io(path, "read the tokenizer"))?;
            return Ok((Tokenizer::load(path)?, bytes));
        }
        TokenizerConfig::Train {
            vocab_size,
            max_train_bytes,
        } => (*vocab_size, *max_train_bytes),
    };
    let on_disk: u64 = selection.files.iter().map(|file| file.size).sum();
    let total = on_disk.min(max_train_bytes);
    on_event(PrepareEvent::Stage {
        name: "Sampling text",
        total,
    });
    let mut texts = Vec::new();
    let mut seen = 0;
    // Problems are told when the splits are written: that pass reads everything, this one may not.
    corpus::read(config, selection, &mut |item| {
        match item {
            Item::Document(document) if !document.is_validation(config.validation_fraction) => {
                seen += document.text.len() as u64;
                texts.push(document.text);
            }
            Item::Read(bytes) => on_event(PrepareEvent::Advance(bytes)),
            _ => {}
        }
        let enough = seen >= max_train_bytes;
        Ok(if enough {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    })?;
    on_event(PrepareEvent::Stage {
        name: "Training tokenizer",
        total: 0,
    });
    let tokenizer = Tokenizer::train(&texts, vocab_size)?;
    let json = tokenizer.to_json()?.into_bytes();
    Ok((tokenizer, json))
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, path::Path};

    use super::*;
    use crate::data::tokenizer::tests::CODE;

    /// A folder with sixty different documents of code in `corpus`.
    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("corpus")).unwrap();
        for i in 0..60 {
            let text = format!("// {i}\n{}", CODE.replace('x', &format!("x_{i}")));
            fs::write(dir.path().join(format!("corpus/{i}.rs")), text).unwrap();
        }
        dir
    }

    fn config(dir: &Path, rest: &str) -> DataConfig {
        let root = dir.display();
        toml::from_str(&format!(
            "sources = [{{ path = \"{root}/corpus\" }}]\ncache_dir = \"{root}/cache\"\n\
             tokenizer = {{ vocab_size = 320 }}\nvalidation_fraction = 0.2\n{rest}"
        ))
        .unwrap()
    }

    fn run(config: &DataConfig, seed: u64) -> (Prepared, Vec<PrepareEvent>) {
        let mut events = Vec::new();
        let prepared = prepare(config, seed, &mut |event| events.push(event)).unwrap();
        (prepared, events)
    }

    fn is_cached(events: &[PrepareEvent]) -> bool {
        events
            .iter()
            .any(|event| matches!(event, PrepareEvent::Cached(_)))
    }

    /// The texts of a split, each without the token that ends it.
    fn texts(prepared: &Prepared, split: &crate::data::Shards) -> Vec<String> {
        let tokenizer = Tokenizer::load(&prepared.tokenizer_path).unwrap();
        let text = |i| {
            let mut tokens = split.document(i).unwrap();
            assert_eq!(tokens.pop(), Some(prepared.eos_id));
            tokenizer.decode(&tokens).unwrap()
        };
        (0..split.len()).map(text).collect()
    }

    #[test]
    fn both_splits_together_are_the_corpus() {
        let dir = folder();
        let (prepared, events) = run(&config(dir.path(), ""), 3);
        let (train, valid) = (
            texts(&prepared, &prepared.train),
            texts(&prepared, &prepared.valid),
        );
        let report = &prepared.report;
        assert_eq!(
            (report.train.documents, report.valid.documents),
            (train.len() as u64, valid.len() as u64)
        );
        let bytes = |texts: &[String]| texts.iter().map(|text| text.len() as u64).sum::<u64>();
        assert_eq!(
            (report.train.bytes, report.valid.bytes),
            (bytes(&train), bytes(&valid))
        );
        assert_eq!(report.train.tokens, prepared.train.tokens());
        assert!((1..30).contains(&valid.len()), "{}", valid.len());

        let found: HashSet<String> = train.into_iter().chain(valid).collect();
        let files = fs::read_dir(dir.path().join("corpus")).unwrap();
        let expected = files
            .map(|f| fs::read_to_string(f.unwrap().path()).unwrap())
            .collect();
        assert_eq!(found, expected);
        assert_eq!(report.train.documents + report.valid.documents, 60);

        assert!(matches!(events.last(), Some(PrepareEvent::Finished(r)) if r == report));
        let advanced = |name: &str| {
            let mut stages = events
                .iter()
                .skip_while(|e| !matches!(e, PrepareEvent::Stage { name: n, .. } if *n == name));
            let Some(PrepareEvent::Stage { total, .. }) = stages.next() else {
                panic!("{name}")
            };
            let advances = stages.map_while(|e| match e {
                PrepareEvent::Advance(n) => Some(*n),
                _ => None,
            });
            (*total, advances.sum::<u64>())
        };
        let (total, sum) = advanced("Tokenising");
        assert_eq!(
            (total, sum),
            (report.train.bytes + report.valid.bytes, total)
        );
    }

    #[test]
    fn a_second_run_finds_the_first_until_anything_changes() {
        let dir = folder();
        let here = config(dir.path(), "");
        let (first, events) = run(&here, 3);
        assert!(!is_cached(&events));
        let (second, events) = run(&here, 3);
        assert!(is_cached(&events));
        assert_eq!(second.report, first.report);
        assert_eq!(second.tokenizer_path, first.tokenizer_path);

        for rest in [
            "fim_rate = 0.5",
            "max_bytes = 3000",
            "on_bad_input = \"refuse\"",
        ] {
            assert!(!is_cached(&run(&config(dir.path(), rest), 3).1), "{rest}");
        }
        assert!(!is_cached(&run(&here, 4).1));
        assert!(is_cached(
            &run(&config(dir.path(), "document_mask = true"), 3).1
        ));

        // The same size, another content.
        let path = dir.path().join("corpus/7.rs");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("main", "niam")).unwrap();
        assert!(!is_cached(&run(&here, 3).1));
        fs::write(&path, text).unwrap();
        assert!(is_cached(&run(&here, 3).1));
        let names = fs::read_dir(dir.path().join("cache")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert!(names.into_iter().all(|name| !name.contains("staging")));
    }

    #[test]
    fn two_preparations_write_the_same_bytes() {
        let (one, other) = (folder(), folder());
        let files = |dir: &Path| {
            let (prepared, _) = run(&config(dir, "fim_rate = 0.5"), 3);
            let folder = prepared.tokenizer_path.parent().unwrap().to_owned();
            let names = [
                "tokenizer.json",
                "train.bin",
                "train.idx",
                "valid.bin",
                "prepared.json",
            ];
            names.map(|name| fs::read(folder.join(name)).unwrap())
        };
        assert!(files(one.path()) == files(other.path()));
    }

    #[test]
    fn infilling_rearranges_training_documents_alone() {
        let dir = folder();
        let (prepared, _) = run(&config(dir.path(), "fim_rate = 0.5"), 3);
        let share = prepared.report.fim_documents as f64 / prepared.report.train.documents as f64;
        assert!(
            (0.2..0.8).contains(&share),
            "every document draws for itself: {share}"
        );
        let (prepared, _) = run(&config(dir.path(), "fim_rate = 1.0"), 3);
        assert_eq!(
            prepared.report.fim_documents,
            prepared.report.train.documents
        );
        let originals: HashSet<String> = fs::read_dir(dir.path().join("corpus"))
            .unwrap()
            .map(|f| fs::read_to_string(f.unwrap().path()).unwrap())
            .collect();
        for text in texts(&prepared, &prepared.train) {
            let rest = text.strip_prefix("<｜fim▁begin｜>").unwrap();
            let (prefix, rest) = rest.split_once("<｜fim▁hole｜>").unwrap();
            let (suffix, middle) = rest.split_once("<｜fim▁end｜>").unwrap();
            assert!(originals.contains(&[prefix, middle, suffix].concat()));
        }
        for text in texts(&prepared, &prepared.valid) {
            assert!(originals.contains(&text));
        }
    }

    #[test]
    fn an_existing_tokenizer_is_used_as_it_is() {
        let dir = folder();
        let (first, _) = run(&config(dir.path(), ""), 3);
        let mut other = config(dir.path(), "");
        other.tokenizer = TokenizerConfig::File(first.tokenizer_path.clone());
        let (second, events) = run(&other, 3);
        assert!(!is_cached(&events));
        assert_eq!(second.report, first.report);
        other.tokenizer = TokenizerConfig::File(dir.path().join("missing.json"));
        let error = prepare(&other, 3, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains("missing.json"), "{error}");
    }

    #[test]
    fn problems_are_told_and_kept() {
        let dir = folder();
        let bad = dir.path().join("corpus/bad.rs");
        fs::write(&bad, b"ok\n\xff").unwrap();
        let (prepared, events) = run(&config(dir.path(), ""), 3);
        assert_eq!(prepared.report.problem_count, 1);
        let problem = &prepared.report.problems[0];
        assert_eq!((&problem.file, problem.line), (&bad, Some(2)));
        let told = events
            .iter()
            .filter(|e| matches!(e, PrepareEvent::Problem(p) if p == problem));
        assert_eq!(told.count(), 1);
        let refusing = config(dir.path(), "on_bad_input = \"refuse\"");
        let error = prepare(&refusing, 3, &mut |_| ()).unwrap_err();
        assert!(matches!(error, DataError::BadInput(_)), "{error}");
    }

    #[test]
    fn an_empty_split_is_an_error_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("corpus")).unwrap();
        fs::write(dir.path().join("corpus/one.txt"), CODE).unwrap();
        let error = prepare(&config(dir.path(), ""), 3, &mut |_| ())
            .unwrap_err()
            .to_string();
        assert!(error.contains("validation split: 1 documents"), "{error}");
        let error = prepare(&config(dir.path(), "max_bytes = 3"), 3, &mut |_| ()).unwrap_err();
        assert!(
            error.to_string().contains("training split: 0 documents"),
            "{error}"
        );
        assert_eq!(fs::read_dir(dir.path().join("cache")).unwrap().count(), 0);

        let mut whole = config(dir.path(), "");
        whole.validation_fraction = 0.0;
        assert!(run(&whole, 3).0.valid.is_empty());
    }

    #[test]
    fn a_damaged_folder_is_an_error_and_an_unfinished_one_is_replaced() {
        let dir = folder();
        let here = config(dir.path(), "");
        let (prepared, _) = run(&here, 3);
        let folder = prepared.tokenizer_path.parent().unwrap().to_owned();
        let (bin, idx) = (folder.join("valid.bin"), folder.join("valid.idx"));
        for path in [&bin, &idx, &prepared.tokenizer_path, &folder.join(REPORT)] {
            let good = fs::read(path).unwrap();
            fs::write(path, &good[..good.len() - 2]).unwrap();
            let error = prepare(&here, 3, &mut |_| ()).unwrap_err();
            let expected = matches!(error, DataError::Cache { .. } | DataError::Shard { .. });
            assert!(expected, "{}: {error}", path.display());
            fs::write(path, good).unwrap();
        }
        let train = ["train.bin", "train.idx"].map(|name| fs::read(folder.join(name)).unwrap());
        fs::write(bin, &train[0]).unwrap();
        fs::write(idx, &train[1]).unwrap();
        let error = prepare(&here, 3, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains("(documents, tokens)"), "{error}");

        fs::remove_file(folder.join(REPORT)).unwrap();
        let (again, events) = run(&here, 3);
        assert!(!is_cached(&events));
        assert_eq!(again.report, prepared.report);
    }
}
