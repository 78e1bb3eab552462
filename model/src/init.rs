//! Initial weights: a function of seed and parameter name alone.

use burn::{
    module::{Param, ParamId},
    tensor::{Device, Tensor, TensorData},
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use sha2::{Digest, Sha256};

/// Makes the parameters of a model.
///
/// Parameters are lazy: nothing is allocated until a value is used or loaded, so that the published 671B shape
/// can be built and counted on any machine. A parameter's identity and initial values depend on its name, so that
/// optimizer state can be matched across processes and every device starts from the same weights.
#[derive(Clone, Debug)]
pub struct Initializer {
    device: Device,
    seed: u64,
    std: f64,
    path: String,
}

impl Initializer {
    /// Weights of standard deviation `std` from `seed`, on `device`.
    pub fn new(device: &Device, seed: u64, std: f64) -> Self {
        Self {
            device: device.clone(),
            seed,
            std,
            path: String::new(),
        }
    }

    /// For the module called `name` inside this one.
    pub fn child(&self, name: impl std::fmt::Display) -> Self {
        let path = if self.path.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.path)
        };
        Self {
            path,
            ..self.clone()
        }
    }

    /// A parameter of normally distributed values (report section 4.2).
    pub fn normal<const D: usize>(&self, name: &str, shape: [usize; D]) -> Param<Tensor<D>> {
        let (std, mut random) = (self.std, self.random(name));
        self.lazy(name, shape, true, move || {
            let normal = StandardNormal;
            let draw = || (Distribution::<f64>::sample(&normal, &mut random) * std) as f32;
            std::iter::repeat_with(draw)
                .take(shape.iter().product())
                .collect()
        })
    }

    /// A parameter of ones.
    pub fn ones(&self, name: &str, size: usize) -> Param<Tensor<1>> {
        self.lazy(name, [size], true, move || vec![1.0; size])
    }

    /// Zeros that no gradient reaches.
    pub fn zeros_without_gradient(&self, name: &str, size: usize) -> Param<Tensor<1>> {
        self.lazy(name, [size], false, move || vec![0.0; size])
    }

    fn lazy<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        require_grad: bool,
        mut values: impl FnMut() -> Vec<f32> + Send + Sync + 'static,
    ) -> Param<Tensor<D>> {
        let id = ParamId::from(first_word(&self.child(name).path));
        Param::uninitialized(
            id,
            move |device, require_grad| {
                let tensor = Tensor::from_data(TensorData::new(values(), shape), device);
                if require_grad {
                    tensor.require_grad()
                } else {
                    tensor
                }
            },
            self.device.clone(),
            require_grad,
            shape.into(),
        )
    }

    fn random(&self, name: &str) -> ChaCha8Rng {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(first_word(&self.child(name).path));
        random
    }
}

fn first_word(text: &str) -> u64 {
    let digest = Sha256::digest(text.as_bytes());
    u64::from_le_bytes(digest[..8].try_into().expect("a digest has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_depend_on_seed_and_name_and_have_the_right_spread() {
        let device = Device::flex();
        let draw = |seed, path: &str, name: &str| {
            let init = Initializer::new(&device, seed, 0.02).child(path);
            init.normal(name, [100, 100])
                .val()
                .into_data()
                .try_to_vec::<f32>()
                .unwrap()
        };
        let values = draw(1, "a", "w");
        assert_eq!(values, draw(1, "a", "w"));
        assert_ne!(values, draw(2, "a", "w"));
        assert_ne!(values, draw(1, "b", "w"));
        let mean = values.iter().sum::<f32>() / 1e4;
        let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 1e4).sqrt();
        // Five standard errors of 10,000 draws.
        assert!(
            mean.abs() < 1e-3 && (std - 0.02).abs() < 7.1e-4,
            "mean {mean}, std {std}"
        );
    }
}
