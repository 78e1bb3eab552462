//! Where the reference cases are.

use std::path::PathBuf;

/// The folder of a case.
pub(crate) fn fixture(case: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(case)
}
