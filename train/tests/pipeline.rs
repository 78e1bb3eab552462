//! One step of every schedule on threads, against the same step on one device.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Device, Int, Tensor, TensorData},
};
use deepburn_model::{
    checkpoint::hf_config, config::ModelConfig, loss::BalanceReading, parameters::Registry,
    projection::Arithmetic, transformer::Transformer,
};
use deepburn_train::{
    parallel::{Communicator, LocalOptions, Mesh, local},
    pipeline::{
        copies::data_parallel,
        execute::{Share, Terms},
        layout::Layout,
        schedule::{Route, Schedule, Timeline},
        stage::Part,
    },
    precision::Precision,
    step::{LossWeights, Windows, losses},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const WEIGHTS: LossWeights = LossWeights {
    mtp: 0.3,
    balance: 1e-2,
    reading: BalanceReading::Paper,
};
const SEED: u64 = 11;

fn shape() -> ModelConfig {
    let tiny = hf_config::parse(include_str!("../../configs/model/tiny.json")).unwrap();
    ModelConfig {
        vocab_size: 64,
        hidden_size: 32,
        intermediate_size: 48,
        moe_intermediate_size: 16,
        num_hidden_layers: 8,
        initializer_range: 0.1,
        ..tiny
    }
}

/// Two sequences each, some of them with documents that end.
fn micro_batches(count: usize, device: &Device) -> Vec<Windows> {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let (sequences, length) = (2, 9);
    let windows = (0..count).map(|number| {
        let tokens: Vec<i32> = (0..sequences * (length + 1))
            .map(|_| random.random_range(0..64))
            .collect();
        let first: Vec<i32> = (0..sequences * length)
            .map(|at| if at % length < 4 { 0 } else { 4 })
            .collect();
        let first = TensorData::new(first, [sequences, length]);
        Windows {
            tokens: Tensor::from_data(TensorData::new(tokens, [sequences, length + 1]), device),
            first: number
                .is_multiple_of(3)
                .then(|| Tensor::from_data(first, device)),
        }
    });
    windows.collect()
}

/// What a step gives, by name.
#[derive(Default)]
struct Step {
    gradients: BTreeMap<String, Vec<f32>>,
    /// Main and MTP losses of each micro-batch.
    predictions: Vec<Vec<f32>>,
    /// Balance loss of each micro-batch.
    balance: Vec<f32>,
    /// By layer.
    loads: BTreeMap<usize, Vec<i64>>,
}

fn by_name(
    module: &impl Module,
    gradients: &GradientsParams,
    registry: &Registry,
) -> BTreeMap<String, Vec<f32>> {
    struct Names<'a>(
        &'a GradientsParams,
        &'a Registry,
        BTreeMap<String, Vec<f32>>,
    );
    impl ModuleVisitor for Names<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let name = self.1.path(param.id).expect("a parameter of the model");
            if let Some(gradient) = self.0.get::<D>(param.id) {
                let values = gradient.into_data().iter().collect();
                assert!(self.2.insert(name.to_owned(), values).is_none());
            }
        }
    }
    let mut names = Names(gradients, registry, BTreeMap::new());
    module.visit(&mut names);
    names.2
}

fn numbers(load: Tensor<1, Int>) -> Vec<i64> {
    load.into_data().iter().collect()
}

fn on_one_device(shape: &ModelConfig, arithmetic: Arithmetic, count: usize) -> Step {
    let device = Device::flex().autodiff();
    let model = Transformer::new(shape, SEED, &device).with_arithmetic(arithmetic);
    let registry = Registry::of(&model);
    let mut sum = GradientsAccumulator::new();
    let mut step = Step::default();
    for windows in micro_batches(count, &device) {
        let found = losses(&model, windows.tokens, windows.first, WEIGHTS);
        let gradients = (found.total / count as f64).backward();
        sum.accumulate(&model, GradientsParams::from_grads(gradients, &model));
        let mut predictions = vec![found.main];
        predictions.extend(found.mtp);
        let predictions = predictions.into_iter().map(Tensor::into_scalar::<f32>);
        step.predictions.push(predictions.collect());
        step.balance.push(found.balance.into_scalar());
        for (layer, load) in (shape.first_k_dense_replace..).zip(found.loads) {
            let load = numbers(load);
            let sum = step.loads.entry(layer).or_insert(vec![0; load.len()]);
            sum.iter_mut()
                .zip(load)
                .for_each(|(sum, load)| *sum += load);
        }
    }
    step.gradients = by_name(&model, &sum.grads(), &registry);
    step
}

/// How the ranks of a test work.
#[derive(Clone)]
struct Way {
    schedule: Schedule,
    ranks: usize,
    layers: Option<Vec<usize>>,
    recompute: bool,
    overlap: bool,
}

