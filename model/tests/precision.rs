//! What lower precisions round, and what they leave.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use deepburn_kernels::fp8::ScaleFormat;
use deepburn_model::{
    attention::AttentionMask, checkpoint::hf_config, layer::FeedForward, projection::Arithmetic,
    transformer::Transformer,
};

const LENGTH: usize = 24;

fn model(arithmetic: Arithmetic) -> Transformer {
    let config = hf_config::parse(include_str!("../../configs/model/tiny.json")).unwrap();
    Transformer::new(&config, 5, &Device::flex().autodiff()).with_arithmetic(arithmetic)
}

fn tokens(first: usize) -> Tensor<2, Int> {
    let tokens: Vec<i32> = (first..first + LENGTH)
        .map(|at| (at * 37 % 251) as i32)
        .collect();
    let tokens = TensorData::new(tokens, [1, LENGTH]);
    Tensor::from_data(tokens, &Device::flex().autodiff())
}

fn is_bf16<const D: usize>(x: Tensor<D>) -> bool {
    let rounded = x.clone().cast(DType::BF16).cast(DType::F32);
    rounded.into_data() == x.into_data()
}

#[test]
fn activations_are_of_bf16_and_the_weights_gradients_are_not() {
    let mask = AttentionMask::causal(LENGTH, &Device::flex().autodiff());
    let mut losses = Vec::new();
    for arithmetic in [
        Arithmetic::FULL,
        Arithmetic {
            bf16: true,
            ..Arithmetic::FULL
        },
        Arithmetic {
            bf16: true,
            ..Arithmetic::fp8(ScaleFormat::Float32)
        },
    ] {
        let model = model(arithmetic);
        let x = model.embed_tokens.forward(tokens(0));
        let rotation = model.rope().rotation(0, LENGTH, &x.device());
        let layer = &model.layers[1];
        let output = layer.forward(arithmetic.activation(x), &rotation, &mask);
        for part in [output.hidden, output.attention] {
            assert_eq!(is_bf16(part), arithmetic.bf16, "{arithmetic:?}");
        }

        let hidden = model.forward(tokens(0), &mask).hidden;
        let loss = model.cross_entropy(hidden, tokens(1));
        let grads = loss.backward();
        losses.push(loss.into_scalar::<f32>());
        let FeedForward::Moe(moe) = &layer.mlp else {
            panic!("dense")
        };
        let up = &moe.experts.up_proj;
        assert!(
            !is_bf16(up.grad(&grads).expect("reached")),
            "{arithmetic:?}"
        );
        assert!(!is_bf16(
            layer.self_attn.o_proj.weight.grad(&grads).expect("reached")
        ));
    }
    let [full, bf16, fp8] = losses[..] else {
        unreachable!()
    };
    let off = |loss: f32| (loss / full - 1.0).abs();
    assert!(off(bf16) > 0.0 && off(bf16) < 2e-3, "{losses:?}");
    assert!(off(fp8) > 0.0 && off(fp8) < 2e-2, "{losses:?}");
}
