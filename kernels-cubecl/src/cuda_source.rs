//! The CUDA C++ of this crate's kernels, as a CUDA device compiles it when it first runs them.
//!
//! Making it needs no device, so that a machine without one can show that every kernel compiles, and to what.

use std::sync::Arc;

use cubecl::{
    CompilationError, Compiler, CubeKernel,
    cmma::MatrixLayout,
    define_kernel,
    features::Plane,
    ir::{
        DeviceIdentity, DeviceProperties, HardwareProperties, MemoryDeviceProperties,
        MmaProperties, TargetProperties,
    },
    prelude::{AddressType, CubeDim, ExecutionMode, KernelSettings},
    profile::TimingMethod,
};
use cubecl_cpp::{
    register_supported_types,
    shared::{CompilationOptions, CppCompiler, CppSupportedFeatures},
    target::Cuda,
};

/// A kernel's program.
pub struct CudaSource {
    /// The kernel and what it was specialised for.
    pub name: String,
    /// CUDA C++.
    pub text: String,
    /// The architectures it is launched on, or one of each kind of them.
    pub architectures: &'static [&'static str],
    /// Units of a cube.
    pub units: u32,
    /// Dynamic shared memory of a cube, in bytes.
    pub shared_memory: usize,
}

/// For kernels that run on every architecture that CubeCL supports.
pub(crate) const EVERY: &[&str] = &["sm_80", "sm_89", "sm_90a"];

/// Every CUDA kernel of this crate, in the specialisations that are launched most, and some that tests run.
///
/// # Errors
/// If CubeCL refuses a kernel.
pub fn cuda_sources() -> Result<Vec<CudaSource>, CompilationError> {
    let mut kernels = Kernels::new();
    crate::routing::cuda::sources(&mut kernels)?;
    crate::permute::cuda::sources(&mut kernels)?;
    crate::grouped_gemm::cuda::sources(&mut kernels)?;
    crate::fp8::kernel::sources(&mut kernels)?;
    crate::mla_decode::sources(&mut kernels)?;
    crate::compact::cuda::sources(&mut kernels)?;
    Ok(kernels.sources)
}

/// How a kernel is launched.
#[derive(Clone, Copy)]
pub(crate) struct Launch {
    /// See [`CudaSource`].
    pub(crate) architectures: &'static [&'static str],
    /// Units of a cube.
    pub(crate) cube: CubeDim,
    /// Whether indices are checked: `launch` or `launch_unchecked`.
    pub(crate) mode: ExecutionMode,
}

impl Launch {
    /// That of a kernel for every architecture, whose indices are checked.
    pub(crate) fn checked(cube: CubeDim) -> Self {
        Self {
            architectures: EVERY,
            cube,
            mode: ExecutionMode::Checked,
        }
    }

    /// That of a kernel that checks its indices itself.
    pub(crate) fn unchecked(architectures: &'static [&'static str], units: u32) -> Self {
        Self {
            architectures,
            cube: CubeDim::new_1d(units),
            mode: ExecutionMode::Unchecked,
        }
    }
}

/// What is needed of a device to make programs for it, and the programs made.
pub(crate) struct Kernels {
    device: Arc<DeviceProperties>,
    target: Arc<TargetProperties>,
    sources: Vec<CudaSource>,
}

impl Kernels {
    fn new() -> Self {
        // A kernel's program depends on few of these: its architecture is a matter of NVRTC's options.
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: 232_448,
            max_cube_count: (i32::MAX as u32, 65_535, 65_535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(132),
            num_cpu_cores: None,
            last_level_cache_size: None,
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            max_vector_size: 128,
            cube_mma_reserved_shared_memory: 0,
        };
        let identity = DeviceIdentity {
            name: String::new(),
            fingerprint: String::new(),
            physical: None,
        };
        let mut device = DeviceProperties::new(
            Default::default(),
            MemoryDeviceProperties::new(1 << 34, 256),
            hardware,
            TimingMethod::Device,
            identity,
        );
        register_supported_types(&mut device);
        device.features.plane |= Plane::Ops | Plane::Sync | Plane::NonUniformControlFlow;
        let mma = MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: MatrixLayout::RowMajor,
            register_layout_b: MatrixLayout::ColMajor,
            register_layout_acc: MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: Default::default(),
        };
        Self {
            device: Arc::new(device),
            target: Arc::new(TargetProperties { mma }),
            sources: Vec::new(),
        }
    }

    /// Adds a kernel. `kernel` is the constructor that `#[cube]` generates, with the compilation arguments of the
    /// specialisation ([`buffer`] for slices, `()` for scalars and tensor maps), its vector sizes and its constants.
    pub(crate) fn add<K: CubeKernel>(
        &mut self,
        name: impl Into<String>,
        launch: Launch,
        kernel: impl FnOnce(KernelSettings, Arc<DeviceProperties>, Arc<TargetProperties>) -> K,
    ) -> Result<(), CompilationError> {
        let settings = KernelSettings::new(launch.cube.into(), launch.mode, AddressType::U32);
        let kernel = kernel(settings, self.device.clone(), self.target.clone());
        let options = CompilationOptions {
            warp_size: 32,
            supports_features: CppSupportedFeatures {
                grid_constants: true,
                clusters: true,
                fast_math: true,
                fast_tanh: true,
                elect_sync: true,
                dp4a: true,
            },
            amd_wmma: None,
        };
        let compiled = CppCompiler::<Cuda>::default().compile(define_kernel(&kernel)?, &options)?;
        self.sources.push(CudaSource {
            name: name.into(),
            architectures: launch.architectures,
            units: launch.cube.num_elems(),
            shared_memory: compiled.shared_memory_size,
            text: compiled.source,
        });
        Ok(())
    }
}

/// The compilation argument of a buffer that no other aliases.
pub(crate) fn buffer() -> cubecl::prelude::BufferCompilationArg {
    cubecl::prelude::BufferCompilationArg { inplace: None }
}
