//! The AdamW update (Loshchilov and Hutter, 2019).
//!
//! Native on Flex for f32 with moments in f32 or BF16: one pass that reads a gradient and updates a parameter and its
//! moments where they are.

use burn::{
    backend::{Dispatch, Flex, TensorMetadata, backend_extension, tensor::FloatTensor},
    tensor::{DType, Element, Tensor, bf16},
};
use rayon::prelude::*;

use crate::{
    flex::{FlexFloat, contiguous, elements, elements_mut, float_tensor, is_native_f32},
    vector::{sum, vectorized},
};

/// Elements per task: a few streams of it fit the second-level cache.
const CHUNK: usize = 1 << 14;

/// What one update does, the same for all parameters.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate.
    pub rate: f64,
    /// Decay of the first moment.
    pub beta_1: f32,
    /// Decay of the second moment.
    pub beta_2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decay of the parameter per unit of the rate.
    pub weight_decay: f32,
}

impl AdamW {
    /// Updates a parameter by its gradient: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
    /// `p = (1 - rate decay) p - rate m' / (sqrt(v') + epsilon)` with `m' = m / (1 - b1^t)`, `v' = v / (1 - b2^t)`.
    ///
    /// `time` is t, counted from one; `moments` are m and v of the step before, zero before the first, in any type: they
    /// are rounded to it after the update, which is in the type of the parameter. Returns the parameter and the moments.
    /// Not differentiable.
    pub fn update<const D: usize>(
        &self,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        moments: [Tensor<D>; 2],
        time: usize,
    ) -> (Tensor<D>, [Tensor<D>; 2]) {
        let (device, dtype) = (parameter.device(), parameter.dtype());
        let [of_first, of_second] = moments.each_ref().map(Tensor::dtype);
        let native = is_native_f32(&device, dtype)
            && gradient.dtype() == dtype
            && of_first == of_second
            && matches!(of_first, DType::F32 | DType::BF16);
        if device.is_autodiff() || !native {
            return self.reference(parameter, gradient, moments, time);
        }
        let [first, second] = moments;
        let (parameter, first, second) = Dispatch::adamw_update(
            parameter.into_dispatch(),
            gradient.into_dispatch(),
            first.into_dispatch(),
            second.into_dispatch(),
            *self,
            time,
        );
        let moments = [Tensor::from_dispatch(first), Tensor::from_dispatch(second)];
        (Tensor::from_dispatch(parameter), moments)
    }

    fn reference<const D: usize>(
        &self,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        [first, second]: [Tensor<D>; 2],
        time: usize,
    ) -> (Tensor<D>, [Tensor<D>; 2]) {
        let (dtype, kept) = (parameter.dtype(), first.dtype());
        let (first, second) = (first.cast(dtype), second.cast(dtype));
        let first = first * self.beta_1 + gradient.clone() * (1.0 - self.beta_1);
        let second = second * self.beta_2 + gradient.square() * (1.0 - self.beta_2);
        let [first_bias, second_bias] = self.biases(time);
        let root = (second.clone() / second_bias).sqrt() + self.epsilon;
        let delta = first.clone() / first_bias / root;
        let parameter = parameter * self.kept() - delta * self.rate;
        (parameter, [first.cast(kept), second.cast(kept)])
    }

    /// What is left of a parameter.
    fn kept(&self) -> f64 {
        1.0 - self.rate * f64::from(self.weight_decay)
    }

    /// What the moments are divided by.
    fn biases(&self, time: usize) -> [f32; 2] {
        [self.beta_1, self.beta_2].map(|beta| 1.0 - beta.powi(time as i32))
    }
}

/// The sum of the squares of all elements. Not differentiable on Flex.
///
/// # Shapes
/// - result: `[1]`
pub fn sum_of_squares<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    if x.device().is_autodiff() || !is_native_f32(&x.device(), x.dtype()) {
        return x.square().sum();
    }
    Tensor::from_dispatch(Dispatch::squares(x.into_dispatch()))
}

