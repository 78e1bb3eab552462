//! The micro-batches of a step through the stages of a rank, in the order of a schedule.
//!
//! The two passes of a pair can compute on two threads, so that one goes on while tokens of the other travel (report, figure
//! 4). Each micro-batch has a graph with leaves of its own for the parameters: two threads whose graphs shared them could
//! wait for each other for ever in Burn's autodiff.

use std::{
    collections::{HashMap, VecDeque},
    panic::resume_unwind,
    thread,
};

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{DType, Gradients, Int, Tensor, TensorData},
};
use deepburn_kernels::weight_grad::{Products, WeightGradients, put_off};

use super::{
    layout::{Layout, Stage},
    schedule::{Action, Chunk, Direction, Neighbour, Pass, Route, Timeline, TransferKind, action},
    stage::{Part, StageOutput, StageResult},
};
use crate::{
    parallel::{CommError, Communicator, Transfer},
    step::{LossWeights, Windows},
};

/// What a rank needs for its share of the work.
#[derive(Clone, Copy)]
pub struct Share<'a> {
    /// Has been validated.
    pub timeline: &'a Timeline,
    /// Which stages it has.
    pub layout: &'a Layout,
    /// The ranks of the pipeline.
    pub ranks: &'a dyn Communicator,
    /// What it has of the model.
    pub part: &'a Part,
    /// How losses count.
    pub terms: Terms,
}

/// How the losses of a micro-batch count, and how they are computed.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Weights of the parts.
    pub weights: LossWeights,
    /// Micro-batches of the step, those of other pipelines included: the mean over them is minimised.
    pub micro_batches: usize,
    /// Whether a stage keeps only its input until its backward pass, and then computes its forward pass again.
    pub recompute: bool,
    /// Whether the two passes of a pair compute on two threads.
    pub overlap: bool,
}

/// What came of the micro-batches.
pub struct Executed {
    /// Sums over the micro-batches, of the parameters on this rank.
    pub gradients: GradientsParams,
    /// What is known here of each micro-batch's losses.
    pub losses: Vec<MicroLosses>,
    /// Tokens that each expert received, `[E]`, of the mixture-of-experts layers on this rank, with their numbers; MTP
    /// modules count on after the last layer.
    pub loads: HashMap<usize, Tensor<1, Int>>,
    /// What was computed, in order; pairs in their parts.
    pub order: Vec<Action>,
}

/// Losses of a micro-batch, as far as they are computed on this rank.
#[derive(Clone, Debug, Default)]
pub struct MicroLosses {
    /// Next-token cross-entropy.
    pub main: Option<Tensor<1>>,
    /// Cross-entropy of each MTP depth.
    pub mtp: Vec<Tensor<1>>,
    /// Balance losses of the stages here, without alpha.
    pub balance: Vec<Tensor<1>>,
}

impl Share<'_> {
    /// Runs forward and backward passes of all micro-batches.
    ///
    /// # Errors
    /// What keeps ranks from exchanging activations and gradients.
    pub fn train(self, micro_batches: &[Windows]) -> Result<Executed, CommError> {
        let mut execution = Execution::new(self, micro_batches);
        let steps = &self.timeline.ranks[self.ranks.rank()];
        for step in &steps.steps {
            execution.exchange(&step.wait)?;
            match step.action {
                Action::Forward(chunk) => execution.forward(chunk),
                Action::Backward(chunk) => execution.backward(chunk),
                Action::BackwardInput(chunk) => execution.backward_input(chunk),
                Action::BackwardWeight(_) => execution.backward_weight(),
                Action::Overlapped { forward, backward } => execution.pair(forward, backward),
            }
        }
        execution.exchange(&steps.final_wait)?;
        execution.done.gradients = execution.sum.grads();
        Ok(execution.done)
    }

    /// Runs the forward pass of one batch, outside of any schedule.
    ///
    /// # Errors
    /// As [`Share::train`].
    pub fn evaluate(self, windows: &Windows) -> Result<MicroLosses, CommError> {
        let placement = self.layout.placement();
        let mut execution = Execution::new(self, std::slice::from_ref(windows));
        let stages = placement.directions().iter();
        // One way is enough where there are two copies of the model.
        let way = match placement.route {
            Route::BothWays => 1,
            _ => 2,
        };
        for &direction in stages.take(way) {
            let chunk = Chunk {
                direction,
                micro_batch: 0,
            };
            let rank = self.ranks.rank();
            let transfer = |kind, peer| action::Transfer {
                kind,
                pass: Pass::Forward,
                chunk,
                peer,
            };
            if let Neighbour::Rank(peer) = placement.input(rank, Pass::Forward, direction) {
                execution.exchange(&[transfer(TransferKind::Receive, peer)])?;
            }
            let stage = self.layout.stage(rank, direction);
            let input = execution.arrived.remove(&(Pass::Forward, chunk));
            let output = self
                .part
                .forward(&stage, input, windows, self.terms.weights);
            execution.note(&stage, 0, &output);
            execution.hand_on_result(chunk, &output);
            if let Neighbour::Rank(peer) = placement.output(rank, Pass::Forward, direction) {
                execution.exchange(&[transfer(TransferKind::Send, peer)])?;
            }
        }
        let mut losses = execution.done.losses;
        Ok(losses.swap_remove(0))
    }
}

