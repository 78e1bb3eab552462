//! CUDA C++ as programs of the host: what the emulated kernels share.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use deepburn_kernels::cuda_source::CudaSource;

/// Compiles a program.
#[track_caller]
pub(crate) fn compiled(name: &str, text: &str) -> PathBuf {
    // Asked for when the test runs: clones that share a build folder may share this binary.
    let here = env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let here = Path::new(&here).join("tests/emulated");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
    fs::create_dir_all(&folder).expect("a folder under the target directory");
    let program = folder.join(name.replace(|c: char| !c.is_ascii_alphanumeric(), "_"));
    let file = program.with_extension("cpp");
    fs::write(&file, text).expect("a file under the target directory");
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_string());
    let compiled = Command::new(&compiler)
        .args(["-std=c++17", "-O2", "-w", "-pthread", "-I"])
        .arg(here)
        .arg("-o")
        .args([&program, &file])
        .output()
        .unwrap_or_else(|error| panic!("the C++ compiler {compiler}: {error}"));
    let log = String::from_utf8_lossy(&compiled.stderr);
    assert!(compiled.status.success(), "{name}:\n{log}");
    program
}

/// Runs a compiled program, which compares.
#[track_caller]
pub(crate) fn run(program: &Path, arguments: &[String]) {
    let run = Command::new(program).args(arguments).output();
    let run = run.expect("a program just compiled");
    let found = String::from_utf8_lossy(&run.stdout);
    let name = program.display();
    println!("{name}, {arguments:?}: {found}");
    assert!(run.status.success(), "{name}, {arguments:?}: {found}");
}

/// The name of the kernel.
#[track_caller]
pub(crate) fn kernel(source: &CudaSource) -> &str {
    let start = format!("__launch_bounds__({})", source.units);
    between(&source.text, &start, "(").trim()
}

/// The name of the program's shared memory.
#[track_caller]
pub(crate) fn shared_memory(source: &CudaSource) -> &str {
    let shared = between(&source.text, "extern __shared__ ", "[]");
    shared.rsplit(' ').next().expect("a name after the type")
}

#[track_caller]
pub(crate) fn between<'a>(text: &'a str, before: &str, after: &str) -> &'a str {
    let rest = text.split_once(before).expect("what comes before").1;
    rest.split_once(after).expect("what comes after").0
}

/// The program without CUDA's headers, and with a call of what it does for every assembly statement.
pub(crate) fn for_the_host(text: &str, call: impl Fn(&str) -> String) -> String {
    let lines = text.lines().filter(|line| !line.starts_with("#include"));
    let text = lines.collect::<Vec<_>>().join("\n");
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some((before, after)) = rest.split_once("asm ") {
        let (statement, tail) = after.split_once(");").expect("the end of a statement");
        out.push_str(before);
        out.push_str(&call(statement));
        rest = tail;
    }
    out + rest
}
