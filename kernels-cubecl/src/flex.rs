//! What the native CPU versions share: which tensors they serve, and access to their elements.

use crate::gemm::Matrix;
use burn::{
    backend::{DispatchDevice, Flex, TensorMetadata, tensor::FloatTensor},
    tensor::{DType, Device, Element, Shape, TensorData},
};

/// Whether `device` is the Flex CPU backend, with or without autodiff.
pub(crate) fn is_flex(device: &Device) -> bool {
    matches!(
        device.clone().inner().as_dispatch(),
        DispatchDevice::Flex(_)
    )
}

/// Whether the native versions serve tensors of `dtype` on `device`.
pub(crate) fn is_native(device: &Device, dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64) && is_flex(device)
}

/// As [`is_native`], for those that are written for f32 alone.
pub(crate) fn is_native_f32(device: &Device, dtype: DType) -> bool {
    dtype == DType::F32 && is_flex(device)
}

/// Element types of the native versions.
pub(crate) trait Scalar:
    Element
    + bytemuck::Pod
    + Send
    + Sync
    + PartialOrd
    + std::ops::AddAssign
    + std::ops::Mul<Output = Self>
{
    const ZERO: Self;
    const ONE: Self;
    const LOWEST: Self;
}

impl Scalar for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = Self::NEG_INFINITY;
}

impl Scalar for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const LOWEST: Self = Self::NEG_INFINITY;
}

/// Runs `$body` with `$scalar` naming the element type of a float primitive.
macro_rules! with_scalar {
    ($tensor:expr, $scalar:ident => $body:expr) => {
        match burn::backend::TensorMetadata::dtype(&$tensor) {
            burn::tensor::DType::F32 => {
                type $scalar = f32;
                $body
            }
            burn::tensor::DType::F64 => {
                type $scalar = f64;
                $body
            }
            other => panic!("native kernels take f32 or f64, found {other:?}"),
        }
    };
}
pub(crate) use with_scalar;

pub(crate) type FlexFloat = FloatTensor<Flex>;
pub(crate) type FlexInt = <Flex as burn::backend::BackendTypes>::IntTensorPrimitive;

/// A float tensor with contiguous elements.
pub(crate) fn contiguous(tensor: FlexFloat) -> FlexFloat {
    if tensor.is_contiguous() {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// The elements of a contiguous float tensor.
pub(crate) fn elements<T: Scalar>(tensor: &FlexFloat) -> &[T] {
    tensor
        .as_slice()
        .expect("made contiguous, of the matched element type")
}

/// The elements of a contiguous float tensor, copied first if others hold it too.
pub(crate) fn elements_mut<T: Element + bytemuck::Pod>(tensor: &mut FlexFloat) -> &mut [T] {
    let start = tensor.layout().start_offset();
    let length = tensor.layout().num_elements();
    &mut tensor.storage_mut::<T>()[start..start + length]
}

/// A tensor whose elements follow each other in every dimension, as [`matrix`] takes it: a flipped one is copied.
pub(crate) fn ascending(tensor: FlexFloat) -> FlexFloat {
    if tensor.layout().strides().iter().all(|&stride| stride >= 0) {
        tensor
    } else {
        tensor.to_contiguous()
    }
}

/// A tensor of two dimensions as a matrix, with its strides, which are not negative.
pub(crate) fn matrix<T: Scalar>(tensor: &FlexFloat) -> Matrix<'_, T> {
    let [rows, columns] = dims(tensor);
    let layout = tensor.layout();
    let &[row_stride, column_stride] = layout.strides() else {
        panic!("a matrix has two strides, found {:?}", layout.strides());
    };
    let elements = &tensor.storage::<T>()[layout.start_offset()..];
    Matrix::viewed(elements, [rows, columns], [row_stride, column_stride])
}

/// The elements of an index tensor.
pub(crate) fn indices(tensor: &FlexInt) -> Vec<usize> {
    fn widen<T: Element + bytemuck::Pod>(tensor: &FlexInt, to: impl Fn(T) -> usize) -> Vec<usize> {
        let tensor = if tensor.is_contiguous() {
            tensor.clone()
        } else {
            tensor.to_contiguous()
        };
        let values = tensor
            .as_slice::<T>()
            .expect("made contiguous, of the matched element type");
        values.iter().map(|&value| to(value)).collect()
    }
    match tensor.dtype() {
        DType::I32 => widen::<i32>(tensor, |value| value as usize),
        DType::I64 => widen::<i64>(tensor, |value| value as usize),
        other => panic!("index tensors are i32 or i64, found {other:?}"),
    }
}

/// A float tensor with the given elements.
pub(crate) fn float_tensor<T: Scalar>(values: Vec<T>, shape: impl Into<Shape>) -> FlexFloat {
    FlexFloat::from_data(TensorData::new(values, shape))
}

/// An index tensor with the given elements, in Flex's integer type.
pub(crate) fn int_tensor(values: Vec<i32>, shape: impl Into<Shape>) -> FlexInt {
    FlexInt::from_data(TensorData::new(values, shape))
}

/// The sizes of a primitive.
pub(crate) fn dims<const D: usize>(tensor: &impl TensorMetadata) -> [usize; D] {
    tensor.shape().dims()
}
