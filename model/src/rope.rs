//! Rotary positions with interleaved pairs, and their extension by YaRN.

use burn::tensor::Device;
use deepburn_kernels::rope::Rotation;

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

    /// The rotation of the positions `start..start + length`.
    pub fn rotation(&self, start: usize, length: usize, device: &Device) -> Rotation {
        self.rotation_at(start..start + length, device)
    }

    /// The rotation of any positions.
    pub fn rotation_at(&self, positions: impl Iterator<Item = usize>, device: &Device) -> Rotation {
        let positions: Vec<usize> = positions.collect();
        let angles = positions.iter().flat_map(|&position| {
            self.inv_freq.iter().map(move |speed| {
                // As upstream: the angle is a single precision product.
                let (sin, cos) = f64::from(position as f32 * speed).sin_cos();
                let scaled = |x: f64| (x * self.attention_scaling) as f32;
                (scaled(sin), scaled(cos))
            })
        });
        Rotation::new(angles, [positions.len(), self.inv_freq.len()], device)
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

#[cfg(test)]
mod tests {
    use burn::tensor::{Tensor, TensorData, Tolerance};

    use super::*;
    use crate::config::tests::tiny;

    #[test]
    fn neighbouring_pairs_turn_by_their_angle() {
        let device = Device::flex();
        let rope = Rope::new(&tiny());
        assert_eq!(rope.inv_freq, [1.0, 0.01]);
        let x = Tensor::<4>::from_data([[[[1.0, 0.0, 0.0, 2.0]]]], &device);
        let turned = rope.rotation(3, 1, &device).rotate(x);
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
