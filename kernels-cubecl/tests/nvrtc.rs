//! Every CUDA kernel, compiled as a CUDA device compiles it when it first runs the kernel, and then assembled, for each
//! architecture that it is launched on. Needs neither a GPU nor a driver.
//!
//! What it holds: the compilers accept the kernels, the tensor cores' and the copy engine's instructions are what comes
//! out, and no kernel keeps registers in memory. What it cannot hold: that they compute what they should, which is for
//! `device.rs`.

#![allow(
    unsafe_code,
    reason = "NVRTC is a C library, loaded when the test runs"
)]

use std::{
    collections::BTreeSet,
    env,
    ffi::{CString, c_char, c_int, c_void},
    fs,
    path::{Path, PathBuf},
    process::Command,
    ptr,
};

use deepburn_kernels::cuda_source::{CudaSource, cuda_sources};
use libloading::{Library, Symbol};

/// The environment variable with the folder of the compilers' packages.
const FOLDER: &str = "DEEPBURN_NVRTC";

#[test]
fn every_kernel_compiles_and_keeps_nothing_in_local_memory() {
    let report = "ptxas info    : Function properties for f\n    \
                  12 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
                  ptxas info    : Used 255 registers, used 1 barriers";
    assert_eq!(spilled(report), Some(24));
    assert_eq!(registers(report), Some(255));
    assert_eq!(spilled("nothing"), None);

    println!("| kernel | architecture | registers | units | shared memory, bytes |");
    println!("|---|---|---|---|---|");
    let mut spilling = Vec::new();
    for compiled in compile(|_| true) {
        let (source, report) = (&compiled.source, &compiled.report);
        let Some(registers) = registers(report) else {
            panic!(
                "no registers in what ptxas says of {}:\n{report}",
                compiled.name()
            );
        };
        println!(
            "| {} | {} | {registers} | {} | {} |",
            source.name, compiled.architecture, source.units, source.shared_memory
        );
        if spilled(report) != Some(0) {
            spilling.push(format!("{}:\n{report}", compiled.name()));
        }
        assert!(
            registers * source.units <= 65_536
                && source.shared_memory <= shared_memory(compiled.architecture),
            "{} does not fit in a multiprocessor",
            compiled.name()
        );
    }
    assert!(
        spilling.is_empty(),
        "local memory is used by\n{}",
        spilling.join("\n")
    );
}

/// The most bytes of shared memory that a cube may have, by the CUDA C++ programming guide.
fn shared_memory(architecture: &str) -> usize {
    let kibibytes = match architecture {
        "sm_80" => 163,
        "sm_89" | "sm_120a" => 99,
        "sm_90a" => 227,
        _ => panic!("the shared memory of {architecture} is not written here"),
    };
    kibibytes * 1024
}

#[test]
fn names_are_different() {
    let sources = cuda_sources().expect("CubeCL accepts the kernels");
    let names: BTreeSet<_> = sources.iter().map(|source| &source.name).collect();
    assert_eq!(names.len(), sources.len());
}

#[test]
fn hopper_multiplies_with_warpgroups_and_copies_with_the_tensor_memory_accelerator() {
    for compiled in compile(|name| name.starts_with("hopper multiply")) {
        let columns = if compiled.source.name.contains(" 64 ") {
            64
        } else {
            128
        };
        let multiply = format!("wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3");
        // Four of 32 for each 128 of the inner size, in one place of the program.
        compiled.has(&multiply, 4);
        compiled.has("wgmma.wait_group.sync.aligned 0", 1);
        compiled.has("cp.async.bulk.tensor.2d.shared", 2);
        compiled.has("mbarrier.try_wait.parity", 2);
        compiled.has("setmaxnreg", if columns == 128 { 2 } else { 0 });
        for loss in ["serialized", "setmaxnreg"] {
            let report = &compiled.report;
            assert!(!report.contains(loss), "{}:\n{report}", compiled.name());
        }
    }
}

