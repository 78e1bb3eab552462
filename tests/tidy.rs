//! Rules about the repository that no compiler checks.
//!
//! Each test first shows its matcher a text that breaks the rule, then holds the rule against every file.
//! This file quotes what it forbids and is therefore left out of the rules about text.

use std::{env, fs, path::PathBuf, process::Command};

const THIS_FILE: &str = "tests/tidy.rs";
const LIBRARIES: [&str; 4] = [
    "kernels-cubecl/src/",
    "model/src/",
    "train/src/",
    "infer/src/",
];

/// Modules that compute on plain data. A path that ends in `/` is a folder.
const PURE: &[&str] = &[
    "kernels-cubecl/src/fp8/e4m3.rs",
    "kernels-cubecl/src/fp8/tiles.rs",
    "model/src/checkpoint/hf_names.rs",
    "model/src/config.rs",
    "train/src/balance.rs",
    "train/src/parallel/communicator.rs",
    "train/src/parallel/local.rs",
    "train/src/parallel/mesh.rs",
    "train/src/pipeline/schedule/",
    "train/src/plan/",
    "train/src/schedule.rs",
    "train/src/spike.rs",
    "train/src/data/",
    "infer/src/logprobs.rs",
    "infer/src/pages.rs",
    "infer/src/payoff.rs",
    "infer/src/penalties.rs",
    "infer/src/placement.rs",
    "infer/src/rejection.rs",
    "infer/src/sampler.rs",
    "infer/src/speculation.rs",
    "infer/src/text.rs",
];

/// Where `unsafe` may appear. A path that ends in `/` is a folder.
const MAY_BE_UNSAFE: [&str; 5] = [
    "kernels-cubecl/",
    "model/src/mmap.rs",
    "src/allocator.rs",
    "train/src/parallel/mpi.rs",
    "train/src/parallel/nccl.rs",
];

/// A crate's manifest and the crates of this workspace that it may name.
const DEPENDENCIES: [(&str, &[&str]); 4] = [
    ("kernels-cubecl/Cargo.toml", &[]),
    ("model/Cargo.toml", &["deepburn-kernels"]),
    ("train/Cargo.toml", &["deepburn-kernels", "deepburn-model"]),
    ("infer/Cargo.toml", &["deepburn-kernels", "deepburn-model"]),
];

const AT_ROOT: [&str; 10] = [
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.lock",
    "Cargo.toml",
    "README.md",
    "clippy.toml",
    "deny.toml",
    "rust-toolchain.toml",
    "rustfmt.toml",
];

#[test]
fn file_names_say_what_is_inside() {
    let nameless = |path: &str| {
        ["base.rs", "utils.rs", "common.rs", "helpers.rs"]
            .contains(&path.rsplit('/').next().unwrap_or(path))
    };
    assert!(nameless("model/src/utils.rs"));
    assert!(!nameless("model/src/data_utils.rs"));

    let found = repository()
        .into_iter()
        .filter(|path| nameless(path))
        .collect();
    report("a file name that says nothing", found);
}

#[test]
fn no_source_file_is_longer_than_800_lines() {
    let too_long = |text: &str| text.lines().count() > 800;
    assert!(too_long(&"\n".repeat(801)));
    assert!(!too_long(&"\n".repeat(800)));

    let long = |(path, text): (String, String)| too_long(&text).then(|| format!("{path}:801"));
    report(
        "longer than 800 lines",
        sources().into_iter().filter_map(long).collect(),
    );
}

#[test]
fn nothing_is_left_to_do() {
    let unfinished = |text: &str| {
        lines_where(text, |line| {
            ["todo!(", "unimplemented!(", "dbg!("]
                .iter()
                .any(|macro_call| line.contains(macro_call))
        })
    };
    assert_eq!(
        unfinished("fn f() {\n    todo!()\n}\n\ndbg!(x);\nunimplemented!(\"y\")"),
        [2, 5, 6]
    );
    assert_eq!(unfinished("// never todo!() here\nlet todo = 1;"), []);

    report("an unfinished path", offences(sources(), unfinished));
}

#[test]
fn libraries_do_not_unwrap() {
    let unwraps = |text: &str| lines_where(outside_tests(text), |line| line.contains(".unwrap()"));
    assert_eq!(
        unwraps("a.ok();\nb.unwrap();\n#[cfg(test)]\nmod tests { c.unwrap() }"),
        [2]
    );
    assert_eq!(unwraps("a.unwrap_or(1); // not .unwrap()\n"), []);

    report(
        "`.unwrap()`: say why it holds with `expect`",
        offences(library_sources(), unwraps),
    );
}

