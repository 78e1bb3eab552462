//! Training steps on several ranks against the same steps on one.

use std::sync::Arc;

use burn::{
    optim::GradientsParams,
    tensor::{Device, Int, Tensor, TensorData},
};
use deepburn_model::{
    config::ModelConfig, layer::FeedForward, loss::BalanceReading, moe::TokenDispatcher,
    parameters::Registry, transformer::Transformer,
};
use deepburn_train::{
    config::OptimizerConfig,
    optimizer::adamw,
    parallel::{
        Communicator, DataParallel, DataParallelError, ExpertDispatch, ExpertPlacement, Group,
        LocalOptions, Mesh, Wire,
        data_parallel::{is_routed_expert, sum_loads},
        local::run,
    },
    precision::Precision,
    step::{self, LossWeights, Losses, UpdateRule, losses},
};

use crate::{numbers, tiny};

const STEPS: usize = 10;
const SEQUENCES: usize = 4;
const COLUMNS: usize = 17;
const RATE: f64 = 3e-3;
const RULE: UpdateRule = UpdateRule {
    // Less than the norms of these gradients: clipping is part of what is compared.
    clip_norm: 0.5,
    gamma: 1e-2,
};

/// Weights so large that scores of experts are far apart: sums of another order do not choose other experts.
fn model() -> Transformer {
    let shape = ModelConfig {
        initializer_range: 0.1,
        ..tiny()
    };
    Transformer::new(&shape, 7, &Device::flex().autodiff())
}

/// Sequences of a step's batch.
fn windows(step: usize, range: std::ops::Range<usize>) -> Tensor<2, Int> {
    let vocabulary = tiny().vocab_size as f32;
    let tokens = numbers(step as u64 + 1, SEQUENCES * COLUMNS);
    // Few of them, so that there is something to learn.
    let token = |number: &f32| ((number + 1.0) / 2.0 * vocabulary / 8.0) as i32;
    let tokens: Vec<i32> = tokens[range.start * COLUMNS..range.end * COLUMNS]
        .iter()
        .map(token)
        .collect();
    let data = TensorData::new(tokens, [range.len(), COLUMNS]);
    Tensor::from_data(data, &Device::flex().autodiff())
}

fn step_losses(model: &Transformer, windows: Tensor<2, Int>) -> Losses {
    let weights = LossWeights {
        mtp: 0.3,
        balance: 0.01,
        reading: BalanceReading::Actual,
    };
    losses(model, windows, None, weights)
}

fn counts(losses: &Losses) -> Vec<Vec<u64>> {
    let load = |load: &Tensor<1, Int>| load.to_data().iter::<i64>().map(|n| n as u64).collect();
    losses.loads.iter().map(load).collect()
}

fn biases(model: &Transformer) -> Vec<Vec<f32>> {
    let main = model.layers.iter().map(|layer| &layer.mlp);
    let all = main.chain(model.mtp.iter().map(|module| &module.block.mlp));
    all.filter_map(|mlp| match mlp {
        FeedForward::Moe(moe) => {
            let bias = moe.gate.e_score_correction_bias.val().into_data();
            Some(bias.iter::<f32>().collect())
        }
        FeedForward::Dense(_) => None,
    })
    .collect()
}

/// What a step left behind.
#[derive(Debug)]
struct Trace {
    loss: f64,
    norm: f64,
    loads: Vec<Vec<u64>>,
    biases: Vec<Vec<f32>>,
}

fn alone() -> Vec<Trace> {
    let mut model = model();
    let mut optimizer = adamw(&OptimizerConfig::default(), Precision::Fp32);
    (0..STEPS)
        .map(|at| {
            let losses = step_losses(&model, windows(at, 0..SEQUENCES));
            let loads = counts(&losses);
            let loss = losses.total.clone().into_scalar::<f64>();
            let gradients = GradientsParams::from_grads(losses.total.backward(), &model);
            let norm = step::global_norm(&model, &gradients);
            let current = model.clone();
            model = step::update(
                current,
                &mut optimizer,
                RATE.into(),
                gradients,
                norm,
                &loads,
                RULE,
            );
            let biases = biases(&model);
            Trace {
                loss,
                norm,
                loads,
                biases,
            }
        })
        .collect()
}