#[test]
fn other_architectures_multiply_with_warps() {
    for compiled in compile(|name| name.starts_with("portable multiply")) {
        // Four steps for each of sixteen tiles of 16 x 8 of a warp.
        compiled.has("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", 64);
        compiled.has("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 8 + 16);
        // Before the loop and in it, two matrices, four copies of a unit.
        compiled.has("cp.async.cg.shared.global", 16);
    }
}

#[test]
fn attention_multiplies_on_tensor_cores_from_one_copy_of_the_cache() {
    let name =
        |name: &str| name.starts_with("mla tensor cores") && name.ends_with("128 x 512 + 64");
    for compiled in compile(name) {
        // Rows and positions of a cube, and warps: each has sixteen rows and its part of the positions for scores, all
        // rows and its part of 512 channels for sums.
        let shape = compiled.source.name.split([' ', ',']).nth(3);
        let [rows, keys, _] = sizes(shape.expect("a shape in the name"));
        let warps = compiled.source.units as usize / 32;
        let own_keys = keys / (warps / (rows / 16));
        let (own_channels, together) = (512 / warps, 4);
        // Four steps of sixteen channels are in one place of the program, or in some where the compiler unrolls their
        // loop; all steps of sixteen positions are in one.
        let scores = together * own_keys / 8;
        let sums = keys / 16 * (rows / 16) * (own_channels / 8);
        let multiply = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32";
        let places = (compiled.count(multiply) - sums) / scores;
        assert!((1..=9).contains(&places), "{}", compiled.name());
        compiled.has(multiply, places * scores + sums);
        let operands = places * together * (1 + own_keys / 16) + keys / 16 * (rows / 16);
        compiled.has("ldmatrix.sync.aligned.m8n8.x4.shared.b16", operands);
        let latents = keys / 16 * (own_channels / 16);
        compiled.has("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", latents);
        // The queries and the first tile before the loop, the next tile in it, 16 bytes per unit.
        let copies = |rows: usize| rows * 576 / 8 / compiled.source.units as usize;
        let copied = copies(rows) + 2 * copies(keys);
        compiled.has("cp.async.cg.shared.global", copied);
        compiled.has("cp.async.wait_all", 1);
    }
}

#[test]
fn grouped_products_in_bf16_multiply_on_tensor_cores() {
    for compiled in compile(|name| name.starts_with("grouped tensor cores")) {
        // Four steps of sixteen for each of sixteen tiles of 16 x 8 of a warp.
        compiled.has("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 64);
        // For each step four tiles of rows and two pairs of tiles of columns, turned where the inner size is across.
        let (rows, columns) = (4 * 4, 4 * 2);
        let turned = match compiled.source.name.rsplit(", ").next() {
            Some("forward") => columns,
            Some("input grad") => 0,
            _ => rows + columns,
        };
        compiled.has("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", turned);
        let straight = rows + columns - turned;
        compiled.has("ldmatrix.sync.aligned.m8n8.x4.shared.b16", straight);
        // Two stages before the loop and one in it, two matrices, four copies of a unit.
        compiled.has("cp.async.cg.shared.global", 3 * 2 * 4);
    }
}

#[test]
fn codes_are_converted_by_the_instruction_where_there_is_one() {
    let quantizes = |name: &str| name.contains("quantize");
    for compiled in compile(|name| quantizes(name) && name.ends_with("cvt")) {
        let conversions = compiled.count("cvt.rn.satfinite.e4m3x2.f32");
        assert!(conversions > 0, "{}", compiled.name());
    }
    for compiled in compile(|name| quantizes(name) && name.ends_with("integer")) {
        compiled.has("e4m3", 0);
    }
}

/// A kernel, compiled for an architecture and assembled.
struct Compiled<'a> {
    source: &'a CudaSource,
    architecture: &'static str,
    ptx: String,
    /// What the assembler said of the kernel.
    report: String,
}

impl Compiled<'_> {
    fn name(&self) -> String {
        format!("{} for {}", self.source.name, self.architecture)
    }

    fn count(&self, instruction: &str) -> usize {
        self.ptx.matches(instruction).count()
    }

    #[track_caller]
    fn has(&self, instruction: &str, times: usize) {
        let found = self.count(instruction);
        assert_eq!(found, times, "{instruction} in {}", self.name());
    }
}

/// Compiles the kernels that are wanted by name, for all of their architectures.
fn compile(wanted: impl Fn(&str) -> bool) -> Vec<Compiled<'static>> {
    let sources = cuda_sources().expect("CubeCL accepts the kernels");
    let sources: &'static [CudaSource] = sources.leak();
    let tools = Tools::new();
    let mut compiled = Vec::new();
    for source in sources.iter().filter(|source| wanted(&source.name)) {
        for &architecture in source.architectures {
            let ptx = tools.compile(source, architecture);
            let report = tools.assemble(source, architecture, &ptx);
            compiled.push(Compiled {
                source,
                architecture,
                ptx,
                report,
            });
        }
    }
    assert!(
        !compiled.is_empty(),
        "no kernel has the name that was asked for"
    );
    compiled
}

/// `64x64x2`
fn sizes(shape: &str) -> [usize; 3] {
    let sizes: Vec<usize> = shape
        .split('x')
        .map(|size| size.parse().expect("a size"))
        .collect();
    sizes.try_into().expect("three sizes")
}

/// Registers of a unit, from the assembler's report.
fn registers(report: &str) -> Option<u32> {
    number_before(report.split_once("Used ")?.1, " registers")
}

/// Bytes of local memory that a unit uses, from the assembler's report.
fn spilled(report: &str) -> Option<u32> {
    let line = report
        .lines()
        .find(|line| line.contains("bytes stack frame"))?;
    ["stack frame", "spill stores", "spill loads"]
        .iter()
        .map(|what| number_before(line, &format!(" bytes {what}")))
        .sum()
}

fn number_before(text: &str, what: &str) -> Option<u32> {
    let before = text.split_once(what)?.0;
    before.rsplit([' ', '\t']).next()?.parse().ok()
}

/// NVRTC and the assembler.
struct Tools {
    folder: PathBuf,
    nvrtc: Library,
}

type Program = *mut c_void;