#[test]
fn libraries_do_not_print() {
    let prints = |text: &str| {
        lines_where(outside_tests(text), |line| {
            line.contains("println!(") || line.contains("print!(")
        })
    };
    assert_eq!(
        prints("println!();\neprintln!();\nprint!(\"a\");\neprint!(\"b\");\nwriteln!(f)?;"),
        [1, 2, 3, 4]
    );
    assert_eq!(prints("#[cfg(test)]\nmod tests { println!() }"), []);

    report("a library that prints", offences(library_sources(), prints));
}

#[test]
fn unsafe_stays_where_it_is_expected() {
    let is_unsafe = |text: &str| lines_where(text, has_unsafe);
    assert_eq!(
        is_unsafe("fn f() {\n    unsafe { g() }\n}\nunsafe impl Send for A {}"),
        [2, 4]
    );
    assert_eq!(
        is_unsafe("#![forbid(unsafe_code)]\n// unsafe\nnot_unsafe();\nf(\"'unsafe-inline'\");"),
        []
    );
    assert!(within("kernels-cubecl/src/flex.rs", &MAY_BE_UNSAFE));
    assert!(!within("model/src/mmap.rs.bak", &MAY_BE_UNSAFE));

    let elsewhere = sources()
        .into_iter()
        .filter(|(path, _)| !within(path, &MAY_BE_UNSAFE))
        .collect();
    report(
        "`unsafe` in a place that has none",
        offences(elsewhere, is_unsafe),
    );
}

#[test]
fn every_unsafe_block_says_why_it_is_sound() {
    let unexplained = |text: &str| -> Vec<usize> {
        let lines: Vec<&str> = text.lines().collect();
        let explained = |at: usize| {
            lines[at.saturating_sub(3)..=at]
                .iter()
                .any(|line| line.contains("SAFETY:"))
        };
        (0..lines.len())
            .filter(|&at| {
                let line = code(lines[at]);
                has_unsafe(line) && !line.contains("unsafe fn") && !explained(at)
            })
            .map(|at| at + 1)
            .collect()
    };
    assert_eq!(
        unexplained("// SAFETY: a\n\n\n\nunsafe { f() }\nunsafe impl Send for A {}"),
        [5, 6]
    );
    assert_eq!(
        unexplained("// SAFETY: one\n// two\n// three\nunsafe { f() }"),
        []
    );
    assert_eq!(unexplained("unsafe { f() } // SAFETY: a"), []);

    report(
        "`unsafe` without a SAFETY comment",
        offences(sources(), unexplained),
    );
}

#[test]
fn pure_modules_do_not_use_burn() {
    let uses_burn = |text: &str| {
        lines_where(text, |line| {
            identifiers(line).any(|(at, word)| {
                (word == "burn" || word.starts_with("burn_"))
                    && (line[at + word.len()..].starts_with("::")
                        || line[..at].trim_end().ends_with("use"))
            })
        })
    };
    assert_eq!(
        uses_burn("use burn;\npub use burn_flex as b;\nlet x = burn::f();\nuse ::burn::tensor;"),
        [1, 2, 3, 4]
    );
    assert_eq!(
        uses_burn("use deepburn::x;\nlet burn = 1; // burn::f\nlet burn_in = 2;"),
        []
    );

    let files = sources();
    let missing = PURE
        .iter()
        .filter(|pure| !files.iter().any(|(path, _)| within(path, &[pure])));
    report(
        "listed as pure but not there",
        missing.map(ToString::to_string).collect(),
    );
    let pure = files
        .into_iter()
        .filter(|(path, _)| within(path, PURE))
        .collect();
    report(
        "Burn in a module that computes on plain data",
        offences(pure, uses_burn),
    );
}

#[test]
fn crates_depend_in_one_direction() {
    let foreign = |text: &str, allowed: &[&str]| -> Vec<usize> {
        let names = |line: &str| {
            let line = line.split('#').next().unwrap_or(line);
            let own = ["name", "description"]
                .iter()
                .any(|key| line.starts_with(key));
            let mut words = line.split(|c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c));
            !own && words.any(|word| word.starts_with("deepburn-") && !allowed.contains(&word))
        };
        text.lines()
            .enumerate()
            .filter(|(_, line)| names(line))
            .map(|(at, _)| at + 1)
            .collect()
    };
    let manifest = "name = \"deepburn-model\"\n[dependencies]\ndeepburn-kernels.workspace = true\n\
                    deepburn-infer.workspace = true\nx = { package = \"deepburn-train\" }\n\
                    [dev-dependencies.deepburn-train]\n# deepburn-train\n";
    assert_eq!(foreign(manifest, &["deepburn-kernels"]), [4, 5, 6]);

    let mut found = Vec::new();
    for (path, allowed) in DEPENDENCIES {
        let text = fs::read_to_string(root().join(path)).expect("each crate has a manifest");
        found.extend(
            foreign(&text, allowed)
                .into_iter()
                .map(|line| format!("{path}:{line}")),
        );
    }
    report("a crate that names one above or beside it", found);
}

