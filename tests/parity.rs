//! The reference cases pass `deepburn verify` on every device: what transformers, DeepSeek's inference code and its
//! schedules compute, this computes too.
//!
//! `tests/fixtures/README.md` says where the references come from, `src/verify/tolerance.rs` how close results have to
//! be. The CPU is always there; `--features wgpu` adds the device that wgpu finds, `--features cuda` the first GPU.

mod support;

use std::process::Command;

use serde_json::Value;
use support::fixture;

/// Rows that must be there: the tensors of the files without inputs, three per tokenizer case and one for its
/// vocabulary, one for all final parameters together.
macro_rules! cases {
    ($($case:ident: $directory:literal, $rows:expr, $not_verified:expr;)*) => {
        mod cpu {
            $(#[test]
            fn $case() {
                super::passes($directory, "cpu", ($rows, $not_verified));
            })*
        }

        #[cfg(feature = "wgpu")]
        mod wgpu {
            $(#[test]
            fn $case() {
                super::passes($directory, "wgpu", ($rows, $not_verified));
            })*
        }

        #[cfg(feature = "cuda")]
        mod cuda {
            $(#[test]
            fn $case() {
                if super::has_cuda() {
                    super::passes($directory, "cuda", ($rows, $not_verified));
                }
            })*
        }
    };
}

cases! {
    one_dense_and_two_moe_layers: "tiny-dense-moe", 30 + 2, 0;
    the_same_weights_in_three_files: "tiny-dense-moe-sharded", 30 + 2, 0;
    yarn_and_a_tokenizer: "tiny-yarn", 27 + 2 + 16 * 3 + 1, 0;
    // What bfloat16 arithmetic gives is for information: it sends tokens to other experts.
    queries_without_a_latent_in_bf16: "tiny-noqlora-bf16", 30, 1;
    weights_in_fp8: "tiny-fp8", 27 + 2 + 2 * 8 + 2, 0;
    // What two wrong readings of the definition give is for information.
    prediction_of_two_tokens: "tiny-mtp", 39 + 130, 2;
    five_steps_of_training: "tiny-train", 12 + 89 + 91 + 1, 0;
    ten_steps_of_training: "tiny-train-10", 27 + 2 + 89 + 12 + 91 + 1, 0;
}

fn verify(case: &str, device: &str) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_deepburn"))
        .args(["verify", "--json", "--device", device])
        .arg(fixture(case))
        .output()
        .expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[track_caller]
fn passes(case: &str, device: &str, (rows, not_verified): (usize, u64)) {
    let (code, out, error) = verify(case, device);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{error}"));
    let found = report["rows"].as_array().expect("rows");
    let failed: Vec<_> = found.iter().filter(|row| row["pass"] != true).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!((code, found.len()), (Some(0), rows), "{error}");
    let skipped = report["not_verified"].as_array().expect("a list");
    let counts = skipped
        .iter()
        .map(|entry| entry["count"].as_u64().expect("a number"));
    assert_eq!(counts.sum::<u64>(), not_verified, "{skipped:?}");
}

/// Whether there is a GPU; that there is none is said, and the test counts as passed.
#[cfg(feature = "cuda")]
fn has_cuda() -> bool {
    let (_, _, error) = verify("tiny-fp8", "cuda");
    let absent = error.contains("this machine has no such device");
    if absent {
        eprintln!("skipped: {error}");
    }
    !absent
}
