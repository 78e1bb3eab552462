//! In double precision, where rounding cannot hide a difference. A file of its own: a process has one default precision.

use std::path::Path;

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, FloatDType, Int, Tensor},
};
use deepburn_model::{attention::AttentionMask, checkpoint};

struct Widen;

impl ModuleMapper for Widen {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(DType::F64))
    }
}

/// The expanded and the absorbed form of attention, whole and in pieces, through whole models: with YaRN, and with
/// queries that have no latent.
#[test]
fn absorbed_equals_expanded() {
    let mut device = Device::flex();
    device.configure(FloatDType::F64).unwrap();
    for case in ["tiny-yarn", "tiny-noqlora-bf16"] {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let (config, model) = checkpoint::load(&fixtures.join(case), &device).unwrap();
        let model = model.map(&mut Widen);
        let (batch, length) = (2, 40);
        let tokens = Tensor::<1, Int>::arange(0..(batch * length) as i64, &device);
        let tokens = (tokens * 37 % config.vocab_size as i64).reshape([batch, length]);

        let expanded = model.forward(tokens.clone(), &AttentionMask::causal(length, &device));
        assert_eq!(expanded.hidden.dtype(), DType::F64);
        for pieces in [vec![length], vec![17, 1, 1, 20, 1]] {
            let mut cache = model.new_cache();
            let mut absorbed = Vec::new();
            let mut start = 0;
            for piece in pieces {
                let tokens = tokens.clone().narrow(1, start, piece);
                absorbed.push(model.forward_cached(tokens, &mut cache).hidden);
                start += piece;
            }
            let difference = Tensor::cat(absorbed, 1) - expanded.hidden.clone();
            let largest = difference.abs().max().into_scalar::<f64>();
            // Values around one through a few layers: some hundred units of 2e-16. Single precision is off by 1e-6.
            assert!(largest <= 1e-12, "{case}: {largest:e}");
        }
    }
}