#[test]
fn the_root_holds_no_stray_files() {
    let stray = |path: &str| {
        !path.contains('/')
            && !path.starts_with('.')
            && !path.starts_with("LICENSE-")
            && !AT_ROOT.contains(&path)
    };
    assert!(stray("notes.md"));
    assert!(!stray("README.md") && !stray("docs/notes.md") && !stray(".gitignore"));

    report(
        "a file that does not belong at the root",
        repository()
            .into_iter()
            .filter(|path| stray(path))
            .collect(),
    );
}

#[test]
fn no_test_is_ignored() {
    let ignored = |text: &str| lines_where(text, |line| line.contains("#[ignore"));
    assert_eq!(
        ignored("#[test]\n#[ignore = \"slow\"]\nfn f() {}\n#[ignore]"),
        [2, 4]
    );
    assert_eq!(ignored("// #[ignore] is not used\n"), []);

    report("a test that never runs", offences(sources(), ignored));
}

#[test]
fn every_allowed_lint_gives_a_reason() {
    let without_reason = |text: &str| -> Vec<usize> {
        let text: String = text
            .lines()
            .map(|line| format!("{}\n", code(line)))
            .collect();
        let starts = text
            .match_indices('#')
            .filter(|(at, _)| text[at + 1..].starts_with('[') || text[at + 1..].starts_with("!["));
        let mut found = Vec::new();
        for (start, _) in starts {
            let mut depth = 0;
            let mut end = text.len();
            for (at, character) in text[start..].char_indices() {
                depth += match character {
                    '[' => 1,
                    ']' => -1,
                    _ => continue,
                };
                if depth == 0 {
                    end = start + at;
                    break;
                }
            }
            let attribute = &text[start..end];
            let silences = identifiers(attribute).any(|(at, word)| {
                (word == "allow" || word == "expect")
                    && attribute[at + word.len()..].starts_with('(')
            });
            if silences && !attribute.contains("reason =") {
                found.push(
                    text[..start].lines().count() + usize::from(text[..start].ends_with('\n')),
                );
            }
        }
        found
    };
    assert_eq!(
        without_reason(
            "fn a() {}\n#[allow(dead_code)]\nfn b() {}\n#[allow(\n    dead_code,\n    reason = \"c\"\n)]\n\
             #[cfg_attr(d, allow(e))]\n#![expect(f)]\n"
        ),
        [2, 8, 9]
    );
    assert_eq!(
        without_reason("#[allow(a, reason = \"b\")]\n#[derive(Debug)]\nallow(c);"),
        []
    );

    report(
        "a silenced lint without a reason",
        offences(sources(), without_reason),
    );
}

#[test]
fn links_of_the_documents_lead_somewhere() {
    let dead = |text: &str, files: &[String]| -> Vec<usize> {
        let mut found = Vec::new();
        let mut fenced = false;
        for (at, line) in text.lines().enumerate() {
            if line.trim_start().starts_with("```") {
                fenced = !fenced;
            }
            let inline = line
                .split("](")
                .skip(1)
                .filter_map(|rest| rest.split(')').next());
            let reference = line
                .strip_prefix('[')
                .and_then(|rest| Some(rest.split_once("]: ")?.1));
            for target in inline.chain(reference).filter(|_| !fenced) {
                let target = target.split(['#', ' ']).next().unwrap_or(target);
                let target = target.trim_start_matches("./").trim_end_matches('/');
                let elsewhere = target.contains("://") || target.starts_with("mailto:");
                let folder = format!("{target}/");
                let exists = files
                    .iter()
                    .any(|file| file == target || file.starts_with(folder.as_str()));
                if !target.is_empty() && !elsewhere && !exists {
                    found.push(at + 1);
                }
            }
        }
        found
    };
    let files = ["README.md".to_string(), "src/main.rs".to_string()];
    let text = "[a](src/main.rs#top) [b](gone.md)\n[c](https://example.org) [d](#top) [e](./src/)\n\
                [f]: gone.rs\n```\nx[0](y)\n```\n";
    assert_eq!(dead(text, &files), [1, 3]);

    let files = repository();
    let documents = files
        .iter()
        .filter(|path| path.ends_with(".md") && !path.contains('/'))
        .filter_map(read);
    report(
        "a link to nothing",
        offences(documents.collect(), |text| dead(text, &files)),
    );
}