/// The same steps on a mesh without pipeline.
fn together(mesh: Mesh, nodes: &[usize]) -> Vec<Vec<Trace>> {
    run(nodes, LocalOptions::default(), |world| {
        let mesh = mesh.checked(world.size()).unwrap();
        let config = tiny();
        let expert_group = mesh.split(&world, Group::Expert).unwrap();
        let (experts, groups) = (config.n_routed_experts, config.n_group);
        let placement = ExpertPlacement::new(experts, groups, expert_group.nodes()).unwrap();
        let dispatch = ExpertDispatch::new(&*expert_group, placement, Wire::F32).unwrap();
        let dispatcher: Arc<dyn TokenDispatcher> = Arc::new(dispatch.clone());
        let mut model = model().with_experts(&dispatch.own(), &dispatcher);
        let dense = mesh.split(&world, Group::Dense).unwrap();
        let replicas = mesh.split(&world, Group::Replicas).unwrap();
        let group_of = |path: &str| usize::from(is_routed_expert(path));
        // Several buckets, and parameters that are larger than one.
        let registry = Registry::of(&model);
        let groups = vec![dense, replicas];
        let parallel = DataParallel::new((&model, &registry), groups, group_of, 20_000).unwrap();
        let (own, all) = parallel.share_of_elements();
        assert!(world.size() == 1 || own < all * 3 / 4, "{own} of {all}");
        let mut optimizer = adamw(&OptimizerConfig::default(), Precision::Fp32);
        let each = SEQUENCES / world.size();
        (0..STEPS)
            .map(|at| {
                let start = world.rank() * each;
                let losses = step_losses(&model, windows(at, start..start + each));
                let mut loads = counts(&losses);
                let loss = losses.total / world.size() as f64;
                let own_loss = loss.clone().into_scalar::<f64>();
                let gradients = GradientsParams::from_grads(loss.backward(), &model);
                dispatch.check().unwrap();
                let gradients = parallel.reduce(&model, gradients).unwrap();
                let norm = parallel
                    .global_norm(&world, (&model, &registry), &gradients)
                    .unwrap();
                sum_loads(&world, &mut loads).unwrap();
                let current = model.clone();
                let current = step::update(
                    current,
                    &mut optimizer,
                    RATE.into(),
                    gradients,
                    norm,
                    &loads,
                    RULE,
                );
                model = parallel.share(current).unwrap();
                let biases = biases(&model);
                Trace {
                    loss: own_loss,
                    norm,
                    loads,
                    biases,
                }
            })
            .collect()
    })
}

#[test]
fn ranks_train_as_one_device_does() {
    let expected = alone();
    assert!(
        expected[STEPS - 1].loss < expected[0].loss - 0.5,
        "nothing is learnt"
    );
    assert!(expected.iter().all(|step| step.norm > RULE.clip_norm));
    let mesh = |data, expert| Mesh {
        data,
        pipeline: 1,
        expert,
    };
    for (mesh, nodes) in [
        (mesh(2, 1), &[0, 0][..]),
        (mesh(1, 2), &[0, 1][..]),
        (mesh(2, 2), &[0, 0, 1, 1][..]),
        (mesh(1, 4), &[0, 0, 1, 1][..]),
    ] {
        let ranks = together(mesh, nodes);
        for (at, expected) in expected.iter().enumerate() {
            let loss: f64 = ranks.iter().map(|rank| rank[at].loss).sum();
            assert!(
                (loss - expected.loss).abs() < 1e-5,
                "{mesh:?}, step {at}: loss {loss}, expected {}",
                expected.loss
            );
            for rank in &ranks {
                let Trace {
                    norm,
                    loads,
                    biases,
                    ..
                } = &rank[at];
                let error = (norm / expected.norm - 1.0).abs();
                assert!(
                    error < 1e-4,
                    "{mesh:?}, step {at}: norm {norm}, {expected:?}"
                );
                assert_eq!(loads, &expected.loads, "{mesh:?}, step {at}");
                assert_eq!(biases, &expected.biases, "{mesh:?}, step {at}");
            }
        }
    }
}

#[test]
fn ranks_with_other_parameters_are_told() {
    let results = run(&[0, 0], LocalOptions::default(), |world| {
        let mut model = model();
        if world.rank() == 1 {
            model.layers.truncate(2);
        }
        let group = world.split(0, world.rank() as u64).unwrap();
        let registry = Registry::of(&model);
        DataParallel::new((&model, &registry), vec![group], |_| 0, 1 << 20).map(|_| ())
    });
    let error = results[1].as_ref().unwrap_err();
    assert!(
        matches!(
            error,
            DataParallelError::Parameters {
                rank: 1,
                other: 0,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("layers.2."), "{error}");
}
