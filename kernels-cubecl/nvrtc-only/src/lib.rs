//! A stand-in for `cubecl-llvm`: the same names that `cubecl-cuda` 0.11.3 uses, and no LLVM.
//!
//! The real crate's build script downloads an LLVM bundle from outside the package registries, and
//! `cubecl-cuda` depends on it even when the feature `cpp` selects the CUDA C++ route through NVRTC.
//! Deepburn always takes that route, so this compiler answers every request with an error that says so.

use cubecl_core::{ir::nvidia::SmArch, prelude::KernelDefinition};
use cubecl_environment::backtrace::BackTrace;
use cubecl_server::{
    compiler::{CompilationError, Compiler},
    kernel::BufferIOAttr,
};

use crate::nvptx::ptx_version::PtxVersion;

/// The targets of the LLVM route.
#[derive(Clone, Copy, Debug, Default)]
pub enum LlvmTarget {
    /// PTX for NVIDIA devices.
    #[default]
    Nvptx,
}

/// A compiler that refuses every kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlironCompiler {
    /// The target that was asked for.
    pub target: LlvmTarget,
}

/// Options that `cubecl-cuda` fills in.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// AMD architecture, unused here.
    pub arch: Option<()>,
    /// NVIDIA architecture.
    pub sm_arch: Option<SmArch>,
    /// PTX version to emit.
    pub ptx_version: Option<PtxVersion>,
    /// Whether launch parameters are grid constants.
    pub grid_constants: bool,
}

/// A compiled PTX module. Never constructed.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// NUL-terminated PTX.
    pub ptx: Vec<core::ffi::c_char>,
    /// Entry point symbol.
    pub entrypoint: String,
    /// Intermediate representation, for logs.
    pub ir: String,
    /// Shared memory per launch, in bytes.
    pub shared_memory_size: usize,
    /// Buffer access modes in binding order.
    pub io: Vec<BufferIOAttr>,
}

/// What the LLVM route would produce.
#[derive(Clone, Debug)]
pub enum PlironArtifact {
    /// Nothing: the variant exists so that a match on [`PlironArtifact::NvptxCode`] needs a default arm.
    Absent,
    /// A PTX module.
    NvptxCode(NvptxModule),
}

impl core::fmt::Display for PlironArtifact {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Absent => Ok(()),
            Self::NvptxCode(module) => f.write_str(&module.ir),
        }
    }
}

impl Compiler for PlironCompiler {
    type Representation = PlironArtifact;
    type CompilationOptions = PlironOptions;

    fn buffer_io(_: &Self::Representation) -> Option<Vec<BufferIOAttr>> {
        None
    }

    fn compile(
        &mut self,
        _: KernelDefinition,
        _: &Self::CompilationOptions,
    ) -> Result<Self::Representation, CompilationError> {
        Err(CompilationError::Validation {
            reason:
                "this build has no LLVM route for CUDA: enable the `cuda-cpp` feature of cubecl, \
                     which compiles kernels as CUDA C++ through NVRTC"
                    .into(),
            backtrace: BackTrace::capture(),
        })
    }

    fn extension(&self) -> &'static str {
        "ll"
    }

    fn lang_tag(&self) -> &'static str {
        "llvm"
    }
}

/// NVPTX names.
pub mod nvptx {
    /// PTX versions.
    pub mod ptx_version {
        /// A PTX version, as the real crate names it. Never chosen here: NVRTC picks its own.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct PtxVersion(u32);

        impl PtxVersion {
            /// The newest version that a driver loads: unknown without the LLVM route.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl core::fmt::Display for PtxVersion {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                write!(f, "ptx{}", self.0)
            }
        }
    }
}

/// Names shared by the targets.
pub mod shared {
    /// Feature restriction.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        /// A GPU target of the LLVM route.
        #[derive(Clone, Copy, Debug)]
        pub enum GpuTarget {
            /// NVIDIA.
            Nvptx,
        }

        /// Narrows a device's features to what the LLVM route lowers. Only called on that route.
        pub fn restrict_features(_: &mut DeviceProperties, _: GpuTarget) {}
    }
}
