//! What the CubeCL versions share: which tensors they serve, their buffers and their launches.

use burn::tensor::{DType, Device};

#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) use launch::*;

/// Whether `device` runs CubeCL kernels, with or without autodiff.
pub(crate) fn is_cube(device: &Device) -> bool {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    return matches!(
        device.clone().inner().as_dispatch(),
        burn::backend::DispatchDevice::Cube(_)
    );
    #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
    {
        let _ = device;
        false
    }
}

/// Whether the kernels for single precision serve tensors of `dtype` on `device`.
pub(crate) fn is_native_f32(device: &Device, dtype: DType) -> bool {
    dtype == DType::F32 && is_cube(device)
}

/// Whether the versions for single precision serve tensors of `dtype` on `device`, where Flex has one as well.
pub(crate) fn is_native_f32_or_flex(device: &Device, dtype: DType) -> bool {
    crate::flex::is_native_f32(device, dtype) || is_native_f32(device, dtype)
}

/// Whether the kernels that accumulate in single precision serve tensors of `dtype` on `device`.
pub(crate) fn is_native(device: &Device, dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16) && is_cube(device)
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod launch {
    use burn::{
        backend::{Cube, TensorMetadata, tensor::FloatTensor},
        tensor::{DType, Shape, bf16, f16},
    };
    use cubecl::prelude::*;

    /// A tensor of any kind on a CubeCL device.
    pub(crate) type CubeTensor = FloatTensor<Cube>;

    /// The tensor with its elements next to each other, as the kernels index them.
    pub(crate) fn contiguous(tensor: CubeTensor) -> CubeTensor {
        burn_cubecl::kernel::into_contiguous(tensor)
    }

    /// The element type, as kernels are told it.
    pub(crate) fn elem(tensor: &CubeTensor) -> ElemType {
        match tensor.dtype {
            DType::F32 => f32::elem_type_native(),
            DType::F16 => f16::elem_type_native(),
            DType::BF16 => bf16::elem_type_native(),
            DType::I32 => i32::elem_type_native(),
            DType::I64 => i64::elem_type_native(),
            DType::U32 => u32::elem_type_native(),
            other => panic!("no kernel takes {other:?}"),
        }
    }

    /// A contiguous tensor on the device of `like`, not yet written.
    pub(crate) fn empty(like: &CubeTensor, shape: impl Into<Shape>, dtype: DType) -> CubeTensor {
        let (client, device, shape) = (like.client.clone(), like.device(), shape.into());
        let handle = client.empty(shape.num_elements() * dtype.size());
        CubeTensor::new_contiguous(client, device, shape, handle, dtype)
    }

    /// A grid of at least `cubes` cubes, numbered by `CUBE_POS`; the kernel ends those beyond.
    pub(crate) fn grid(client: &Client, cubes: usize, dim: CubeDim) -> CubeCount {
        cubecl::calculate_cube_count_elemwise(client, cubes * dim.num_elems() as usize, dim)
    }

    /// The width of indices that reaches every element.
    pub(crate) fn address(tensors: &[&CubeTensor]) -> AddressType {
        tensors
            .iter()
            .map(|tensor| tensor.required_address_type())
            .max()
            .unwrap_or_default()
    }
}

/// The wgpu device of the tests.
#[cfg(all(test, feature = "wgpu"))]
pub(crate) fn wgpu() -> Device {
    let devices = Device::enumerate(burn::tensor::DeviceType::Wgpu);
    assert!(
        !devices.is_empty(),
        "these tests need a wgpu adapter, and there is none: install a driver (Mesa's lavapipe needs no GPU)"
    );
    let device = Device::wgpu(burn::tensor::DeviceKind::DefaultDevice);
    assert!(
        device.supports_dtype(DType::F16),
        "these tests need an adapter with f16, as Mesa's lavapipe is, and {device:?} is not"
    );
    device
}