/// As [`on_one_device`], by ranks. Each checks that it did what the timeline says.
fn on_ranks(shape: &ModelConfig, arithmetic: Arithmetic, count: usize, way: &Way) -> Vec<Step> {
    let timeline: Timeline = way.schedule.timeline(way.ranks, count).unwrap();
    timeline.validate().unwrap();
    let layout = Layout::new(timeline.placement, shape, way.layers.as_deref()).unwrap();
    let mesh = Mesh {
        data: 1,
        pipeline: way.ranks,
        expert: 1,
    };
    local::run(&vec![0; way.ranks], LocalOptions::default(), |ranks| {
        let device = Device::flex().autodiff();
        let whole = Transformer::new(shape, SEED, &device).with_arithmetic(arithmetic);
        let registry = Registry::of(&whole);
        let part = Part::cut(whole, &layout, ranks.rank());
        let copies = data_parallel(&ranks, (mesh, &layout), (&part, &registry)).unwrap();
        let share = Share {
            timeline: &timeline,
            layout: &layout,
            ranks: &ranks,
            part: &part,
            terms: Terms {
                weights: WEIGHTS,
                micro_batches: count,
                recompute: way.recompute,
                overlap: way.overlap,
            },
        };
        let executed = share.train(&micro_batches(count, &device)).unwrap();
        let order: Vec<_> = executed.order.iter().map(ToString::to_string).collect();
        let steps = timeline.ranks[ranks.rank()].steps.iter();
        let parts = steps.flat_map(|step| step.action.parts());
        let expected: Vec<_> = parts.map(|part| part.to_string()).collect();
        assert_eq!(order, expected);
        let gradients = copies.reduce(&part, executed.gradients).unwrap();
        let number = |loss: Option<Tensor<1>>| loss.map_or(f32::NAN, Tensor::into_scalar::<f32>);
        let predictions = executed.losses.iter().map(|losses| {
            let all = [losses.main.clone()].into_iter();
            let all = all.chain(losses.mtp.iter().cloned().map(Some));
            all.map(number).collect()
        });
        let balance = executed.losses.iter().map(|losses| {
            let sum = losses.balance.iter().cloned();
            sum.map(Tensor::into_scalar::<f32>).sum()
        });
        Step {
            gradients: by_name(&part, &gradients, &registry),
            predictions: predictions.collect(),
            balance: balance.collect(),
            loads: executed
                .loads
                .into_iter()
                .map(|(layer, load)| (layer, numbers(load)))
                .collect(),
        }
    })
}

fn relative_difference(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |value: f32| f64::from(value).powi(2);
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = expected.iter().map(|&b| square(b)).sum();
    (difference / norm.max(f64::MIN_POSITIVE)).sqrt()
}

/// Which gradients are not the same bit for bit, after everything else was compared.
fn compare(expected: &Step, found: &[Step], way: &Way) -> Vec<String> {
    let mut different = Vec::new();
    let mut named = BTreeMap::new();
    for (rank, step) in found.iter().enumerate() {
        for (name, values) in &step.gradients {
            let reference = &expected.gradients[name];
            let difference = relative_difference(values, reference);
            assert!(
                difference <= 1e-6,
                "{:?}, rank {rank}: the gradient of {name} is off by {difference:e}",
                way.schedule
            );
            if values != reference && !different.contains(name) {
                different.push(name.clone());
            }
            let earlier = named.insert(name.clone(), values.clone());
            assert!(earlier.is_none(), "two ranks update {name}");
        }
    }
    assert!(named.keys().eq(expected.gradients.keys()));
    for (number, expected) in expected.predictions.iter().enumerate() {
        let known = |step: &&Step| !step.predictions[number][0].is_nan();
        let known: Vec<_> = found.iter().filter(known).collect();
        assert_eq!(known.len(), 1);
        assert_eq!(&known[0].predictions[number], expected);
    }
    for (number, expected) in expected.balance.iter().enumerate() {
        let sum: f32 = found.iter().map(|step| step.balance[number]).sum();
        assert!(
            (sum / expected - 1.0).abs() < 1e-6,
            "{sum}, expected {expected}"
        );
    }
    let mut loads: BTreeMap<usize, Vec<i64>> = BTreeMap::new();
    for (&layer, load) in found.iter().flat_map(|step| &step.loads) {
        let sum = loads.entry(layer).or_insert(vec![0; load.len()]);
        sum.iter_mut()
            .zip(load)
            .for_each(|(sum, load)| *sum += load);
    }
    assert_eq!(loads, expected.loads);
    different
}

/// Bit for bit where sums have the same order: everywhere but with DualPipe, whose two halves of the micro-batches are
/// summed apart, and for the embedding, whose gradients from the first and from the last stage are.
#[test]
fn every_schedule_gives_the_gradients_of_one_device() {
    let shape = shape();
    for (ranks, count) in [(2, 6), (4, 10)] {
        let expected = on_one_device(&shape, Arithmetic::FULL, count);
        for schedule in Schedule::ALL {
            for (recompute, overlap) in [(false, false), (true, false), (false, true), (true, true)]
            {
                let way = Way {
                    schedule,
                    ranks,
                    layers: None,
                    recompute,
                    overlap,
                };
                let found = on_ranks(&shape, Arithmetic::FULL, count, &way);
                let different = compare(&expected, &found, &way);
                let bitwise = schedule.placement(ranks).route != Route::BothWays;
                assert!(
                    !bitwise || different.iter().all(|name| name == "embed_tokens.weight"),
                    "{schedule:?} on {ranks}: {different:?}"
                );
            }
        }
    }
}

#[test]
fn lower_precisions_and_shared_matrices_go_through_the_same_stages() {
    for (precision, tied) in [(Precision::Bf16, false), (Precision::Fp8, true)] {
        let shape = ModelConfig {
            tie_word_embeddings: tied,
            num_nextn_predict_layers: 2,
            ..shape()
        };
        let arithmetic = precision.arithmetic();
        let expected = on_one_device(&shape, arithmetic, 4);
        for schedule in [Schedule::ZeroBubble, Schedule::DualPipeV] {
            let way = Way {
                schedule,
                ranks: 2,
                layers: (schedule == Schedule::ZeroBubble).then(|| vec![3, 5]),
                recompute: false,
                overlap: false,
            };
            let found = on_ranks(&shape, arithmetic, 4, &way);
            let different = compare(&expected, &found, &way);
            let embedding = |name: &String| name == "embed_tokens.weight";
            assert!(
                different.iter().all(embedding),
                "{schedule:?}: {different:?}"
            );
        }
    }
}
