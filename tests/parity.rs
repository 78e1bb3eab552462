//! The model against transformers: every intermediate result, greedy generation, losses and gradients.
//!
//! `tests/fixtures/README.md` says where the reference tensors come from.

mod support;

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Device, Gradients, Int, Tensor},
};
use deepburn_model::{
    attention::AttentionMask,
    checkpoint::hf_names::{Stored, stored},
    loss::cross_entropy,
    moe::Routing,
    parameters::ModulePath,
    transformer::Transformer,
};
use support::{Reference, assert_close, load, references, tolerance, values};

/// The reference's f32 is up to 9e-6 from float64 here (hidden states, logits 6e-6), and ours may be as far on the other
/// side. The scales of two neighbouring blocks exchanged, in whichever weight, move logits by 1.1e-2 or more.
const LOGITS_FP8: f32 = 5e-5;

#[test]
fn every_intermediate_result_of_the_forward_pass() {
    for (case, close) in [
        ("tiny-dense-moe", tolerance::LOGITS),
        ("tiny-yarn", tolerance::LOGITS_YARN),
        ("tiny-noqlora-bf16", tolerance::LOGITS),
        ("tiny-mtp", tolerance::LOGITS),
        ("tiny-dense-moe-sharded", tolerance::LOGITS),
        ("tiny-fp8", LOGITS_FP8),
    ] {
        let device = Device::flex();
        let (config, model) = load(case, &device);
        let expected = references(case, "reference.safetensors");
        let check = |name: &str, found: Vec<f32>| {
            assert_close(&format!("{case} {name}"), &found, &expected[name], close);
        };
        check("softmax_scale", vec![model.rope().softmax_scale as f32]);
        check("rope.inv_freq", model.rope().inv_freq.clone());
        check(
            "rope.attention_scaling",
            vec![model.rope().attention_scaling as f32],
        );

        let tokens = expected["input_ids"].tokens(&device);
        let [_, length] = tokens.dims();
        let rope = model.rope().tables(0, length, &device);
        let mask = AttentionMask::causal(length, &device);
        let mut x = model.embed_tokens.forward(tokens.clone());
        for (index, layer) in model.layers.iter().enumerate() {
            check(&format!("hidden_states.{index}"), values(x.clone()));
            let (c_kv, k_pe) = layer
                .self_attn
                .latents(layer.input_layernorm.forward(x.clone()), &rope);
            check(&format!("layer.{index}.cache_kv_latent"), values(c_kv));
            check(&format!("layer.{index}.cache_k_rope"), values(k_pe));
            let output = layer.forward(x, &rope, &mask);
            check(
                &format!("layer.{index}.attn_output"),
                values(output.attention),
            );
            check(
                &format!("layer.{index}.mlp_output"),
                values(output.feed_forward),
            );
            if let Some(moe) = output.moe {
                let prefix = format!("layer.{index}");
                check(
                    &format!("{prefix}.router_logits"),
                    values(moe.routing.logits.clone()),
                );
                check_choice(
                    &format!("{case} {prefix}"),
                    &moe.routing,
                    &expected,
                    &prefix,
                );
            }
            x = output.hidden;
        }
        check(
            &format!("hidden_states.{}", config.num_hidden_layers),
            values(x),
        );
        let hidden = model.forward(tokens, &mask).hidden;
        check("final_hidden", values(hidden.clone()));
        check("logits", values(model.logits(hidden)));
    }
}

/// References list a token's experts by index; ours are best first.
fn check_choice(
    label: &str,
    routing: &Routing,
    expected: &BTreeMap<String, Reference>,
    prefix: &str,
) {
    let [_, k] = routing.chosen.dims();
    let chosen: Vec<i64> = routing.chosen.to_data().iter::<i64>().collect();
    let weights = values(routing.weights.clone());
    let (mut by_index, mut weights_by_index) = (Vec::new(), Vec::new());
    for (chosen, weights) in chosen.chunks(k).zip(weights.chunks(k)) {
        let mut pairs: Vec<_> = chosen.iter().zip(weights).collect();
        pairs.sort_by_key(|pair| pair.0);
        by_index.extend(pairs.iter().map(|pair| *pair.0));
        weights_by_index.extend(pairs.iter().map(|pair| *pair.1));
    }
    assert_eq!(
        by_index,
        expected[&format!("{prefix}.topk_indices")].ints(),
        "{label}: chosen experts"
    );
    let expected = &expected[&format!("{prefix}.topk_weights")];
    assert_close(
        &format!("{label} weights"),
        &weights_by_index,
        expected,
        tolerance::WEIGHTS,
    );
}

#[test]
fn greedy_generation_with_the_latent_cache() {
    for (case, close) in [
        ("tiny-dense-moe", tolerance::LOGITS),
        ("tiny-yarn", tolerance::LOGITS_YARN),
    ] {
        let device = Device::flex();
        let (_, model) = load(case, &device);
        let expected = references(case, "reference_generate.safetensors");
        let (prompt, output) = (&expected["prompt_ids"], &expected["output_ids"]);
        let [batch, steps, _] = expected["step_logits"].shape[..] else {
            panic!("three sizes")
        };
        let mut cache = model.new_cache();
        let mut next = prompt.tokens(&device);
        let mut found = vec![prompt.ints()];
        let mut logits = Vec::new();
        for _ in 0..steps {
            let hidden = model.forward_cached(next, &mut cache).hidden;
            let last = hidden.dims()[1] - 1;
            let step = model.logits(hidden.narrow(1, last, 1));
            logits.push(step.clone());
            next = step.argmax(2).reshape([batch, 1]);
            found.push(next.to_data().iter::<i64>().collect());
        }
        let logits = values(Tensor::cat(logits, 1));
        assert_close(
            &format!("{case} step_logits"),
            &logits,
            &expected["step_logits"],
            close,
        );
        let generated: Vec<i64> = found[1..].iter().flatten().copied().collect();
        let columns = output.shape[1];
        let expected_new: Vec<i64> = (0..steps)
            .flat_map(|step| (0..batch).map(move |row| row * columns + columns - steps + step))
            .map(|at| output.ints()[at])
            .collect();
        assert_eq!(generated, expected_new, "{case}: tokens");
    }
}

