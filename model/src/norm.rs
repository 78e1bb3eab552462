//! Root mean square normalisation (Zhang and Sennrich, 2019).

use burn::{
    module::{Module, Param},
    tensor::Tensor,
};
use deepburn_kernels::rms_norm::rms_norm;

use crate::{init::Initializer, recompute::Recompute};

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// Scale per channel. `[D]`
    pub weight: Param<Tensor<1>>,
    epsilon: f64,
    /// Whether the backward pass computes the result again.
    #[module(skip)]
    pub(crate) recompute: Recompute,
}

impl RmsNorm {
    /// A norm over `size` channels with weight one.
    pub fn new(size: usize, epsilon: f64, init: Initializer) -> Self {
        Self {
            weight: init.ones("weight", size),
            epsilon,
            recompute: Recompute::default(),
        }
    }

    /// Normalises.
    ///
    /// # Shapes
    /// - `x`: `[..., D]`, as the result
    pub fn forward<const N: usize>(&self, x: Tensor<N>) -> Tensor<N> {
        let weight = self.weight.val();
        self.recompute
            .with_weight(x, weight, |x, weight| rms_norm(x, weight, self.epsilon))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn epsilon_is_added_to_the_mean_square() {
        let device = Device::flex();
        let norm = RmsNorm::new(2, 0.75, Initializer::new(&device, 0, 1.0));
        let y = norm.forward(Tensor::<2>::from_data([[0.5, 0.0], [0.0, 0.0]], &device));
        // mean(0.25, 0) + 0.75 = 0.875
        let expected = TensorData::from([[0.5 / 0.875f32.sqrt(), 0.0], [0.0, 0.0]]);
        y.into_data()
            .assert_approx_eq::<f32>(&expected, Default::default());
    }
}
