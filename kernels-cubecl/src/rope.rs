//! Rotary positions: neighbouring pairs of numbers turned by angles of their position.

use burn::tensor::{Device, Tensor, TensorData};

/// Cosines and sines of a run of positions.
#[derive(Clone, Debug)]
pub struct Rotation {
    pub(crate) cos: Tensor<2>, // [T, R/2]
    pub(crate) sin: Tensor<2>,
}

impl Rotation {
    /// The rotation of `[T, R/2]` positions and pairs by the (sine, cosine) of their angles, row-major.
    pub fn new(
        angles: impl Iterator<Item = (f32, f32)>,
        shape: [usize; 2],
        device: &Device,
    ) -> Self {
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.unzip();
        let tensor = |values| Tensor::from_data(TensorData::new(values, shape), device);
        Self {
            cos: tensor(cos),
            sin: tensor(sin),
        }
    }

    /// Positions and pairs, `[T, R/2]`.
    pub fn dims(&self) -> [usize; 2] {
        self.cos.dims()
    }

    /// Turns the neighbouring pairs of the last dimension by their position's angle.
    ///
    /// # Shapes
    /// - `x`: `[B, T, H, R]`, as the result
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, length, heads, width] = x.dims();
        let table = |values: &Tensor<2>| values.clone().reshape([1, length, 1, width / 2, 1]);
        let (cos, sin) = (table(&self.cos), table(&self.sin));
        let pairs = x.reshape([batch, length, heads, width / 2, 2]);
        let real = pairs.clone().narrow(4, 0, 1);
        let imaginary = pairs.narrow(4, 1, 1);
        Tensor::cat(
            vec![
                real.clone() * cos.clone() - imaginary.clone() * sin.clone(),
                real * sin + imaginary * cos,
            ],
            4,
        )
        .reshape([batch, length, heads, width])
    }
}
