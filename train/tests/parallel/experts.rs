//! A layer whose experts are divided over ranks against one that has all of them.

use std::sync::Arc;

use burn::{
    module::Param,
    tensor::{Device, Int, Tensor, TensorData, Tolerance},
};
use deepburn_kernels::routing::{GroupLimit, select_experts};
use deepburn_model::{
    config::ModelConfig,
    init::Initializer,
    moe::{Experts, LocalDispatcher, Moe, Routing, TokenDispatcher},
};
use deepburn_train::parallel::{
    CommError, Communicator, ExpertDispatch, ExpertPlacement, LocalOptions, RowFormat, Wire,
    local::run, wire::Row,
};

use crate::{numbers, tiny};

fn device() -> Device {
    Device::flex().autodiff()
}

fn tensor(values: &[f32], width: usize) -> Tensor<2> {
    let shape = [values.len() / width, width];
    Tensor::from_data(TensorData::new(values.to_vec(), shape), &device())
}

/// Numbers of a tensor.
type Numbers = Vec<f32>;

fn read<const D: usize>(tensor: Tensor<D>) -> Numbers {
    tensor.into_data().iter::<f32>().collect()
}

/// What tokens are routed to, and the gradient that comes back.
#[derive(Clone)]
struct Input {
    tokens: Numbers,
    chosen: Vec<i32>,
    weights: Numbers,
    gradient: Numbers,
}

/// Results of a pass, by name.
#[derive(Debug, PartialEq)]
struct Results {
    hidden: Numbers,
    tokens: Numbers,
    weights: Numbers,
    experts: [Numbers; 3],
    load: Vec<i64>,
}

fn pass(dispatcher: &dyn TokenDispatcher, experts: &Experts, input: &Input, k: usize) -> Results {
    let width = experts.gate_proj.val().dims()[1];
    let tokens = tensor(&input.tokens, width).require_grad();
    let weights = tensor(&input.weights, k).require_grad();
    let count = input.chosen.len() / k;
    let chosen = TensorData::new(input.chosen.clone(), [count, k]);
    let routing = Routing {
        logits: weights.clone(),
        affinity: weights.clone(),
        chosen: Tensor::<2, Int>::from_data(chosen, &device()),
        weights: weights.clone(),
    };
    let back = dispatcher
        .dispatch(tokens.clone(), &routing)
        .finish(experts);
    let grads = (back.hidden.clone() * tensor(&input.gradient, width))
        .sum()
        .backward();
    let of = |weights: &Param<Tensor<3>>| read(weights.val().grad(&grads).expect("reached"));
    Results {
        hidden: read(back.hidden),
        tokens: read(tokens.grad(&grads).expect("reached")),
        weights: read(weights.grad(&grads).expect("reached")),
        experts: [&experts.gate_proj, &experts.up_proj, &experts.down_proj].map(of),
        load: back.load.into_data().iter::<i64>().collect(),
    }
}

fn joined(parts: &[Results]) -> Results {
    let join =
        |of: &dyn Fn(&Results) -> &Numbers| parts.iter().flat_map(|p| of(p).clone()).collect();
    let loads = parts[0].load.len();
    Results {
        hidden: join(&|part| &part.hidden),
        tokens: join(&|part| &part.tokens),
        weights: join(&|part| &part.weights),
        experts: [0, 1, 2].map(|which| join(&|part: &Results| &part.experts[which])),
        load: (0..loads)
            .map(|expert| parts.iter().map(|part| part.load[expert]).sum())
            .collect(),
    }
}

/// A layout, and what makes a case hard.
struct Case {
    nodes: &'static [usize],
    tokens: &'static [usize],
    k: usize,
    /// All tokens go to the experts of one group.
    skewed: bool,
}

impl Case {
    fn config(&self) -> ModelConfig {
        ModelConfig {
            num_experts_per_tok: self.k,
            ..tiny()
        }
    }

    fn experts(&self) -> Experts {
        Experts::new(&self.config(), Initializer::new(&device(), 5, 0.2))
    }

    /// The inputs of the ranks.
    fn inputs(&self) -> Vec<Input> {
        let config = self.config();
        let (experts, k, width) = (config.n_routed_experts, self.k, config.hidden_size);
        let input = |(rank, &count): (usize, &usize)| {
            let seed = 100 + 10 * rank as u64;
            let choice = tensor(&numbers(seed, count * experts), experts);
            let limit = GroupLimit {
                experts_per_token: k,
                groups: config.n_group,
                groups_per_token: config.topk_group,
            };
            let chosen: Vec<i32> = if count == 0 {
                Vec::new()
            } else if self.skewed {
                // Of the first experts alone.
                (0..count * k).map(|pair| (pair % k) as i32).collect()
            } else {
                select_experts(choice, limit)
                    .into_data()
                    .iter::<i32>()
                    .collect()
            };
            Input {
                tokens: numbers(seed + 1, count * width),
                chosen,
                weights: numbers(seed + 2, count * k),
                gradient: numbers(seed + 3, count * width),
            }
        };
        self.tokens.iter().enumerate().map(input).collect()
    }