impl Tools {
    fn new() -> Self {
        let Some(folder) = env::var_os(FOLDER) else {
            panic!(
                "{FOLDER} is not set: this test compiles the CUDA kernels with NVIDIA's compilers, \
                 which need no GPU. Install them with\n\n    \
                 export {FOLDER}=\"$(kernels-cubecl/nvrtc.sh)\"\n"
            );
        };
        let folder = PathBuf::from(folder);
        let path = folder.join("cuda_nvrtc/lib/libnvrtc.so.12");
        // SAFETY: the library's initialisers prepare the library and do nothing else.
        let nvrtc = unsafe { Library::new(&path) };
        let nvrtc = nvrtc.unwrap_or_else(|error| panic!("{FOLDER}: {}: {error}", path.display()));
        Self { folder, nvrtc }
    }

    /// # Safety
    /// `F` has to be the type of the function of this name in `nvrtc.h`, and calls have to be as documented there.
    unsafe fn function<F>(&self, name: &str) -> Symbol<'_, F> {
        // SAFETY: the caller's.
        unsafe { self.nvrtc.get(name) }.unwrap_or_else(|error| panic!("NVRTC's {name}: {error}"))
    }

    /// PTX of a kernel, with the options that CubeCL's CUDA runtime passes.
    fn compile(&self, source: &CudaSource, architecture: &str) -> String {
        type Create = extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        type Destroy = extern "C" fn(*mut Program) -> c_int;

        let text = CString::new(source.text.as_str()).expect("a program has no NUL");
        let include = |package: &str| {
            let folder = self.folder.join(package).join("include");
            format!("--include-path={}", folder.display())
        };
        let options = [
            format!("--gpu-architecture={architecture}"),
            include("cuda_runtime"),
            include("cuda_cccl"),
            "-lineinfo".to_string(),
        ]
        .map(|option| CString::new(option).expect("an option has no NUL"));
        let options = options.each_ref().map(|option| option.as_ptr());
        let (none, mut program): (_, Program) = (ptr::null(), ptr::null_mut());
        // SAFETY: the types are those of nvrtc.h, all strings end in NUL and live until the last call, and the
        // program was created before it is used.
        unsafe {
            let create = self.function::<Create>("nvrtcCreateProgram");
            let created = create(
                &mut program,
                text.as_ptr(),
                none,
                0,
                ptr::null(),
                ptr::null(),
            );
            assert_eq!(created, 0, "NVRTC takes no program");
            let compile = self.function::<Compile>("nvrtcCompileProgram");
            let compiled = compile(program, options.len() as c_int, options.as_ptr());
            let log = self.output(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog");
            assert_eq!(compiled, 0, "{} for {architecture}:\n{log}", source.name);
            let ptx = self.output(program, "nvrtcGetPTXSize", "nvrtcGetPTX");
            self.function::<Destroy>("nvrtcDestroyProgram")(&mut program);
            ptx
        }
    }

    /// # Safety
    /// `program` was created, and the functions are a pair of `nvrtcGet*Size` and `nvrtcGet*` for text.
    unsafe fn output(&self, program: Program, size: &str, get: &str) -> String {
        type Size = extern "C" fn(Program, *mut usize) -> c_int;
        type Get = extern "C" fn(Program, *mut c_char) -> c_int;

        let mut length = 0;
        // SAFETY: the caller's; the buffer is as long as NVRTC says, the final NUL included.
        let mut text = unsafe {
            let answer = self.function::<Size>(size)(program, &mut length);
            assert_eq!(answer, 0, "{size}");
            let mut text = vec![0u8; length];
            let answer = self.function::<Get>(get)(program, text.as_mut_ptr().cast());
            assert_eq!(answer, 0, "{get}");
            text
        };
        text.truncate(text.iter().position(|&byte| byte == 0).unwrap_or(length));
        String::from_utf8(text).expect("NVRTC writes ASCII")
    }

    /// Assembles PTX and returns what the assembler says of it. The PTX stays in the target directory, to be read.
    fn assemble(&self, source: &CudaSource, architecture: &str, ptx: &str) -> String {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvrtc");
        fs::create_dir_all(&folder).expect("a folder under the target directory");
        let name = source
            .name
            .replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        // Other tests may assemble the same kernel at the same time.
        let mine = format!("{name}.{architecture}.{:?}", std::thread::current().id());
        let file = folder.join(format!("{mine}.{}.ptx", std::process::id()));
        let assembled = file.with_extension("cubin");
        fs::write(&file, ptx).expect("a file under the target directory");
        let output = Command::new(self.folder.join("cuda_nvcc/bin/ptxas"))
            .args(["--verbose", "--gpu-name", architecture, "--output-file"])
            .args([&assembled, &file])
            .output()
            .unwrap_or_else(|error| panic!("{FOLDER}: ptxas: {error}"));
        let report = String::from_utf8_lossy(&output.stderr).into_owned()
            + &String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success(),
            "{} for {architecture}:\n{report}",
            source.name
        );
        fs::rename(&file, folder.join(format!("{name}.{architecture}.ptx")))
            .expect("a file just written");
        fs::remove_file(assembled).expect("a file just written");
        report
    }
}