/// Main and MTP losses of tiny-mtp, as its README defines them.
fn mtp_losses(
    model: &Transformer,
    tokens: &Tensor<2, Int>,
) -> (Tensor<1>, Tensor<1>, deepburn_model::mtp::MtpOutput) {
    let [_, length] = tokens.dims();
    let at = |start: usize, length: usize| tokens.clone().narrow(1, start, length);
    let device = tokens.device();
    let hidden = model
        .forward(tokens.clone(), &AttentionMask::causal(length, &device))
        .hidden;
    let logits = model.logits(hidden.clone().narrow(1, 0, length - 1));
    let main = cross_entropy(logits, at(1, length - 1));
    let mask = AttentionMask::causal(length - 1, &device);
    let output =
        model.predict_further(0, hidden.narrow(1, 0, length - 1), at(1, length - 1), &mask);
    let logits = model.logits(output.hidden.clone().narrow(1, 0, length - 2));
    let further = cross_entropy(logits, at(2, length - 2));
    (main, further, output)
}

#[test]
fn multi_token_prediction_forward_and_every_gradient() {
    let case = "tiny-mtp";
    let device = Device::flex().autodiff();
    let (config, model) = load(case, &device);
    let expected = references(case, "reference.safetensors");
    let tokens = expected["input_ids"].tokens(&device);
    let (main, further, output) = mtp_losses(&model, &tokens);
    let check = |name: &str, found: Vec<f32>, close| {
        assert_close(name, &found, &expected[name], close);
    };
    check(
        "mtp.eh_proj_output",
        values(output.projected),
        tolerance::LOGITS,
    );
    check(
        "mtp.block_output",
        values(output.block.hidden),
        tolerance::LOGITS,
    );
    check(
        "mtp.normed",
        values(output.hidden.clone()),
        tolerance::LOGITS,
    );
    check(
        "mtp_logits",
        values(model.logits(output.hidden)),
        tolerance::LOGITS,
    );
    let moe = output.block.moe.unwrap();
    check(
        "mtp.router_logits",
        values(moe.routing.logits.clone()),
        tolerance::LOGITS,
    );
    check_choice("mtp", &moe.routing, &expected, "mtp");
    check("loss_main", values(main.clone()), tolerance::LOSS);
    check("loss_mtp", values(further.clone()), tolerance::LOSS);
    let total = main + further * 0.3;
    check("loss_total", values(total.clone()), tolerance::LOSS);

    let expected = references(case, "reference_mtp_grads.safetensors");
    assert_gradients(
        &model,
        total.backward(),
        config.num_hidden_layers,
        &expected,
    );
}

#[test]
fn every_gradient_of_the_main_model() {
    let device = Device::flex().autodiff();
    let (config, model) = load("tiny-train", &device);
    let steps = references("tiny-train", "reference_train.safetensors");
    let tokens = steps["input_ids.step0"].tokens(&device);
    let [_, length] = tokens.dims();
    let mask = AttentionMask::causal(length, &device);
    let hidden = model
        .forward(tokens.clone(), &mask)
        .hidden
        .narrow(1, 0, length - 1);
    let loss = cross_entropy(model.logits(hidden), tokens.narrow(1, 1, length - 1));
    assert!((values(loss.clone())[0] - steps["loss"].values[0]).abs() <= tolerance::LOSS);
    let expected = references("tiny-train", "reference_grads.safetensors");
    assert_gradients(&model, loss.backward(), config.num_hidden_layers, &expected);
}

fn assert_gradients(
    model: &Transformer,
    gradients: Gradients,
    layers: usize,
    expected: &BTreeMap<String, Reference>,
) {
    struct Collector {
        path: ModulePath,
        layers: usize,
        gradients: Gradients,
        found: BTreeMap<String, Vec<f32>>,
    }
    impl ModuleVisitor for Collector {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, container: &str) {
            self.path.exit(container);
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(gradient) = param.val().grad(&self.gradients) else {
                return;
            };
            match stored(&self.path.join(), self.layers) {
                Stored::AsIs(name) => self.found.insert(name, values(gradient)),
                Stored::Transposed(name) => self.found.insert(name, values(gradient.transpose())),
                Stored::Experts { prefix, suffix } => {
                    let [experts, rows, columns] = gradient.dims()[..] else {
                        panic!("three sizes")
                    };
                    let all = values(gradient.transpose());
                    for (expert, one) in (0..experts).zip(all.chunks(rows * columns)) {
                        self.found
                            .insert(format!("{prefix}{expert}{suffix}"), one.to_vec());
                    }
                    None
                }
            };
        }
    }
    let path = ModulePath::default();
    let mut collector = Collector {
        path,
        layers,
        gradients,
        found: BTreeMap::new(),
    };
    model.visit(&mut collector);
    assert!(
        collector.found.keys().eq(expected.keys()),
        "gradients of other parameters"
    );
    for (name, found) in &collector.found {
        assert_close(name, found, &expected[name], tolerance::GRADIENT);
    }
}
