//! The matrix products' CUDA C++, run on the CPU: every index, copy, barrier, fragment and descriptor of the programs
//! that a GPU gets, against exact sums. [`gpu.h`](emulated/gpu.h) is the GPU, as NVIDIA's documentation describes it.
//!
//! Needs a C++ compiler, named by `CXX` or `c++`. It says nothing of the hardware itself, nor of time.

#[path = "emulated/host.rs"]
mod host;

use deepburn_kernels::cuda_source::{CudaSource, cuda_sources};
use host::{between, compiled, for_the_host, kernel, run, shared_memory};

/// M, N, K of even and odd N: less than a tile, edges of tiles, tails of the inner size, and a ring that comes round.
const EVEN: [[usize; 3]; 5] = [
    [1, 2, 128],
    [7, 130, 129],
    [129, 126, 384],
    [200, 72, 100],
    [65, 258, 1300],
];
const ODD: [[usize; 3]; 2] = [[7, 131, 129], [129, 127, 384]];

#[test]
fn hopper_with_wide_tiles_and_blocks() {
    check("hopper multiply 128 f32x2, b in blocks", &EVEN);
}

#[test]
fn hopper_with_narrow_tiles_and_rows() {
    check("hopper multiply 64 f32x2, b in rows", &EVEN);
    // More tiles of rows than are grouped.
    check("hopper multiply 64 f32x2, b in rows", &[[2100, 130, 128]]);
}

#[test]
fn portable_with_rows() {
    check("portable multiply f32x2, b in rows", &EVEN);
}

#[test]
fn portable_with_blocks_and_rows_of_odd_length() {
    check("portable multiply f32x1, b in blocks", &ODD);
}

/// M, N, K and the rows of every expert's segment, padded to tiles of 128: empty ones everywhere, more tiles than the
/// segments need, one that is not full, matrices that end in the middle of a block.
const GROUPED: [&[usize]; 4] = [
    &[640, 130, 300, 0, 100, 0, 0, 257, 0],
    &[384, 258, 100, 128, 0, 128],
    &[200, 64, 129, 0, 5, 72],
    &[130, 2, 128, 0, 0],
];
const GROUPED_ODD: [&[usize]; 2] = [&[512, 131, 129, 1, 0, 200], &[128, 1, 1, 0, 1]];

#[test]
fn hopper_with_wide_tiles_and_experts() {
    check("hopper multiply 128 f32x2, b in experts' blocks", &GROUPED);
}

#[test]
fn hopper_with_narrow_tiles_and_experts() {
    check("hopper multiply 64 f32x2, b in experts' blocks", &GROUPED);
}

#[test]
fn portable_with_experts() {
    check("portable multiply f32x2, b in experts' blocks", &GROUPED);
    let name = "portable multiply f32x1, b in experts' blocks";
    check(name, &GROUPED_ODD);
}

/// M, N, K and what every segment has of the inner size, padded to blocks of 128: empty ones everywhere, and blocks
/// behind the last.
const SEGMENTS: [&[usize]; 3] = [
    &[7, 130, 1024, 0, 128, 300, 0, 5, 0],
    &[129, 72, 384, 384, 0],
    &[130, 66, 200, 0, 0, 130],
];

#[test]
fn hopper_with_segments_of_the_inner_size() {
    check("hopper multiply 128 f32x2, segments", &SEGMENTS);
    check("hopper multiply 64 f32x2, segments", &SEGMENTS);
}

#[test]
fn portable_with_segments_of_the_inner_size() {
    check("portable multiply f32x2, segments", &SEGMENTS);
    check(
        "portable multiply f32x1, segments",
        &[&[7, 131, 512, 129, 0, 1]],
    );
}

/// Compiles a kernel for the host and runs it for each of the sizes.
#[track_caller]
fn check(name: &str, sizes: &[impl AsRef<[usize]>]) {
    let sources = cuda_sources().expect("CubeCL accepts the kernels");
    let source = sources
        .iter()
        .find(|source| source.name == name)
        .expect("a kernel of this name");
    let program = compiled(name, &host_program(source));
    for size in sizes {
        let sizes = size.as_ref().iter().map(|size| size.to_string());
        run(&program, &sizes.collect::<Vec<_>>());
    }
}

/// A program that the host's compiler takes: without CUDA's headers, with calls for assembly.
fn host_program(source: &CudaSource) -> String {
    let shared = shared_memory(source);
    let columns = source.name.strip_prefix("hopper multiply ");
    let columns = columns.map_or(String::new(), |rest| {
        format!("#define COLUMNS {}\n", between(rest, "", " "))
    });
    let b_tile_rows = if source.name.ends_with("blocks") {
        128
    } else {
        1
    };
    let grouped = match &source.name {
        name if name.contains("experts") => "#define GROUPED\n",
        name if name.contains("segments") => "#define SEGMENTS\n",
        _ => "",
    };
    let output = if source.name.contains("x2") {
        "float_2"
    } else {
        "float"
    };
    format!(
        "#include \"gpu.h\"\n\
         alignas(1024) char {shared}[SHARED];\n\
         char *const shared_memory = {shared};\n\
         {}\n\
         #define KERNEL {}\n#define THREADS {}\n#define B_TILE_ROWS {b_tile_rows}\n#define OUTPUT {output}\n\
         {columns}{grouped}\
         #include \"product.h\"\n",
        for_the_host(&source.text, call),
        kernel(source),
        source.units,
    )
}

/// `volatile("code" : "=f"(result.i_0), .. : "r"(v1), .. : "memory"`
fn call(statement: &str) -> String {
    let (_, statement) = statement.split_once('"').expect("a string");
    let (code, operands) = statement.split_once("\" :").expect("the end of the string");
    let names = |output: bool| -> Vec<&str> {
        let constraints = operands.split("\"(").zip(operands.split("\"(").skip(1));
        constraints
            .filter(|(constraint, _)| {
                constraint
                    .rsplit('"')
                    .next()
                    .is_some_and(|it| it.starts_with('=') == output)
            })
            .map(|(_, operand)| operand.split_once(')').map_or(operand, |(name, _)| name))
            .collect()
    };
    let (outputs, inputs) = (names(true), names(false));
    if code.contains("wgmma.mma_async") {
        let addresses: Vec<String> = outputs.iter().map(|name| format!("&{name}")).collect();
        let (addresses, count) = (addresses.join(", "), outputs.len());
        let inputs = inputs.join(", ");
        return format!(
            "{{ float *out[] = {{{addresses}}}; gpu::wgmma_x4(out, {count}, {inputs}); }}"
        );
    }
    let mut arguments = [outputs, inputs].concat().join(", ");
    let function = match code {
        _ if code.contains("cp.async.cg.shared.global") => "cp_async",
        _ if code.contains("cp.async.commit_group") => "cp_async_commit_group",
        _ if code.contains("cp.async.wait_group 1") => "cp_async_wait_group_1",
        _ if code.contains("ldmatrix") && code.contains(".x4.") => "ldmatrix_x4",
        _ if code.matches("mma.sync.aligned.m16n8k32").count() == 4 => "mma_m16n8k32_x4",
        _ if code.contains("setmaxnreg") => "no_operation",
        _ if code.contains("bfe.u64 at, at, 4, 14; or.b64") => {
            let fields = code.rsplit(", ").next().expect("the last operand");
            arguments += &format!(", {}", fields.trim_end_matches([';', ' ', '}']));
            "descriptor"
        }
        _ => panic!("no emulation of {code}"),
    };
    format!("gpu::{function}({arguments});")
}
