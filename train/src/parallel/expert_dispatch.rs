//! Expert parallelism: each rank has some of the routed experts of every layer, and tokens travel to them.
//!
//! A layer does what [`LocalDispatcher`](deepburn_model::moe::LocalDispatcher) does, on all ranks together. Rows come to an
//! expert in the order of their ranks and tokens, as if the ranks' tokens were one batch: outputs and gradients of experts
//! are the same numbers as there. Sums over a token's experts are taken rank by rank and then node by node instead of choice
//! by choice, which with [`Wire::F32`] is the same to the bit for two experts per token and for those whose experts share a
//! rank, and differs by rounding for others.
//!
//! Calls on all ranks are in the same order: a rank without tokens dispatches none, one without rows computes with a row of
//! zeros that nobody sees. Forward passes use one communication thread and backward passes another, so that a forward pass
//! of one micro-batch and a backward pass of another can overlap on two threads, each of which waits only for its own
//! tokens. The two have to use tensors of their own (`module.clone().fork(device)`).

use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::{Device, Int, Tensor, TensorData};
use deepburn_kernels::{
    elsewhere::{GradientElsewhere, computed_elsewhere},
    permute::{combine, permute},
};
use deepburn_model::moe::{Dispatch, Dispatched, Experts, Routing, TokenDispatcher};

use super::{
    communicator::{CommError, Communicator},
    lane::{Lane, Pending},
    mesh::ExpertPlacement,
    routes::Routes,
    wire::{Row, Wire},
};

/// Sends tokens to the ranks of their experts. Serves all layers of a rank.
#[derive(Clone)]
pub struct ExpertDispatch(Arc<Ranks>);

struct Ranks {
    rank: usize,
    placement: Arc<ExpertPlacement>,
    wire: Wire,
    forward: Lane,
    backward: Lane,
    failed: Mutex<Option<CommError>>,
}

impl ExpertDispatch {
    /// A dispatcher over `group`, called by all its ranks.
    ///
    /// # Errors
    /// As [`Communicator::split`].
    ///
    /// # Panics
    /// If the placement is for another number of ranks.
    pub fn new(
        group: &dyn Communicator,
        placement: ExpertPlacement,
        wire: Wire,
    ) -> Result<Self, CommError> {
        assert_eq!(group.size(), placement.ranks(), "ranks with experts");
        let lane = || Ok(Lane::new(group.split(0, group.rank() as u64)?));
        Ok(Self(Arc::new(Ranks {
            rank: group.rank(),
            placement: Arc::new(placement),
            wire,
            forward: lane()?,
            backward: lane()?,
            failed: Mutex::new(None),
        })))
    }

    /// The experts of this rank.
    pub fn own(&self) -> Range<usize> {
        self.0.placement.experts_of(self.0.rank)
    }

    /// Whether all that was computed so far is what was asked for. A pass cannot return an error: after one, tokens come
    /// back as zeros. To be called before what follows from a pass is used.
    ///
    /// # Errors
    /// The first that a pass has met.
    pub fn check(&self) -> Result<(), CommError> {
        self.0.lock().clone().map_or(Ok(()), Err)
    }
}

impl fmt::Debug for ExpertDispatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ranks { rank, wire, .. } = &*self.0;
        write!(f, "ExpertDispatch(rank {rank}, {wire:?})")
    }
}

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ranks(rank {})", self.rank)
    }
}

impl Ranks {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<CommError>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The result, or zeros after a failure.
    fn or_zeros(&self, result: Result<Vec<f32>, CommError>, length: usize) -> Vec<f32> {
        result.unwrap_or_else(|error| {
            self.lock().get_or_insert(error);
            vec![0.0; length]
        })
    }
}

impl TokenDispatcher for ExpertDispatch {
    fn dispatch(&self, tokens: Tensor<2>, routing: &Routing) -> Box<dyn Dispatch> {
        let [_, width] = tokens.dims();
        let [_, k] = routing.chosen.dims();
        let chosen = routing.chosen.to_data();
        let chosen: Vec<usize> = chosen.iter::<i64>().map(|expert| expert as usize).collect();
        let mut load = vec![0i32; self.0.placement.experts()];
        for &expert in &chosen {
            load[expert] += 1;
        }
        // Weights travel with their token, in full.
        let rows = Tensor::cat(vec![tokens, routing.weights.clone()], 1);
        let row = Row {
            format: self.0.wire.dispatch,
            width,
            exact: k,
        };
        let numbers = numbers(rows.to_data());
        let placement = self.0.placement.clone();
        let arriving = self.0.forward.start(move |group| {
            let routes = Routes::plan(group, &placement, &chosen, k)?;
            let rows = routes.scatter(group, row, &numbers)?;
            Ok((routes, rows))
        });
        Box::new(Sent {
            ranks: self.0.clone(),
            rows,
            k,
            load,
            arriving,
        })
    }
}