#[backend_extension(Flex)]
pub(crate) trait AdamWOps: burn::backend::Backend {
    fn adamw_update(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        update: AdamW,
        time: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    fn squares(x: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl AdamWOps for Flex {
    fn adamw_update(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        update: AdamW,
        time: usize,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let tensors = [parameter, first, second].map(contiguous);
        match TensorMetadata::dtype(&tensors[1]) {
            DType::F32 => one_pass::<f32>(tensors, gradient, update, time),
            _ => one_pass::<bf16>(tensors, gradient, update, time),
        }
    }

    /// Sums of chunks in single precision, and of them in double and in order: the same on any number of threads.
    fn squares(x: FlexFloat) -> FlexFloat {
        let x = contiguous(x);
        let chunks = elements::<f32>(&x).par_chunks(CHUNK);
        let sums = chunks.map(|chunk| f64::from(vectorized!(sum(chunk, |x| x * x))));
        let total: f64 = sums.collect::<Vec<_>>().into_iter().sum();
        float_tensor(vec![total as f32], [1])
    }
}

/// A type that moments are kept in.
trait Moment: Element + bytemuck::Pod + Send + Sync {
    fn read(self) -> f32;
    fn rounded(value: f32) -> Self;
}

impl Moment for f32 {
    #[inline(always)]
    fn read(self) -> f32 {
        self
    }

    #[inline(always)]
    fn rounded(value: f32) -> Self {
        value
    }
}

impl Moment for bf16 {
    #[inline(always)]
    fn read(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn rounded(value: f32) -> Self {
        Self::from_bits((crate::bf16::round(value).to_bits() >> 16) as u16)
    }
}

fn one_pass<M: Moment>(
    [mut parameter, mut first, mut second]: [FlexFloat; 3],
    gradient: FlexFloat,
    update: AdamW,
    time: usize,
) -> (FlexFloat, FlexFloat, FlexFloat) {
    let gradient = contiguous(gradient);
    let (kept, rate) = (update.kept() as f32, update.rate as f32);
    let [first_bias, second_bias] = update.biases(time);
    let AdamW {
        beta_1,
        beta_2,
        epsilon,
        ..
    } = update;
    let written = elements_mut::<f32>(&mut parameter)
        .par_chunks_mut(CHUNK)
        .zip(elements_mut::<M>(&mut first).par_chunks_mut(CHUNK))
        .zip(elements_mut::<M>(&mut second).par_chunks_mut(CHUNK));
    let tasks = written.zip(elements::<f32>(&gradient).par_chunks(CHUNK));
    tasks.for_each(|(((parameter, first), second), gradient)| {
        vectorized!({
            for i in 0..gradient.len() {
                let g = gradient[i];
                let m = first[i].read() * beta_1 + g * (1.0 - beta_1);
                let v = second[i].read() * beta_2 + g * g * (1.0 - beta_2);
                let delta = m / first_bias / ((v / second_bias).sqrt() + epsilon);
                parameter[i] = parameter[i] * kept - delta * rate;
                (first[i], second[i]) = (M::rounded(m), M::rounded(v));
            }
        });
    });
    (parameter, first, second)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;

    const UPDATE: AdamW = AdamW {
        rate: 3e-3,
        beta_1: 0.9,
        beta_2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
    };

    fn random(spread: f64) -> Tensor<2> {
        // More than one chunk, and a tail; a view, as some gradients are.
        let spread = Distribution::Normal(0.0, spread);
        Tensor::random([7001, 3], spread, &Device::flex()).transpose()
    }

    #[test]
    fn native_equals_reference_bit_for_bit() {
        for dtype in [DType::F32, DType::BF16] {
            native_equals_reference(dtype);
        }
    }

    fn native_equals_reference(dtype: DType) {
        let (parameter, zero) = (random(1.0), (random(1.0) * 0.0).cast(dtype));
        let mut native = (parameter.clone(), [zero.clone(), zero.clone()]);
        let mut expected = native.clone();
        for time in 1..5 {
            let gradient = random(10f64.powi(time as i32 - 3));
            native = UPDATE.update(native.0, gradient.clone(), native.1, time);
            expected = UPDATE.reference(expected.0, gradient, expected.1, time);
            let all = |(parameter, [first, second]): &(Tensor<2>, [Tensor<2>; 2])| {
                [parameter, first, second].map(|tensor| tensor.to_data())
            };
            assert_eq!(all(&native), all(&expected), "step {time}");
        }
        // What others hold is left as it is.
        let kept = parameter.to_data();
        let zeros = [zero.clone(), zero];
        let (updated, _) = UPDATE.update(parameter.clone(), random(1.0), zeros, 1);
        assert_eq!(parameter.to_data(), kept);
        assert_ne!(updated.to_data(), kept);
    }

    #[test]
    fn squares_are_summed() {
        let x = random(2.0);
        let expected = x.clone().square().sum().into_data();
        sum_of_squares(x)
            .into_data()
            .assert_approx_eq(&expected, Tolerance::<f32>::relative(1e-5));
    }
}
