//! Computation goes on while tokens travel. The link between the nodes holds messages back until some computation is done:
//! a rank that waited for them first would wait until the deadline.

use std::{
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

use burn::tensor::{Device, Tensor, TensorData};
use deepburn_model::{config::ModelConfig, init::Initializer, moe::Moe};
use deepburn_train::parallel::{
    Communicator, ExpertDispatch, ExpertPlacement, Link, LocalOptions, Wire, local::run,
};

use crate::{
    four_ranks::{Work, step},
    numbers, tiny,
};

/// Holds back large messages until each rank has opened it.
#[derive(Default)]
struct Gate {
    opened: Mutex<usize>,
    changed: Condvar,
    held: Mutex<usize>,
}

const RANKS: usize = 2;
/// Bytes from which on a message is held.
const LARGE: usize = 4096;

impl Gate {
    fn open(&self) {
        *self.opened.lock().unwrap() += 1;
        self.changed.notify_all();
    }
}

impl Link for Gate {
    fn carry(&self, _: usize, _: usize, bytes: usize) {
        if bytes < LARGE {
            return;
        }
        *self.held.lock().unwrap() += 1;
        let opened = self.opened.lock().unwrap();
        let wait = Duration::from_secs(20);
        let shut = |opened: &mut usize| *opened < RANKS;
        let (_guard, result) = self.changed.wait_timeout_while(opened, wait, shut).unwrap();
        assert!(
            !result.timed_out(),
            "nothing was computed while tokens travelled"
        );
    }
}

fn tokens(count: usize) -> Tensor<3> {
    let width = tiny().hidden_size;
    let data = TensorData::new(numbers(count as u64, count * width), [1, count, width]);
    Tensor::from_data(data, &Device::flex().autodiff())
}

fn on_two_nodes(body: impl Fn(&dyn Communicator, ExpertDispatch, &Gate) + Sync) -> usize {
    let gate = Arc::new(Gate::default());
    let options = LocalOptions {
        deadline: Duration::from_secs(10),
        link: Some(gate.clone()),
    };
    run(&[0, 1], options, |world| {
        let config = tiny();
        let (experts, groups) = (config.n_routed_experts, config.n_group);
        let placement = ExpertPlacement::new(experts, groups, world.nodes()).unwrap();
        let dispatch = ExpertDispatch::new(&world, placement, Wire::F32).unwrap();
        body(&world, dispatch.clone(), &gate);
        dispatch.check().unwrap();
    });
    *gate.held.lock().unwrap()
}

fn layer(dispatch: &ExpertDispatch) -> Moe {
    let moe = Moe::new(
        &tiny(),
        Initializer::new(&Device::flex().autodiff(), 3, 0.2),
    );
    moe.distributed(dispatch.own(), Arc::new(dispatch.clone()))
}

/// Within a layer: between the start and the end of a dispatch.
#[test]
fn a_rank_computes_between_start_and_end_of_a_dispatch() {
    use deepburn_model::moe::TokenDispatcher;
    let held = on_two_nodes(|_, dispatch, gate| {
        let moe = layer(&dispatch);
        let x = tokens(64).squeeze_dim::<2>(0);
        let routing = moe.gate.forward(x.clone());
        let sent = dispatch.dispatch(x.clone(), &routing);
        let shared = moe.shared_experts.as_ref().unwrap().forward(x.clone());
        assert!(shared.into_data().iter::<f32>().any(|number| number != 0.0));
        gate.open();
        let back = sent.finish(&moe.experts);
        assert!(
            back.hidden
                .into_data()
                .iter::<f32>()
                .any(|number| number != 0.0)
        );
    });
    assert!(held >= RANKS, "{held} messages were held");
}

/// The overlapped pair F&B: a backward pass runs to its end while the tokens of a forward pass are on their way.
#[test]
fn a_backward_pass_ends_while_tokens_of_a_forward_pass_travel() {
    let held = on_two_nodes(|_, dispatch, gate| {
        // Chunk 1 has few tokens, whose messages pass.
        let first = layer(&dispatch);
        let loss = first.forward(tokens(3)).hidden.sum();
        let second = layer(&dispatch);
        thread::scope(|scope| {
            let forward =
                scope.spawn(move || second.forward(tokens(64)).hidden.sum().into_scalar::<f32>());
            let grads = loss.backward();
            let gradient = first.gate.weight.val().grad(&grads).unwrap();
            assert!(
                gradient
                    .into_data()
                    .iter::<f32>()
                    .any(|number| number != 0.0)
            );
            gate.open();
            assert!(forward.join().unwrap() != 0.0);
        });
    });
    assert!(held >= RANKS, "{held} messages were held");
}

/// Whether two messages were on their way to one rank at a time. Each is held for a while until there are.
struct Meeting {
    patience: Duration,
    /// Messages on their way to each rank, and whether two of them were to the same.
    state: Mutex<([usize; 4], bool)>,
    changed: Condvar,
}

impl Link for Meeting {
    fn carry(&self, _: usize, to: usize, bytes: usize) {
        if bytes < LARGE {
            return;
        }
        let mut state = self.state.lock().unwrap();
        state.0[to] += 1;
        state.1 |= state.0[to] > 1;
        self.changed.notify_all();
        let wait = self
            .changed
            .wait_timeout_while(state, self.patience, |state| !state.1);
        wait.unwrap().0.0[to] -= 1;
    }
}

/// The pairs of a schedule: tokens of a forward and of a backward pass are on their way to a rank together, and the numbers
/// are those of one after the other.
#[test]
fn tokens_of_both_passes_of_a_pair_travel_together() {
    // Each stage has a mixture-of-experts layer.
    let shape = ModelConfig {
        num_hidden_layers: 5,
        ..tiny()
    };
    let train = |overlap, patience| {
        let meeting = Arc::new(Meeting {
            patience: Duration::from_millis(patience),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let work = Work {
            shape: &shape,
            micro_batches: 4,
            sequences: 2,
            length: 64,
            overlap,
        };
        let done = step(&work, meeting.clone());
        let gradients: Vec<_> = done.into_iter().map(|rank| rank.0).collect();
        let met = meeting.state.lock().unwrap().1;
        (gradients, met)
    };
    let (one_by_one, met) = train(false, 1);
    assert!(!met, "one thread waits for one message at a time");
    let (together, met) = train(true, 200);
    assert!(met, "nothing was on its way beside anything else");
    assert!(one_by_one.iter().all(|rank| !rank.is_empty()));
    assert!(together == one_by_one, "other gradients");
}
