//! The CUDA C++ in bf16 on tensor cores, run on the CPU: every index, copy, fragment, exchange and mask of the programs
//! that a GPU gets. Attention and the merging of its chunks against the definition in double precision, grouped products
//! against exact sums. [`gpu.h`](emulated/gpu.h) and [`bf16.h`](emulated/bf16.h) are the GPU, as NVIDIA's documentation
//! describes it.
//!
//! Needs a C++ compiler, named by `CXX` or `c++`. It says nothing of the hardware itself, nor of time.

#[path = "emulated/host.rs"]
mod host;

use deepburn_kernels::cuda_source::{CudaSource, cuda_sources};
use host::{between, compiled, for_the_host, kernel, run, shared_memory};

/// Queries of a sequence, positions of the cache, positions of a chunk, and the valid positions of every sequence.
type Case = (usize, usize, usize, &'static [i32]);

/// No position, one, edges of tiles and chunks, several chunks, sequences of other lengths; a query that sees nothing
/// beside one that does; a length beyond the cache; more rows than a cube has, over several tiles.
const CASES: [Case; 4] = [
    (1, 200, 128, &[200, 0, 1, 64, 65, 127, 129]),
    (3, 150, 64, &[150, 2, 3, 66, 31, 33]),
    (1, 70, 192, &[63, 32, 80]),
    (14, 100, 128, &[100, 13]),
];

#[test]
fn few_channels_and_five_heads() {
    for shape in ["64x64x2", "64x32x2", "32x32x1"] {
        check(shape, "5 x 48 + 16", &CASES);
    }
}

#[test]
fn steps_that_do_not_divide_and_three_heads() {
    for shape in ["64x64x2", "64x32x2", "32x32x1"] {
        check(shape, "3 x 144 + 32", &CASES);
    }
}

/// Two cubes of rows for every chunk, of two tiles.
const OF_THE_REPORT: [Case; 1] = [(1, 192, 128, &[161, 64])];

#[test]
fn the_reports_widths_with_the_most_shared_memory() {
    check("64x64x2", "128 x 512 + 64", &OF_THE_REPORT);
}

#[test]
fn the_reports_widths_with_shorter_tiles() {
    check("64x32x2", "128 x 512 + 64", &OF_THE_REPORT);
}

#[test]
fn the_reports_widths_with_one_tile() {
    check("32x32x1", "128 x 512 + 64", &OF_THE_REPORT);
}

#[track_caller]
fn check(shape: &str, widths: &str, cases: &[Case]) {
    let sources = cuda_sources().expect("CubeCL accepts the kernels");
    let named = |name: String| {
        let source = sources.iter().find(|source| source.name == name);
        source.unwrap_or_else(|| panic!("no kernel {name}"))
    };
    let attend = named(format!("mla tensor cores {shape}, {widths}"));
    let merge = named(format!("mla merge bf16, {widths}"));
    let program = compiled(&attend.name, &host_program(attend, merge, shape, widths));
    for (queries, positions, chunk, lengths) in cases {
        let sizes = [queries, positions, chunk].map(|size| size.to_string());
        let lengths = lengths.iter().map(|length| length.to_string());
        run(
            &program,
            &sizes.into_iter().chain(lengths).collect::<Vec<_>>(),
        );
    }
}

/// K (of weight gradients the height), N, rows behind the last segment, and the rows of every segment: empty ones, edges
/// of tiles and of stages, starts anywhere, more stages than there are, and no rows at all.
const GROUPED: [&[usize]; 4] = [
    &[72, 136, 3, 130, 0, 1, 64, 5],
    &[264, 8, 0, 0, 0, 129],
    &[8, 16, 150, 1],
    &[16, 8, 5, 0, 0],
];

#[test]
fn grouped_products() {
    check_grouped("forward", 0);
}

#[test]
fn input_gradients_of_grouped_products() {
    check_grouped("input grad", 1);
}

#[test]
fn weight_gradients_of_grouped_products() {
    check_grouped("weight grad", 2);
}

#[track_caller]
fn check_grouped(name: &str, mode: usize) {
    let sources = cuda_sources().expect("CubeCL accepts the kernels");
    let name = format!("grouped tensor cores, {name}");
    let source = sources.iter().find(|source| source.name == name);
    let source = source.expect("a kernel of this name");
    let shared = shared_memory(source);
    let text = format!(
        "#include \"bf16.h\"\n\
         alignas(1024) char {shared}[SHARED];\n\
         char *const shared_memory = {shared};\n\
         {}\n\
         #define KERNEL {}\n#define THREADS {}\n#define MODE {mode}\n\
         #include \"grouped.h\"\n",
        for_the_host(&source.text, call),
        kernel(source),
        source.units,
    );
    let program = compiled(&name, &text);
    for sizes in GROUPED {
        let sizes = sizes.iter().map(|size| size.to_string());
        run(&program, &sizes.collect::<Vec<_>>());
    }
}

/// Both programs for the host's compiler, each in a namespace, and what runs them.
fn host_program(attend: &CudaSource, merge: &CudaSource, shape: &str, widths: &str) -> String {
    let numbers = |text: &str| -> Vec<usize> {
        let words = text.split(|c: char| !c.is_ascii_digit());
        words.filter_map(|word| word.parse().ok()).collect()
    };
    let (rows, widths) = (numbers(shape)[0], numbers(widths));
    let shared = shared_memory(attend);
    let part = |namespace: &str, source: &CudaSource| {
        format!(
            "namespace {namespace} {{\n{}\n}}\n",
            for_the_host(&source.text, call)
        )
    };
    format!(
        "#include \"bf16.h\"\n\
         namespace attend {{ alignas(1024) char {shared}[SHARED]; }}\n\
         char *const shared_memory = attend::{shared};\n\
         {}{}\
         #define ATTEND {}\n#define ATTEND_THREADS {}\n#define MERGE {}\n#define MERGE_THREADS {}\n\
         #define HEADS {}\n#define LATENT {}\n#define ROPE {}\n#define ROWS {rows}\n\
         #include \"attend.h\"\n",
        part("attend", attend),
        part("merge", merge),
        kernel(attend),
        attend.units,
        kernel(merge),
        merge.units,
        widths[0],
        widths[1],
        widths[2],
    )
}

/// A call for `volatile("code" : "=f"(result.i_0), .. : "r"(v1), .. : "memory"`: its operands are in this order too.
fn call(statement: &str) -> String {
    let (_, statement) = statement.split_once('"').expect("a string");
    let (code, operands) = statement.split_once("\" :").expect("the end of the string");
    let operands: Vec<&str> = operands
        .split("\"(")
        .skip(1)
        .filter_map(|operand| Some(operand.rsplit_once(')')?.0))
        .collect();
    let mut arguments = operands.join(", ");
    let function = match code {
        _ if code.contains("cp.async.cg.shared.global") => "gpu::cp_async",
        _ if code.contains("cp.async.commit_group") => "gpu::cp_async_commit_group",
        _ if code.contains("cp.async.wait_group 1") => "gpu::cp_async_wait_group_1",
        _ if code.contains("cp.async.wait_all") => "bf16::cp_async_wait_all",
        _ if code.contains("ldmatrix.sync.aligned.m8n8.x4.shared.b16") => "bf16::ldmatrix_x4",
        _ if code.contains("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16") => {
            "bf16::ldmatrix_x4_trans"
        }
        _ if code.contains("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") => {
            "bf16::mma_m16n8k16_bf16"
        }
        _ if code.contains("shfl.sync.bfly.b32") => {
            arguments += &format!(", {}", between(code, "%1, ", ","));
            "bf16::shfl_bfly"
        }
        _ if code.contains("cvt.rn.bf16x2.f32") => "bf16::cvt_bf16x2",
        _ => panic!("no emulation of {code}"),
    };
    format!("{function}({arguments});")
}