/// What a stage has kept of a forward pass for its backward pass.
struct Kept {
    /// Gets a gradient; `None` in the first stage.
    input: Option<Tensor<3>>,
    /// With what computed it; `None` if it has to be computed again.
    output: Option<(Part, StageOutput)>,
}

/// A forward pass that can be computed on any thread.
struct ForwardPass {
    part: Part,
    stage: Stage,
    input: Option<Tensor<3>>,
    windows: Windows,
    weights: LossWeights,
}

impl ForwardPass {
    fn compute(&self) -> StageOutput {
        let input = self.input.clone();
        self.part
            .forward(&self.stage, input, &self.windows, self.weights)
    }
}

/// A backward pass whose weights are still to come.
struct Queued {
    chunk: Chunk,
    part: Part,
    stage_gradients: Gradients,
    products: Products,
}

struct Execution<'a> {
    share: Share<'a>,
    micro_batches: &'a [Windows],
    /// The part without autodiff, where stages keep only their inputs.
    plain: Option<Part>,
    /// Inputs of passes that are not computed yet.
    arrived: HashMap<(Pass, Chunk), Tensor<3>>,
    /// Outputs of passes that are not sent yet.
    leaving: HashMap<(Pass, Chunk), Tensor<3>>,
    kept: HashMap<Chunk, Kept>,
    queue: VecDeque<Queued>,
    sum: GradientsAccumulator<Part>,
    done: Executed,
}

impl<'a> Execution<'a> {
    fn new(share: Share<'a>, micro_batches: &'a [Windows]) -> Self {
        Self {
            share,
            micro_batches,
            plain: share.terms.recompute.then(|| share.part.valid()),
            arrived: HashMap::new(),
            leaving: HashMap::new(),
            kept: HashMap::new(),
            queue: VecDeque::new(),
            sum: GradientsAccumulator::new(),
            done: Executed {
                gradients: GradientsParams::new(),
                losses: vec![MicroLosses::default(); micro_batches.len()],
                loads: HashMap::new(),
                order: Vec::new(),
            },
        }
    }

    /// F
    fn forward(&mut self, chunk: Chunk) {
        let pass = self.begin_forward(chunk);
        let output = pass.compute();
        self.end_forward(chunk, pass, output);
    }

    /// B
    fn backward(&mut self, chunk: Chunk) {
        let root = self.begin_backward(chunk);
        let gradients = root.loss.backward();
        self.end_backward(chunk, root, gradients);
    }

    /// F&B
    fn pair(&mut self, forward: Chunk, backward: Chunk) {
        if !self.share.terms.overlap {
            self.forward(forward);
            self.backward(backward);
            return;
        }
        // What is computed again for the backward pass travels as forward passes do: not beside one.
        let root = self.begin_backward(backward);
        let pass = self.begin_forward(forward);
        let (output, gradients) = thread::scope(|scope| {
            let output = scope.spawn(|| pass.compute());
            let gradients = root.loss.backward();
            (output.join(), gradients)
        });
        let output = output.unwrap_or_else(|panic| resume_unwind(panic));
        self.end_forward(forward, pass, output);
        self.end_backward(backward, root, gradients);
    }

    /// Bi
    fn backward_input(&mut self, chunk: Chunk) {
        let root = self.begin_backward(chunk);
        let (stage_gradients, products) = put_off(|| root.loss.backward());
        self.hand_back(chunk, &root, &stage_gradients);
        self.done.order.push(Action::BackwardInput(chunk));
        self.queue.push_back(Queued {
            chunk,
            part: root.part,
            stage_gradients,
            products,
        });
    }

