//! Lower precisions on other devices than the CPU.
#![cfg(feature = "wgpu")]

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{Device, DeviceKind, Int, Tensor, TensorData},
};
use deepburn_kernels::{compact::CompactFormat, fp8::ScaleFormat};
use deepburn_model::{
    attention::AttentionMask, checkpoint::hf_config, projection::Arithmetic,
    transformer::Transformer,
};

/// What differs between devices is the order of sums. It turns few of the roundings, far fewer than all of them, by which
/// the precisions differ: so a tenth of their distance is less than a part in another precision makes.
#[test]
fn on_wgpu_every_precision_is_that_of_the_cpu() {
    let full = Arithmetic::FULL;
    let bf16 = Arithmetic { bf16: true, ..full };
    let fp8 = Arithmetic {
        bf16: true,
        ..Arithmetic::fp8(ScaleFormat::Float32)
    };
    let wgpu = Device::wgpu(DeviceKind::DefaultDevice);
    for (arithmetic, other) in [(full, bf16), (bf16, full), (fp8, bf16)] {
        let cpu = hidden_and_gradients(arithmetic, Device::flex());
        let found = distance(&hidden_and_gradients(arithmetic, wgpu.clone()), &cpu);
        let apart = distance(&hidden_and_gradients(other, Device::flex()), &cpu);
        assert!(
            found < 0.1 * apart,
            "{arithmetic:?}: {found:e} apart, where another precision is {apart:e}"
        );
    }
}

/// Only weights are rounded, and on both devices alike.
#[test]
fn on_wgpu_models_with_held_weights_are_those_of_the_cpu() {
    let wgpu = Device::wgpu(DeviceKind::DefaultDevice);
    let logits = |device: &Device, format| {
        let config = hf_config::parse(include_str!("../configs/model/tiny.json")).unwrap();
        let model = Transformer::new(&config, 3, device).hold(format).unwrap();
        let mut cache = model.new_cache();
        // A prompt, and the token after it, over the cache.
        [&[5, 9, 2, 7, 7, 1][..], &[3]].map(|tokens| {
            let tokens = TensorData::new(tokens.to_vec(), [1, tokens.len()]);
            let tokens = Tensor::<2, Int>::from_data(tokens, device);
            let hidden = model.forward_cached(tokens, &mut cache).hidden;
            values(model.logits(hidden))
        })
    };
    for format in [CompactFormat::Bf16, CompactFormat::Fp8] {
        let [found, cpu] = [&wgpu, &Device::flex()].map(|device| logits(device, format).concat());
        let furthest = found.iter().zip(&cpu).map(|(a, b)| (a - b).abs());
        let furthest = furthest.fold(0.0, f32::max);
        assert!(furthest < 2e-5, "{format:?}: {furthest:e} apart");
    }
}

fn hidden_and_gradients(arithmetic: Arithmetic, device: Device) -> Vec<f32> {
    const LENGTH: usize = 24;
    let device = device.autodiff();
    let tokens = |first: usize| {
        let tokens = (first..first + LENGTH).map(|at| (at * 37 % 251) as i32);
        let tokens = TensorData::new(tokens.collect::<Vec<_>>(), [1, LENGTH]);
        Tensor::<2, Int>::from_data(tokens, &device)
    };
    let config = hf_config::parse(include_str!("../configs/model/tiny.json")).unwrap();
    let model = Transformer::new(&config, 5, &device).with_arithmetic(arithmetic);
    let mask = AttentionMask::causal(LENGTH, &device);
    let hidden = model.forward(tokens(0), &mask).hidden;
    let gradients = model.cross_entropy(hidden.clone(), tokens(1)).backward();
    let mut all = Gradients {
        gradients: GradientsParams::from_grads(gradients, &model),
        values: values(hidden),
    };
    model.visit(&mut all);
    all.values
}

struct Gradients {
    gradients: GradientsParams,
    values: Vec<f32>,
}

impl ModuleVisitor for Gradients {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // The routers' biases have none.
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.values.extend(values(gradient));
        }
    }
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().iter().collect()
}

fn distance(one: &[f32], other: &[f32]) -> f64 {
    let squares = one.iter().zip(other).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum::<f64>().sqrt()
}
