//! The probabilities of attention. The model never holds them as a tensor: here they are computed from its weights
//! and latents, with one plain operation after the other.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Int, Tensor, TensorData, activation::softmax},
};
use deepburn_kernels::rope::Rotation;
use deepburn_model::{
    attention::Attention, config::ModelConfig, parameters::ModulePath, rope::Rope,
};

/// The latent norms have this epsilon whatever the configuration says.
const LATENT_NORM_EPSILON: f64 = 1e-6;

/// How each position's attention is spread over the sequence.
///
/// # Shapes
/// - `x`: `[B, T, D]`, the normed input of the layer's attention
/// - result: `[B, H, T, T]`
pub(super) fn probabilities(
    attention: &Attention,
    config: &ModelConfig,
    x: Tensor<3>,
    rope: &Rotation,
) -> Tensor<4> {
    let [batch, length, _] = x.dims();
    let device = x.device();
    let heads = config.num_attention_heads;
    let (nope, rotated) = (config.qk_nope_head_dim, config.qk_rope_head_dim);

    let weights = Weights::of(attention);
    let matrix = |name: &str| -> Option<Tensor<3>> {
        let data = weights.0.get(name)?.clone();
        Some(Tensor::<2>::from_data(data, &device).unsqueeze())
    };
    let queries = match (
        matrix("query.q_a_proj.weight"),
        matrix("query.q_b_proj.weight"),
    ) {
        (Some(down), Some(up)) => {
            let latent = x.clone().matmul(down);
            let scale = weights.0["query.q_a_layernorm.weight"].clone();
            let scale = Tensor::<1>::from_data(scale, &device).unsqueeze::<3>();
            let mean_square = latent.clone().square().mean_dim(2);
            let normed = latent / (mean_square + LATENT_NORM_EPSILON).sqrt() * scale;
            normed.matmul(up)
        }
        _ => {
            let direct = matrix("query.q_proj.weight");
            x.clone()
                .matmul(direct.expect("queries come from one matrix or two"))
        }
    };
    let queries = queries.reshape([batch, length, heads, nope + rotated]);
    let turned = rope.rotate(queries.clone().narrow(3, nope, rotated));
    let queries = Tensor::cat(vec![queries.narrow(3, 0, nope), turned], 3);

    let (c_kv, k_pe) = attention.latents(x, rope);
    let up = attention.kv_b_proj.forward(c_kv);
    let up = up.reshape([batch, length, heads, nope + config.v_head_dim]);
    let shared = k_pe.reshape([batch, length, 1, rotated]);
    let shared = shared.expand([batch, length, heads, rotated]);
    let keys = Tensor::cat(vec![up.narrow(3, 0, nope), shared], 3);

    let scores = queries
        .swap_dims(1, 2)
        .matmul(keys.swap_dims(1, 2).transpose());
    let scores = scores * Rope::new(config).softmax_scale; // [B, H, T, T]
    let shape = scores.dims();
    let position = Tensor::<1, Int>::arange(0..length as i64, &device);
    let query = position.clone().reshape([1, 1, length, 1]).expand(shape);
    let key = position.reshape([1, 1, 1, length]).expand(shape);
    softmax(scores.mask_fill(key.greater(query), f32::NEG_INFINITY), 3)
}

/// The weights of a module by name.
#[derive(Default)]
struct Weights(BTreeMap<String, TensorData>);

impl Weights {
    fn of(module: &impl Module) -> Self {
        #[derive(Default)]
        struct Collector {
            path: ModulePath,
            found: Weights,
        }
        impl ModuleVisitor for Collector {
            fn enter_module(&mut self, name: &str, container: &str) {
                self.path.enter(name, container);
            }
            fn exit_module(&mut self, _: &str, container: &str) {
                self.path.exit(container);
            }
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.found
                    .0
                    .insert(self.path.join(), param.val().into_data());
            }
        }
        let mut collector = Collector::default();
        module.visit(&mut collector);
        collector.found
    }
}