    /// W
    fn backward_weight(&mut self) {
        let queued = self.queue.pop_front().expect("Bi comes before W");
        let products = queued.products.compute();
        self.add(&queued.part, queued.stage_gradients, Some(products));
        self.done.order.push(Action::BackwardWeight(queued.chunk));
    }

    fn begin_forward(&mut self, chunk: Chunk) -> ForwardPass {
        let input = self.arrived.remove(&(Pass::Forward, chunk));
        match &self.plain {
            Some(plain) => ForwardPass {
                part: plain.clone(),
                stage: self.stage(chunk),
                input,
                windows: self.windows(chunk).inner(),
                weights: self.share.terms.weights,
            },
            None => self.tracked(chunk, input),
        }
    }

    /// A forward pass with a graph of its own.
    fn tracked(&self, chunk: Chunk, input: Option<Tensor<3>>) -> ForwardPass {
        let part = self.share.part;
        ForwardPass {
            part: part.clone().fork(&part.device()),
            stage: self.stage(chunk),
            input: input.map(|input| Tensor::from_inner(input).require_grad()),
            windows: self.windows(chunk).clone(),
            weights: self.share.terms.weights,
        }
    }

    fn end_forward(&mut self, chunk: Chunk, pass: ForwardPass, output: StageOutput) {
        self.note(&pass.stage, self.number(chunk), &output);
        self.hand_on_result(chunk, &output);
        self.done.order.push(Action::Forward(chunk));
        let kept = Kept {
            input: pass.input,
            output: self.plain.is_none().then_some((pass.part, output)),
        };
        self.kept.insert(chunk, kept);
    }

    /// What to go backward from: the losses of the stage, and the inner product of its output with the gradient of that,
    /// whose gradient it is.
    fn begin_backward(&mut self, chunk: Chunk) -> Root {
        let terms = self.share.terms;
        let Kept { input, output } = self.kept.remove(&chunk).expect("F comes before B");
        let (part, input, output) = match output {
            Some((part, output)) => (part, input, output),
            None => {
                let pass = self.tracked(chunk, input);
                let output = pass.compute();
                (pass.part, pass.input, output)
            }
        };
        let balance = output.balance * terms.weights.balance;
        let count = terms.micro_batches as f64;
        let loss = match output.result {
            StageResult::Losses { prediction, .. } => (prediction + balance) / count,
            StageResult::Hidden(hidden) => {
                let gradient = self.arrived.remove(&(Pass::Backward, chunk));
                let gradient = gradient.expect("a gradient arrives before B");
                let product = (hidden * Tensor::from_inner(gradient)).sum();
                // In this order the graph is walked as that of the whole model is, and sums have the same order.
                match balance.is_tracked() {
                    true => balance / count + product,
                    false => product,
                }
            }
        };
        Root { part, input, loss }
    }

    fn end_backward(&mut self, chunk: Chunk, root: Root, gradients: Gradients) {
        self.hand_back(chunk, &root, &gradients);
        self.add(&root.part, gradients, None);
        self.done.order.push(Action::Backward(chunk));
    }

    fn hand_back(&mut self, chunk: Chunk, root: &Root, gradients: &Gradients) {
        if let Some(input) = &root.input {
            let gradient = input.grad(gradients);
            let gradient = gradient.expect("a stage depends on its input");
            self.hand_on(Pass::Backward, chunk, gradient);
        }
    }

    /// Adds the gradients of a micro-batch, which `part` has computed, to the sum.
    fn add(&mut self, part: &Part, mut gradients: Gradients, put_off: Option<WeightGradients>) {
        let mut found = GradientsParams::from_module(&mut gradients, part);
        if let Some(mut weights) = put_off {
            part.visit(&mut Late {
                weights: &mut weights,
                found: &mut found,
            });
            debug_assert!(weights.is_empty(), "a product for no parameter");
        }
        self.sum.accumulate(part, found);
    }

    /// Notes losses and loads.
    fn note(&mut self, stage: &Stage, number: usize, output: &StageOutput) {
        let losses = &mut self.done.losses[number];
        losses.balance.push(output.balance.clone().inner());
        if let StageResult::Losses { main, mtp, .. } = &output.result {
            losses.main = Some(main.clone().inner());
            losses.mtp = mtp.iter().map(|loss| loss.clone().inner()).collect();
        }
        let layers = self.share.part.routed_layers(stage);
        for (layer, load) in layers.into_iter().zip(&output.loads) {
            let load = load.clone().inner();
            let sum = match self.done.loads.remove(&layer) {
                Some(sum) => sum + load,
                None => load,
            };
            self.done.loads.insert(layer, sum);
        }
    }

