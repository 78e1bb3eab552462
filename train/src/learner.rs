//! The model as Burn's Learner trains it.
//!
//! The Learner hands its optimizer out in one place, [`TrainStep::optimize`]: clipping by the global norm, the
//! optimizer step, the selection biases and snapshots of the optimizer's state all happen there.

use std::{
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
};

use burn::{
    module::Module,
    optim::{
        GradientsParams, ModuleOptimizer, OptimizerRecord,
        lr_scheduler::module_lr_scheduler::ModuleLearningRate,
    },
    tensor::{Device, Int, Tensor, TensorData},
    train::{InferenceStep, TrainOutput, TrainStep},
};
use deepburn_model::{parameters::Registry, transformer::Transformer};

use crate::{
    report::StepReport,
    run::TrainError,
    state::{Checkpoints, Contents},
    step::{self, LossWeights, UpdateRule, Windows},
    strategy::Trained,
};

/// Windows of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Windows of the same length, L + 1.
    pub windows: Vec<Vec<u32>>,
    /// The token that ends a document, where attention is to stay within documents.
    pub document_end: Option<u32>,
}

impl Batch {
    /// Tokens that are predicted: B L.
    pub fn predicted(&self) -> u64 {
        self.windows
            .iter()
            .map(|window| window.len() as u64 - 1)
            .sum()
    }

    /// Some of the windows.
    pub(crate) fn part(&self, windows: Range<usize>) -> Self {
        Self {
            windows: self.windows[windows].to_vec(),
            document_end: self.document_end,
        }
    }

    /// Parts of `sequences` windows, the last one smaller.
    pub(crate) fn parts(&self, sequences: usize) -> impl Iterator<Item = Self> {
        let windows = self.windows.chunks(sequences);
        windows.map(|windows| Self {
            windows: windows.to_vec(),
            document_end: self.document_end,
        })
    }

    /// On a device.
    pub(crate) fn on(&self, device: &Device) -> Windows {
        Windows {
            tokens: self.tokens(device),
            first: self.first(device),
        }
    }

    fn tokens(&self, device: &Device) -> Tensor<2, Int> {
        let columns = self.windows.first().map_or(0, Vec::len);
        let tokens: Vec<i32> = self
            .windows
            .iter()
            .flatten()
            .map(|&token| token as i32)
            .collect();
        Tensor::from_data(
            TensorData::new(tokens, [self.windows.len(), columns]),
            device,
        )
    }

    /// The start of the document of each input token, where attention is to stay within documents. `[B, L]`
    fn first(&self, device: &Device) -> Option<Tensor<2, Int>> {
        let end = self.document_end?;
        let length = self.windows.first()?.len() - 1;
        let starts: Vec<i32> = self
            .windows
            .iter()
            .flat_map(|window| {
                let positions = window[..length].iter().zip(0..);
                positions.scan(0, |start, (&token, position)| {
                    let current = *start;
                    if token == end {
                        *start = position + 1;
                    }
                    Some(current)
                })
            })
            .collect();
        Some(Tensor::from_data(
            TensorData::new(starts, [self.windows.len(), length]),
            device,
        ))
    }
}

/// A model in training.
#[derive(Module, Debug)]
pub struct Trainee {
    /// The model.
    pub model: Transformer,
    #[module(skip)]
    exchange: Exchange,
}

/// What the training loop tells a step, and what the step tells the loop. Shared by all clones of a [`Trainee`].
#[derive(Clone, Debug)]
pub struct Exchange(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    settings: StepSettings,
    loads: Vec<Vec<u64>>,
    gradient_norm: f64,
    snapshot: Option<OptimizerRecord>,
    not_finite: Vec<String>,
    left_out: bool,
    error: Option<TrainError>,
}

/// What holds for one step.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings {
    /// Weights of the losses.
    pub weights: LossWeights,
    /// Bounds of the update.
    pub rule: UpdateRule,
    /// Micro-batches whose gradients are summed.
    pub accumulation: usize,
    /// Whether the optimizer's state is wanted after the step.
    pub snapshot: bool,
}