    /// All tokens and experts at once.
    fn alone(&self, inputs: &[Input]) -> Results {
        let all = inputs.iter().cloned().reduce(|mut all, next| {
            all.tokens.extend(next.tokens);
            all.chosen.extend(next.chosen);
            all.weights.extend(next.weights);
            all.gradient.extend(next.gradient);
            all
        });
        pass(&LocalDispatcher, &self.experts(), &all.unwrap(), self.k)
    }

    fn divided(&self, inputs: &[Input], wire: Wire) -> Results {
        let parts = run(self.nodes, LocalOptions::default(), |world| {
            let dispatch = dispatch(&world, &self.config(), wire).unwrap();
            let experts = self.experts().keep(dispatch.own());
            let results = pass(&dispatch, &experts, &inputs[world.rank()], self.k);
            dispatch.check().unwrap();
            results
        });
        joined(&parts)
    }
}

fn dispatch(
    world: &dyn Communicator,
    config: &ModelConfig,
    wire: Wire,
) -> Result<ExpertDispatch, CommError> {
    let (experts, groups) = (config.n_routed_experts, config.n_group);
    let placement = ExpertPlacement::new(experts, groups, world.nodes()).unwrap();
    ExpertDispatch::new(world, placement, wire)
}

const CASES: [Case; 9] = [
    Case {
        nodes: &[0],
        tokens: &[7],
        k: 2,
        skewed: false,
    },
    Case {
        nodes: &[0, 0],
        tokens: &[7, 4],
        k: 2,
        skewed: false,
    },
    Case {
        nodes: &[0, 1],
        tokens: &[1, 12],
        k: 2,
        skewed: false,
    },
    Case {
        nodes: &[0, 0, 0, 0],
        tokens: &[5, 6, 2, 9],
        k: 2,
        skewed: false,
    },
    Case {
        nodes: &[0, 0, 1, 1],
        tokens: &[5, 6, 2, 9],
        k: 2,
        skewed: false,
    },
    Case {
        nodes: &[3, 1, 2, 0],
        tokens: &[8, 3, 3, 1],
        k: 2,
        skewed: false,
    },
    // Ranks without tokens; a rank with neither tokens nor rows.
    Case {
        nodes: &[0, 0, 1, 1],
        tokens: &[6, 0, 3, 0],
        k: 2,
        skewed: true,
    },
    Case {
        nodes: &[0, 1, 0, 1],
        tokens: &[4, 7, 0, 5],
        k: 2,
        skewed: false,
    },
    Case {
        nodes: &[0, 0, 1, 1],
        tokens: &[9, 4, 6, 3],
        k: 4,
        skewed: false,
    },
];

/// With two experts per token nothing differs in any bit: sums of two numbers have no order.
#[test]
fn divided_experts_compute_what_one_device_does() {
    for case in &CASES {
        let inputs = case.inputs();
        let (expected, found) = (case.alone(&inputs), case.divided(&inputs, Wire::F32));
        let name = format!("nodes {:?}, {} per token", case.nodes, case.k);
        assert_eq!(found.load, expected.load, "{name}");
        if case.k == 2 {
            assert!(
                found == expected,
                "{name}: {found:?}, expected {expected:?}"
            );
            continue;
        }
        // Up to 4 numbers of magnitude 10 are summed in another order: some units of 10 / 2^24.
        let close = |found: &Numbers, expected: &Numbers| {
            assert_eq!(found.len(), expected.len(), "{name}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    (found - expected).abs() < 5e-6,
                    "{name}: {found}, expected {expected}"
                );
            }
        };
        close(&found.hidden, &expected.hidden);
        close(&found.tokens, &expected.tokens);
        close(&found.weights, &expected.weights);
        // An expert sees the same rows in the same order.
        assert_eq!(found.experts, expected.experts, "{name}");
        assert_ne!(
            found.hidden, expected.hidden,
            "the order of the sums does not matter"
        );
    }
}

