//! Text to train on.

use std::path::Path;

/// Writes 40 files of Rust into a new folder.
pub(crate) fn write(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    for file in 0..40 {
        let lines = (0..60).map(|line| {
            let number = (file * 7919 + line * 104_729) % 9973;
            format!(
                "fn item_{}(x: u32) -> u32 {{ x * {number} + {line} }}\n",
                number % 13
            )
        });
        std::fs::write(folder.join(format!("{file}.rs")), lines.collect::<String>()).unwrap();
    }
}