impl Exchange {
    /// An exchange with the settings of the first step.
    pub fn new(settings: StepSettings) -> Self {
        let state = State {
            settings,
            loads: Vec::new(),
            gradient_norm: 0.0,
            snapshot: None,
            not_finite: Vec::new(),
            left_out: false,
            error: None,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// Begins a step.
    pub fn begin(&self, settings: StepSettings) {
        let mut state = self.lock();
        state.settings = settings;
        state.loads.clear();
        state.not_finite.clear();
        state.left_out = false;
    }

    /// Asks that the step under way changes nothing.
    pub fn leave_out(&self) {
        self.lock().left_out = true;
    }

    /// Whether the step under way is to change nothing.
    pub(crate) fn is_left_out(&self) -> bool {
        self.lock().left_out
    }

    /// Asks for the optimizer's state after the step under way.
    pub fn want_snapshot(&self) {
        self.lock().settings.snapshot = true;
    }

    /// Tokens that each expert received in the step, per mixture-of-experts layer, over all micro-batches.
    pub fn loads(&self) -> Vec<Vec<u64>> {
        self.lock().loads.clone()
    }

    /// Norm of the gradients before clipping.
    pub fn gradient_norm(&self) -> f64 {
        self.lock().gradient_norm
    }

    /// Parameters whose gradients were not finite, so that the optimizer step was left out.
    pub fn not_finite(&self) -> Vec<String> {
        self.lock().not_finite.clone()
    }

    /// Notes what went wrong in a step, which Burn has no way to return.
    pub(crate) fn fail(&self, error: TrainError) {
        self.lock().error.get_or_insert(error);
    }

    /// What went wrong in a step.
    pub(crate) fn check(&self) -> Result<(), TrainError> {
        self.lock().error.take().map_or(Ok(()), Err)
    }

    /// What holds for the step under way.
    pub(crate) fn settings(&self) -> StepSettings {
        self.lock().settings
    }

    /// Tells what came of the optimizer step, and hands out the optimizer's state if it is wanted.
    pub(crate) fn end(&self, norm: f64, not_finite: Vec<String>, optimizer: &ModuleOptimizer) {
        let mut state = self.lock();
        state.gradient_norm = norm;
        state.not_finite = not_finite;
        if state.settings.snapshot {
            state.snapshot = Some(optimizer.to_record());
        }
    }

    /// The optimizer's state, if it was asked for.
    pub fn take_snapshot(&self) -> Option<OptimizerRecord> {
        self.lock().snapshot.take()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn add_loads(&self, loads: &[Vec<u64>]) {
        let mut state = self.lock();
        if state.loads.is_empty() {
            state.loads = loads.to_vec();
            return;
        }
        for (sum, load) in state.loads.iter_mut().zip(loads) {
            for (sum, load) in sum.iter_mut().zip(load) {
                *sum += load;
            }
        }
    }
}

impl Trainee {
    /// A model with the exchange of its training loop.
    pub fn new(model: Transformer, exchange: Exchange) -> Self {
        Self { model, exchange }
    }

    fn report(&self, batch: &Batch, losses: step::Losses) -> (StepReport, Vec<Vec<u64>>) {
        let number = |tensor: Tensor<1>| tensor.into_scalar::<f64>();
        let loads: Vec<Vec<u64>> = losses
            .loads
            .into_iter()
            .map(|load| {
                load.into_data()
                    .iter::<i64>()
                    .map(|load| load as u64)
                    .collect()
            })
            .collect();
        let report = StepReport {
            predicted_tokens: batch.predicted(),
            loss: number(losses.total),
            main: number(losses.main),
            mtp: losses.mtp.into_iter().map(number).collect(),
            balance: number(losses.balance),
            ..StepReport::default()
        };
        (report, loads)
    }

    fn losses(&self, batch: &Batch) -> step::Losses {
        let device = self.model.norm.weight.val().device();
        let weights = self.exchange.settings().weights;
        step::losses(
            &self.model,
            batch.tokens(&device),
            batch.first(&device),
            weights,
        )
    }
}

impl TrainStep for Trainee {
    type Input = Batch;
    type Output = StepReport;

    fn step(&self, batch: Batch) -> TrainOutput<StepReport> {
        let losses = self.losses(&batch);
        let accumulation = self.exchange.settings().accumulation;
        let gradients = (losses.total.clone() / accumulation as f64).backward();
        let (report, loads) = self.report(&batch, losses);
        self.exchange.add_loads(&loads);
        TrainOutput::new(self, gradients, report)
    }

    fn optimize(
        mut self,
        optimizer: &mut ModuleOptimizer,
        rate: ModuleLearningRate,
        gradients: GradientsParams,
    ) -> Self {
        let (rule, loads) = (self.exchange.settings().rule, self.exchange.loads());
        let norm = step::global_norm(&self.model, &gradients);
        let mut not_finite = Vec::new();
        if !norm.is_finite() {
            let registry = Registry::of(&self.model);
            let broken = step::not_finite(&self.model, &gradients).into_iter();
            not_finite = broken
                .filter_map(|id| registry.path(id).map(str::to_owned))
                .collect();
        } else if !self.exchange.is_left_out() {
            self.model = step::update(self.model, optimizer, rate, gradients, norm, &loads, rule);
        }
        self.exchange.end(norm, not_finite, optimizer);
        self
    }
}

impl Trained for Trainee {
    type Weights = Transformer;

    fn exchange(&self) -> &Exchange {
        &self.exchange
    }

    fn weights(&self) -> &Transformer {
        &self.model
    }

    fn agree_to_stop(&self, asked: bool) -> Result<bool, TrainError> {
        Ok(asked)
    }

    fn save(
        &self,
        checkpoints: &Checkpoints,
        contents: Contents<'_>,
        average: Option<&Transformer>,
        record: OptimizerRecord,
    ) -> Result<PathBuf, TrainError> {
        Ok(checkpoints.write(&self.model, contents, average, record)?)
    }
}

impl InferenceStep for Trainee {
    type Input = Batch;
    type Output = StepReport;

    fn step(&self, batch: Batch) -> StepReport {
        let losses = self.losses(&batch);
        self.report(&batch, losses).0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_start_after_the_end_of_others() {
        let batch = Batch {
            windows: vec![vec![5, 1, 6, 1, 1, 7]],
            document_end: Some(1),
        };
        let starts = batch.first(&Device::flex()).unwrap();
        assert_eq!(
            starts.into_data().iter::<i32>().collect::<Vec<_>>(),
            [0, 0, 2, 2, 4]
        );
    }
}