struct Sent {
    ranks: Arc<Ranks>,
    /// `[T, D + K]`
    rows: Tensor<2>,
    k: usize,
    load: Vec<i32>,
    arriving: Pending<(Routes, Vec<f32>)>,
}

impl Dispatch for Sent {
    fn finish(self: Box<Self>, experts: &Experts) -> Dispatched {
        let Self {
            ranks,
            rows,
            k,
            load,
            arriving,
        } = *self;
        let [tokens, numbers_of_row] = rows.dims();
        let width = numbers_of_row - k;
        let device = rows.device();
        let load = integers(load, &device);
        let (routes, arrived) = match arriving.finish() {
            Ok(arrived) => arrived,
            Err(error) => {
                ranks.lock().get_or_insert(error);
                let hidden = rows.narrow(1, 0, width).zeros_like();
                return Dispatched { hidden, load };
            }
        };
        let (arrived, mut chosen) = (padded(arrived, numbers_of_row), routes.chosen().to_vec());
        if chosen.is_empty() {
            chosen = vec![None; k];
        }
        let order = experts.order_of_known(&chosen, k);
        let path = Path {
            ranks: ranks.clone(),
            routes: Arc::new(routes),
        };
        let height = path.routes.rows().max(1); // R
        let arrived = TensorData::new(arrived, [height, numbers_of_row]);
        let arrived = computed_elsewhere(rows, arrived, Arc::new(Dispatching(path.clone(), k)));
        let weights = arrived.clone().narrow(1, width, k); // [R, K]
        let outputs = experts.forward(permute(arrived.narrow(1, 0, width), &order), &order);
        let outputs = combine(outputs, weights, &order); // [R, D]

        let row = Row {
            format: ranks.wire.combine,
            width,
            exact: 0,
        };
        let (sent, routes) = (numbers(outputs.to_data()), path.routes.clone());
        let returning = ranks
            .forward
            .start(move |group| routes.gather(group, row, &sent));
        let hidden = ranks.or_zeros(returning.finish(), tokens * width);
        let hidden = TensorData::new(hidden, [tokens, width]);
        Dispatched {
            hidden: computed_elsewhere(outputs, hidden, Arc::new(Combining(path))),
            load,
        }
    }
}

#[derive(Clone, Debug)]
struct Path {
    ranks: Arc<Ranks>,
    routes: Arc<Routes>,
}

/// Gradients of tokens and their weights come back from where these were sent. Knows K.
#[derive(Debug)]
struct Dispatching(Path, usize);

impl GradientElsewhere for Dispatching {
    fn input_gradient(&self, gradient: TensorData) -> TensorData {
        let Self(Path { ranks, routes }, k) = self;
        let width = gradient.shape()[1];
        let row = Row {
            format: ranks.wire.combine,
            width: width - k,
            exact: *k,
        };
        let (moved, sent) = (routes.clone(), numbers(gradient));
        let returning = ranks
            .backward
            .start(move |group| moved.gather(group, row, &sent));
        let tokens = routes.tokens();
        let gradient = ranks.or_zeros(returning.finish(), tokens * width);
        TensorData::new(gradient, [tokens, width])
    }
}

/// Gradients of the layer's output go where the tokens went.
#[derive(Debug)]
struct Combining(Path);

impl GradientElsewhere for Combining {
    fn input_gradient(&self, gradient: TensorData) -> TensorData {
        let Self(Path { ranks, routes }) = self;
        let width = gradient.shape()[1];
        let row = Row {
            format: ranks.wire.dispatch,
            width,
            exact: 0,
        };
        let (moved, sent) = (routes.clone(), numbers(gradient));
        let arriving = ranks
            .backward
            .start(move |group| moved.scatter(group, row, &sent));
        let rows = ranks.or_zeros(arriving.finish(), routes.rows() * width);
        let rows = padded(rows, width);
        TensorData::new(rows, [routes.rows().max(1), width])
    }
}

/// At least one row: a rank without any has one of zeros.
fn padded(mut rows: Vec<f32>, width: usize) -> Vec<f32> {
    if rows.is_empty() {
        rows = vec![0.0; width];
    }
    rows
}

fn numbers(data: TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

fn integers(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let length = values.len();
    Tensor::from_data(TensorData::new(values, [length]), device)
}
