//! Models whose weights are held in BF16 or FP8 compute what models of the rounded weights do.

use burn::tensor::{Device, Int, Tensor, TensorData, Tolerance};
use deepburn_kernels::compact::CompactFormat;
use deepburn_model::{
    checkpoint::{SaveOptions, load, load_held, read_config, save},
    config::ModelConfig,
    transformer::Transformer,
};

fn shape() -> ModelConfig {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    read_config(&folder.join("../configs/model/tiny.json")).expect("a shape of this project")
}

/// Logits of a prompt and of the token after it, over the cache.
fn logits(model: &Transformer) -> Vec<TensorData> {
    let device = Device::flex();
    let mut cache = model.new_cache();
    [vec![5, 9, 2, 7, 7, 1], vec![3]]
        .map(|tokens: Vec<i32>| {
            let length = tokens.len();
            let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, [1, length]), &device);
            let hidden = model.forward_cached(tokens, &mut cache).hidden;
            model.logits(hidden).into_data()
        })
        .into()
}

#[test]
fn held_weights_are_rounded_ones() {
    let (config, device) = (shape(), Device::flex());
    let model = Transformer::new(&config, 3, &device);
    let full = tempfile::tempdir().unwrap();
    save(&model, &config, full.path(), &SaveOptions::default()).unwrap();
    for format in [CompactFormat::Bf16, CompactFormat::Fp8] {
        let held = model.clone().hold(format).unwrap();
        // What it is saved as has the numbers that it computes with.
        let rounded = tempfile::tempdir().unwrap();
        save(&held, &config, rounded.path(), &SaveOptions::default()).unwrap();
        let (_, rounded) = load(rounded.path(), &device).unwrap();
        let (found, expected) = (logits(&held), logits(&rounded));
        for (found, expected) in found.iter().zip(&expected) {
            found.assert_approx_eq(expected, Tolerance::<f32>::absolute(2e-5));
        }
        let (_, loaded) = load_held(full.path(), &device, format).unwrap();
        assert_eq!(logits(&loaded), found);
        // And they are not those of the whole weights.
        assert_ne!(found, logits(&model));
    }
}