/// Tokens in FP8 on the wire are as tokens that were rounded before, and so are gradients of the output.
#[test]
fn tokens_are_rounded_once_on_their_way() {
    let case = &CASES[4];
    let width = case.config().hidden_size;
    let row = Row {
        format: RowFormat::Fp8,
        width,
        exact: 0,
    };
    let rounded = |numbers: &Numbers| -> Numbers {
        let mut rounded = vec![0.0; numbers.len()];
        for (row_of, out) in numbers.chunks(width).zip(rounded.chunks_mut(width)) {
            let mut bytes = Vec::new();
            row.encode(row_of, &mut bytes);
            row.decode(&bytes, |at, number| out[at] = number);
        }
        rounded
    };
    let inputs = case.inputs();
    let before: Vec<Input> = inputs
        .iter()
        .map(|input| Input {
            tokens: rounded(&input.tokens),
            gradient: rounded(&input.gradient),
            ..input.clone()
        })
        .collect();
    assert_ne!(before[0].tokens, inputs[0].tokens);
    let fp8 = Wire {
        dispatch: RowFormat::Fp8,
        combine: RowFormat::F32,
    };
    let (expected, found) = (case.alone(&before), case.divided(&inputs, fp8));
    assert!(found == expected, "{found:?}, expected {expected:?}");

    // On the way back each rank and each relay rounds to BF16, with half a unit of the eighth bit.
    let found = case.divided(&inputs, Wire::FP8);
    for (found, expected) in [
        (&found.hidden, &expected.hidden),
        (&found.tokens, &expected.tokens),
    ] {
        let largest = expected
            .iter()
            .fold(0f32, |largest, x| largest.max(x.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found - expected).abs() <= 4.0 / 256.0 * largest,
                "{found}, {expected}"
            );
        }
        assert_ne!(found, expected);
    }
    // Weights and their gradients travel in full.
    assert_eq!(found.weights, expected.weights);
}

/// The whole layer with router and shared expert, on tokens of which each rank has some.
#[test]
fn divided_layers_compute_what_one_layer_does() {
    let config = tiny();
    let width = config.hidden_size;
    let layer = || Moe::new(&config, Initializer::new(&device(), 3, 0.2));
    let counts = [9, 2, 5, 7];
    let total: usize = counts.iter().sum();
    let (tokens, gradient) = (numbers(1, total * width), numbers(2, total * width));
    let pass = |moe: Moe, range: std::ops::Range<usize>| {
        let part = |all: &Numbers| tensor(&all[range.start * width..range.end * width], width);
        let x = part(&tokens).require_grad();
        let output = moe.forward(x.clone().unsqueeze_dim(0));
        let y = output.hidden.squeeze_dim::<2>(0);
        let grads = (y.clone() * part(&gradient)).sum().backward();
        let shared = moe.shared_experts.as_ref().expect("tiny has one");
        [
            read(y),
            read(x.grad(&grads).unwrap()),
            read(moe.experts.down_proj.val().grad(&grads).unwrap()),
            read(moe.gate.weight.val().grad(&grads).unwrap()),
            read(shared.gate_proj.weight.val().grad(&grads).unwrap()),
            output.load.into_data().iter::<f32>().collect(),
        ]
    };
    let expected = pass(layer(), 0..total);
    for nodes in [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3]] {
        let parts = run(&nodes, LocalOptions::default(), |world| {
            let dispatch = dispatch(&world, &config, Wire::F32).unwrap();
            let moe = layer().distributed(dispatch.own(), Arc::new(dispatch.clone()));
            let start: usize = counts[..world.rank()].iter().sum();
            let results = pass(moe, start..start + counts[world.rank()]);
            dispatch.check().unwrap();
            results
        });
        for (which, expected) in expected.iter().enumerate() {
            let found: Numbers = if which < 3 {
                parts.iter().flat_map(|part| part[which].clone()).collect()
            } else {
                let sum = |at: usize| parts.iter().map(|part| part[which][at]).sum::<f32>();
                (0..expected.len()).map(sum).collect()
            };
            let data = |values: &Numbers| TensorData::new(values.clone(), [values.len()]);
            let close = Tolerance::<f32>::rel_abs(1e-5, 1e-5);
            data(&found).assert_approx_eq(&data(expected), close);
            if which == 5 {
                assert_eq!(&found, expected, "loads");
            }
        }
    }
}

/// No pass returns an error: what is told afterwards names the rank.
#[test]
fn a_lost_rank_is_told_after_the_pass() {
    let case = &CASES[1];
    let inputs = case.inputs();
    let results = run(case.nodes, LocalOptions::default(), |world| {
        let dispatch = dispatch(&world, &case.config(), Wire::F32).unwrap();
        if world.rank() == 1 {
            return Ok(());
        }
        let experts = case.experts().keep(dispatch.own());
        let results = pass_without_gradients(&dispatch, &experts, &inputs[0], case.k);
        assert!(results.iter().all(|&number| number == 0.0));
        dispatch.check()
    });
    let error = results[0].clone().unwrap_err().to_string();
    assert!(error.contains("rank 1 is gone"), "{error}");
}

fn pass_without_gradients(
    dispatcher: &dyn TokenDispatcher,
    experts: &Experts,
    input: &Input,
    k: usize,
) -> Numbers {
    let width = experts.gate_proj.val().dims()[1];
    let weights = tensor(&input.weights, k);
    let chosen = TensorData::new(input.chosen.clone(), [input.chosen.len() / k, k]);
    let routing = Routing {
        logits: weights.clone(),
        affinity: weights.clone(),
        chosen: Tensor::from_data(chosen, &device()),
        weights,
    };
    read(
        dispatcher
            .dispatch(tensor(&input.tokens, width), &routing)
            .finish(experts)
            .hidden,
    )
}