    fn hand_on_result(&mut self, chunk: Chunk, output: &StageOutput) {
        if let StageResult::Hidden(hidden) = &output.result {
            self.hand_on(Pass::Forward, chunk, hidden.clone().inner());
        }
    }

    fn hand_on(&mut self, pass: Pass, chunk: Chunk, tensor: Tensor<3>) {
        let rank = self.share.ranks.rank();
        match self
            .share
            .layout
            .placement()
            .output(rank, pass, chunk.direction)
        {
            Neighbour::Rank(_) => {
                self.leaving.insert((pass, chunk), tensor);
            }
            Neighbour::Local(direction) => {
                self.arrived
                    .insert((pass, Chunk { direction, ..chunk }), tensor);
            }
            Neighbour::End => (),
        }
    }

    /// All transfers of a wait together.
    fn exchange(&mut self, wait: &[action::Transfer]) -> Result<(), CommError> {
        let sent: Vec<TensorData> = wait
            .iter()
            .filter(|transfer| transfer.kind == TransferKind::Send)
            .map(|transfer| {
                let tensor = self.leaving.remove(&(transfer.pass, transfer.chunk));
                tensor.expect("computed before it is sent").into_data()
            })
            .collect();
        let received = wait
            .iter()
            .filter(|transfer| transfer.kind == TransferKind::Receive);
        let mut received: Vec<(&action::Transfer, Vec<u8>)> = received
            .map(|transfer| {
                let bytes = self.shape(transfer.chunk).iter().product::<usize>() * 4;
                (transfer, vec![0; bytes])
            })
            .collect();
        let (mut sends, mut receives) = (sent.iter(), received.iter_mut());
        // In the order of the timeline, which is that of the other side.
        let mut transfers: Vec<Transfer<'_>> = wait
            .iter()
            .filter_map(|transfer| match transfer.kind {
                TransferKind::Send => sends.next().map(|data| Transfer::Send {
                    to: transfer.peer,
                    bytes: data.as_bytes(),
                }),
                TransferKind::Receive => receives.next().map(|(_, into)| Transfer::Receive {
                    from: transfer.peer,
                    into,
                }),
            })
            .collect();
        if !transfers.is_empty() {
            self.share.ranks.batch_p2p(&mut transfers)?;
        }
        let device = self.share.part.device().inner();
        for (transfer, bytes) in received {
            let data = TensorData::from_bytes_vec(bytes, self.shape(transfer.chunk), DType::F32);
            let tensor = Tensor::from_data(data, &device);
            self.arrived.insert((transfer.pass, transfer.chunk), tensor);
        }
        Ok(())
    }

    /// The sizes of what crosses from stage to stage. `[B, T, D]`
    fn shape(&self, chunk: Chunk) -> [usize; 3] {
        let windows = self.windows(chunk);
        let [batch, _] = windows.tokens.dims();
        [batch, windows.length(), self.share.part.width()]
    }

    fn stage(&self, chunk: Chunk) -> Stage {
        let rank = self.share.ranks.rank();
        self.share.layout.stage(rank, chunk.direction)
    }

    fn windows(&self, chunk: Chunk) -> &Windows {
        &self.micro_batches[self.number(chunk)]
    }

    /// The number of its micro-batch in the step. With two ways through the model, the second half comes from the other
    /// end.
    fn number(&self, chunk: Chunk) -> usize {
        match (self.share.layout.placement().route, chunk.direction) {
            (Route::BothWays, Direction::Descending) => {
                self.share.timeline.micro_batches + chunk.micro_batch
            }
            _ => chunk.micro_batch,
        }
    }
}

/// What a backward pass begins with, and the tensor whose gradient it hands on.
struct Root {
    part: Part,
    input: Option<Tensor<3>>,
    loss: Tensor<1>,
}

/// Takes gradients that were put off to those that were not.
struct Late<'a> {
    weights: &'a mut WeightGradients,
    found: &'a mut GradientsParams,
}

impl ModuleVisitor for Late<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.weights.remove(&param.val()) {
            self.found.register(param.id, gradient);
        }
    }
}
