//! Rotary positions with interleaved pairs, and their extension by YaRN.

use burn::tensor::{Device, Tensor, TensorData};

use crate::config::{ModelConfig, YarnConfig};

/// The rotation speeds of a model and how they change attention's scale.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Radians per position of each pair. `[R/2]`
    pub inv_freq: Vec<f32>,
    /// Factor on cosines and sines: mscale over mscale_all_dim, 1 in the published models.
    pub attention_scaling: f64,
    /// Scale of attention scores before the softmax.
    pub softmax_scale: f64,
}

impl Rope {
    /// The rotation of a model.
    pub fn new(config: &ModelConfig) -> Self {
        let width = config.qk_rope_head_dim;
        let plain: Vec<f64> = (0..width / 2)
            .map(|pair| config.rope_theta.powf(-((2 * pair) as f64) / width as f64))
            .collect();
        let softmax_scale = (config.qk_head_dim() as f64).powf(-0.5);
        match &config.rope_scaling {
            None => Self {
                inv_freq: plain.iter().map(|&speed| speed as f32).collect(),
                attention_scaling: 1.0,
                softmax_scale,
            },
            Some(yarn) => {
                let all = magnitude(yarn.factor, yarn.mscale_all_dim);
                Self {
                    inv_freq: yarn.extend(&plain, config.rope_theta),
                    attention_scaling: magnitude(yarn.factor, yarn.mscale) / all,
                    softmax_scale: softmax_scale * all * all,
                }
            }
        }
    }

    /// Cosines and sines of the positions `start..start + length`.
    pub fn tables(&self, start: usize, length: usize, device: &Device) -> RopeTables {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in start..start + length {
            for speed in &self.inv_freq {
                // As upstream: the angle is a single precision product.
                let angle = f64::from(position as f32 * speed);
                cos.push((angle.cos() * self.attention_scaling) as f32);
                sin.push((angle.sin() * self.attention_scaling) as f32);
            }
        }
        let shape = [1, length, 1, self.inv_freq.len(), 1];
        RopeTables {
            cos: Tensor::from_data(TensorData::new(cos, shape), device),
            sin: Tensor::from_data(TensorData::new(sin, shape), device),
        }
    }
}

impl YarnConfig {
    /// Frequencies that turn often over the original context stay, those that turn rarely are slowed by `factor`,
    /// with a linear ramp over the pairs in between.
    fn extend(&self, plain: &[f64], theta: f64) -> Vec<f32> {
        let width = 2 * plain.len();
        let pair_with_rotations = |rotations: f64| {
            let context = self.original_max_position_embeddings as f64;
            width as f64 * (context / (rotations * 2.0 * std::f64::consts::PI)).ln()
                / (2.0 * theta.ln())
        };
        let last = width as f64 - 1.0;
        let low = pair_with_rotations(self.beta_fast).floor().clamp(0.0, last);
        let high = pair_with_rotations(self.beta_slow).ceil().clamp(0.0, last);
        // As upstream: an empty ramp would divide by zero.
        let length = if high > low { high - low } else { 1e-3 };
        plain
            .iter()
            .enumerate()
            .map(|(pair, &speed)| {
                let slowed = ((pair as f64 - low) / length).clamp(0.0, 1.0);
                (speed / self.factor * slowed + speed * (1.0 - slowed)) as f32
            })
            .collect()
    }
}

/// YaRN's magnitude correction: 0.1 m ln(s) + 1.
fn magnitude(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 {
        1.0
    } else {
        0.1 * mscale * factor.ln() + 1.0
    }
}

/// Cosines and sines of a run of positions.
#[derive(Clone, Debug)]
pub struct RopeTables {
    cos: Tensor<5>, // [1, T, 1, R/2, 1]
    sin: Tensor<5>,
}

impl RopeTables {
    /// Turns the neighbouring pairs of the last dimension by their position's angle.
    ///
    /// # Shapes
    /// - `x`: `[B, T, H, R]`, as the result
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, length, heads, width] = x.dims();
        let pairs = x.reshape([batch, length, heads, width / 2, 2]);
        let real = pairs.clone().narrow(4, 0, 1);
        let imaginary = pairs.narrow(4, 1, 1);
        Tensor::cat(
            vec![
                real.clone() * self.cos.clone() - imaginary.clone() * self.sin.clone(),
                real * self.sin.clone() + imaginary * self.cos.clone(),
            ],
            4,
        )
        .reshape([batch, length, heads, width])
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tolerance;

    use super::*;
    use crate::config::tests::tiny;

    #[test]
    fn neighbouring_pairs_turn_by_their_angle() {
        let device = Device::flex();
        let rope = Rope::new(&tiny());
        assert_eq!(rope.inv_freq, [1.0, 0.01]);
        let x = Tensor::<4>::from_data([[[[1.0, 0.0, 0.0, 2.0]]]], &device);
        let turned = rope.tables(3, 1, &device).rotate(x);
        let expected = [[[[
            3f32.cos(),
            3f32.sin(),
            -2.0 * 0.03f32.sin(),
            2.0 * 0.03f32.cos(),
        ]]]];
        turned
            .into_data()
            .assert_approx_eq::<f32>(&TensorData::from(expected), Tolerance::absolute(1e-6));
    }
}