#[test]
fn no_path_of_one_machine_is_written_down() {
    let machine_paths = |text: &str| -> Vec<usize> {
        let absolute = |line: &str| {
            ["/home/", "/root/", "/work/", "/tmp/"]
                .iter()
                .any(|folder| {
                    line.match_indices(folder).any(|(at, _)| {
                        // Further characters to the left make it a relative path or a URL.
                        !line[..at]
                            .ends_with(|c: char| c.is_alphanumeric() || "_-.~/})*".contains(c))
                    })
                })
        };
        text.lines()
            .enumerate()
            .filter(|(_, line)| absolute(line))
            .map(|(at, _)| at + 1)
            .collect()
    };
    assert_eq!(
        machine_paths("a\nx = \"/home/me/model\"\n# in /tmp/x\n"),
        [2, 3]
    );
    assert_eq!(
        machine_paths("docs/home/a ~/work/b https://example.org/tmp/c $HOME/work/"),
        []
    );

    let texts = repository()
        .iter()
        .filter(|path| *path != THIS_FILE)
        .filter_map(read)
        .collect();
    report("a path of one machine", offences(texts, machine_paths));
}

/// Asked for when the tests run: clones that share a build folder may share this binary.
fn root() -> PathBuf {
    env::var_os("CARGO_MANIFEST_DIR")
        .expect("cargo sets CARGO_MANIFEST_DIR")
        .into()
}

/// The files of this repository, relative to its root: what git tracks, or without git everything that is
/// not built or downloaded.
fn repository() -> Vec<String> {
    let listed = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root())
        .output();
    let mut files: Vec<String> = match listed {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout)
            .split_terminator('\0')
            .map(ToString::to_string)
            .filter(|path| root().join(path).is_file())
            .collect(),
        _ => Vec::new(),
    };
    if files.is_empty() {
        walk("", &mut files);
    }
    assert!(
        files.iter().any(|path| path == "Cargo.toml"),
        "no repository at {}",
        root().display()
    );
    files
}

fn walk(folder: &str, files: &mut Vec<String>) {
    let entries = fs::read_dir(root().join(folder)).expect("a folder of this repository");
    for entry in entries {
        let entry = entry.expect("a readable folder");
        let path = format!("{folder}{}", entry.file_name().to_string_lossy());
        if entry.file_type().expect("a file type").is_dir() {
            if !["target", "runs", ".git", ".venv"].contains(&path.as_str()) {
                walk(&format!("{path}/"), files);
            }
        } else {
            files.push(path);
        }
    }
}

/// A file's path and text, unless it is binary.
fn read(path: &String) -> Option<(String, String)> {
    let bytes = fs::read(root().join(path)).expect("a file of this repository");
    Some((path.clone(), String::from_utf8(bytes).ok()?))
}

/// Every Rust file except this one.
fn sources() -> Vec<(String, String)> {
    let files = repository();
    files
        .iter()
        .filter(|path| path.ends_with(".rs") && *path != THIS_FILE)
        .filter_map(read)
        .collect()
}

/// The libraries' Rust files except those that hold only tests.
fn library_sources() -> Vec<(String, String)> {
    let only_tests = |path: &str| path.ends_with("/tests.rs") || path.contains("/tests/");
    sources()
        .into_iter()
        .filter(|(path, _)| within(path, &LIBRARIES) && !only_tests(path))
        .collect()
}

fn within(path: &str, places: &[&str]) -> bool {
    places
        .iter()
        .any(|place| path == *place || (place.ends_with('/') && path.starts_with(place)))
}

/// What comes before the first `#[cfg(test)]`.
fn outside_tests(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

/// A line without its comment. A `//` after a colon belongs to a URL.
fn code(line: &str) -> &str {
    let comment = line
        .match_indices("//")
        .find(|(at, _)| !line[..*at].ends_with(':'));
    comment.map_or(line, |(at, _)| &line[..at])
}

/// The numbers, from 1, of the lines whose code satisfies the predicate.
fn lines_where(text: &str, predicate: impl Fn(&str) -> bool) -> Vec<usize> {
    let numbered = text.lines().enumerate();
    numbered
        .filter(|(_, line)| predicate(code(line)))
        .map(|(at, _)| at + 1)
        .collect()
}

/// The identifiers and keywords of a text, each with its offset.
fn identifiers(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let separator = |c: char| !c.is_alphanumeric() && c != '_';
    let mut next = 0;
    text.split_inclusive(separator).map(move |piece| {
        let start = next;
        next += piece.len();
        (start, piece.trim_end_matches(separator))
    })
}

/// `unsafe-inline` is a word of HTTP.
fn has_unsafe(code: &str) -> bool {
    identifiers(code).any(|(at, word)| word == "unsafe" && !code[at..].starts_with("unsafe-"))
}

fn offences(files: Vec<(String, String)>, find: impl Fn(&str) -> Vec<usize>) -> Vec<String> {
    let in_file = |(path, text): (String, String)| {
        find(&text)
            .into_iter()
            .map(move |line| format!("{path}:{line}"))
            .collect::<Vec<_>>()
    };
    files.into_iter().flat_map(in_file).collect()
}

fn report(rule: &str, found: Vec<String>) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}
