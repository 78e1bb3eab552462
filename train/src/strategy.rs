//! Training step by step, on one device or as a rank of several, as a strategy of Burn's Learner.
//!
//! Burn counts epochs; a run here counts steps. What Burn's events call an epoch is the stretch of steps between two
//! validations.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use burn::{
    data::dataloader::{DataLoaderIterator, Progress},
    module::Module,
    optim::{GradientsAccumulator, OptimizerRecord},
    tensor::Device,
    train::{
        EventProcessorTraining, InferenceStep, Interrupter, Learner, LearnerEvent, LearnerModel,
        SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainStep,
        TrainingComponents, TrainingItem, ValidLoader,
    },
};

use deepburn_kernels::awake::{Awake, awake};
use deepburn_model::config::ModelConfig;

use crate::{
    average::Average,
    config::{NonFinite, TrainConfig},
    learner::{Batch, Exchange},
    metrics::{MetricsLog, Record},
    report::StepReport,
    run::{TrainError, settings},
    spike::SpikeAction,
    state::{Checkpoints, Contents, History, RunState},
};

/// A model, or a part of one, that a run trains.
pub(crate) trait Trained:
    LearnerModel
    + TrainStep<Input = Batch, Output = StepReport>
    + InferenceStep<Input = Batch, Output = StepReport>
{
    /// What it trains.
    type Weights: Module + 'static;

    /// What the loop tells a step and the step tells the loop.
    fn exchange(&self) -> &Exchange;

    /// Whether to stop after the step under way: if this rank is asked to, or another.
    fn agree_to_stop(&self, asked: bool) -> Result<bool, TrainError>;

    /// What is here of the model.
    fn weights(&self) -> &Self::Weights;

    /// Writes a checkpoint of the whole model, which is without autodiff here, with the average of its weights, if one is
    /// kept, and returns where it is.
    fn save(
        &self,
        checkpoints: &Checkpoints,
        contents: Contents<'_>,
        average: Option<&Self::Weights>,
        record: OptimizerRecord,
    ) -> Result<PathBuf, TrainError>;
}

/// What a run changes.
pub(crate) struct Training<M: Trained> {
    pub(crate) learner: Learner<M>,
    /// Of the weights, if one is kept.
    pub(crate) average: Option<Average<M::Weights>>,
}

/// A run, as far as it does not depend on how many take part in it.
pub(crate) struct Plan {
    pub(crate) config: TrainConfig,
    pub(crate) shape: ModelConfig,
    pub(crate) data: crate::data::Prepared,
    /// Batches that a step takes: micro-batches on one device, one for all of them where ranks share them.
    pub(crate) batches: usize,
    /// The device of a run of one rank.
    pub(crate) alone_on: Option<Device>,
    /// Steps done before.
    pub(crate) done: u64,
    /// What happened in them.
    pub(crate) history: History,
    pub(crate) outcome: Arc<Mutex<Outcome>>,
}

/// What came of a run.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) steps: u64,
    pub(crate) validation: Option<StepReport>,
    pub(crate) checkpoint: Option<PathBuf>,
    pub(crate) error: Option<TrainError>,
}

/// Burn's strategy: the [`Plan`], with the events that metrics and dashboard live on.
pub(crate) struct StepByStep<W: Module> {
    pub(crate) plan: Arc<Plan>,
    /// With autodiff.
    pub(crate) device: Device,
    /// Of the weights, until it runs.
    pub(crate) average: Mutex<Option<Average<W>>>,
}

type Processor<M> = SupervisedTrainingEventProcessor<M>;

impl<M: Trained> SupervisedLearningStrategy<M> for StepByStep<M::Weights> {
    fn fit(
        &self,
        components: TrainingComponents<M>,
        mut learner: Learner<M>,
        train: TrainLoader<M>,
        valid: ValidLoader<M>,
        _: usize,
    ) -> (M, Processor<M>) {
        learner.fork(&self.device);
        let mut run = Run {
            plan: &self.plan,
            interrupter: components.interrupter,
            events: Some(components.event_processor),
            learner,
            valid,
            history: self.plan.history.clone(),
            average: self
                .average
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        };
        if let Err(error) = run.steps(train.iter()) {
            self.plan.outcome().error = Some(error);
        }
        let events = run.events.expect("given above");
        (run.learner.model(), events)
    }
}

impl Plan {
    pub(crate) fn outcome(&self) -> std::sync::MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a step says to the loop.
struct Stepped {
    report: StepReport,
    /// Whether a checkpoint is due.
    save: bool,
    /// Whether the run is asked to stop; then one is.
    stopping: bool,
}

/// The loop of a run on this rank.
pub(crate) struct Run<'a, M: Trained> {
    pub(crate) plan: &'a Plan,
    pub(crate) interrupter: Interrupter,
    /// `None` on ranks that nobody looks at: they neither report nor log.
    pub(crate) events: Option<Processor<M>>,
    pub(crate) learner: Learner<M>,
    pub(crate) valid: ValidLoader<M>,
    pub(crate) history: History,
    pub(crate) average: Option<Average<M::Weights>>,
}

impl<M: Trained> Run<'_, M> {
    pub(crate) fn steps(
        &mut self,
        mut batches: Box<dyn DataLoaderIterator<Batch> + '_>,
    ) -> Result<(), TrainError> {
        let Plan { config, done, .. } = self.plan;
        let (steps, interval) = (config.run.steps, config.validation.interval);
        let mut log = match &self.events {
            Some(_) => Some(MetricsLog::open(&config.run.directory, *done)?),
            None => None,
        };
        for step in *done..steps {
            let stretch = (step / interval + 1) as usize;
            let length = interval.min(steps - step / interval * interval) as usize;
            if step == *done || step.is_multiple_of(interval) {
                let split = LearnerEvent::StartSplit {
                    epoch_number: stretch,
                    total_items: length,
                };
                self.event(split);
            }
            let Stepped {
                report,
                save,
                stopping,
            } = self.step(step, &mut batches)?;
            if let Some(log) = &mut log {
                log.write(&Record::Train(report.clone()))?;
            }
            let progress =
                Progress::new((step % interval + 1) as usize, length, Some("steps".into()));
            let item = TrainingItem::new(
                report,
                progress,
                Some(step as usize + 1),
                Some(self.learner.lr_current()),
            );
            self.event(LearnerEvent::ProcessedItem(item));
            self.plan.outcome().steps = step + 1;

            let last = step + 1 == steps;
            if last || (step + 1).is_multiple_of(interval) {
                self.event(LearnerEvent::EndSplit(stretch));
                if !stopping || last {
                    let report = self.validate(stretch, step + 1)?;
                    if let Some(log) = &mut log {
                        log.write(&Record::Validation(report.clone()))?;
                    }
                    self.plan.outcome().validation = Some(report);
                }
                self.event(LearnerEvent::EndEpoch(stretch));
            }
            if save {
                self.save(step + 1)?;
            }
            if stopping {
                break;
            }
        }
        match &mut self.events {
            Some(events) => Ok(events.flush()?),
            None => Ok(()),
        }
    }

    /// One optimizer step.
    fn step(
        &mut self,
        step: u64,
        batches: &mut Box<dyn DataLoaderIterator<Batch> + '_>,
    ) -> Result<Stepped, TrainError> {
        let config = &self.plan.config;
        let _awake = self.awake();
        let exchange = self.learner.model().exchange().clone();
        let steps = config.run.steps;
        let due = step + 1 == steps || (step + 1).is_multiple_of(config.checkpoint.interval);
        let settings = settings(config, step);
        exchange.begin(settings);
        let started = Instant::now();
        let mut gradients = GradientsAccumulator::new();
        let mut reports = Vec::new();
        for _ in 0..self.plan.batches {
            let batch = batches.next().ok_or(TrainError::DataEnded { step })??;
            let output = self.learner.train_step(batch);
            exchange.check()?;
            if !output.item.loss.is_finite() {
                return Err(TrainError::NotFinite {
                    step: step + 1,
                    loss: output.item.loss,
                });
            }
            gradients.accumulate(&self.learner.model(), output.grads);
            reports.push(output.item);
        }
        let mean = StepReport::mean(&reports);
        let spike = config.optimizer.spike;
        if spike.action != SpikeAction::Off
            && self.history.spikes.observe(mean.loss, &spike)
            && spike.action == SpikeAction::Skip
        {
            exchange.leave_out();
        }
        // A stop is asked for at any time; the optimizer's state can be had only from within a step.
        let asked = self.interrupter.should_stop();
        let stopping = self.learner.model().agree_to_stop(asked)?;
        let save = due || stopping;
        if save {
            exchange.want_snapshot();
        }
        self.learner.lr_step();
        self.learner.optimizer_step(gradients.grads());
        exchange.check()?;
        let not_finite = exchange.not_finite();
        if !not_finite.is_empty() {
            if config.optimizer.non_finite == NonFinite::Halt {
                return Err(TrainError::NonFiniteGradients {
                    step: step + 1,
                    tensors: not_finite,
                });
            }
            self.history.skipped_steps += 1;
        }
        if let Some(average) = &mut self.average {
            let model = self.learner.model().valid();
            average.update(model.weights().clone());
        }
        let seconds = started.elapsed().as_secs_f64();

        let report = self.measured(mean).with_loads(&exchange.loads());
        let report = StepReport {
            step: step + 1,
            gradient_norm: Some(exchange.gradient_norm()).filter(|norm| norm.is_finite()),
            skipped_steps: Some(self.history.skipped_steps).filter(|steps| *steps > 0),
            spikes: Some(self.history.spikes.count()).filter(|spikes| *spikes > 0),
            learning_rate: Some(self.learner.lr_current().base()),
            bias_speed: Some(f64::from(settings.rule.gamma)),
            tokens_per_second: Some(report.predicted_tokens as f64 / seconds),
            memory_bytes: memory_stats::memory_stats().map(|memory| memory.physical_mem),
            ..report
        };
        Ok(Stepped {
            report,
            save,
            stopping,
        })
    }

    /// Keeps threads awake, but not those that several ranks share: they would take up a step of one within that of
    /// another, which waits for it.
    fn awake(&self) -> Option<Awake> {
        self.plan.alone_on.as_ref().map(awake)
    }

    fn measured(&self, report: StepReport) -> StepReport {
        let split = &self.plan.data.report.train;
        report.with_text_measures(split.bytes as f64 / split.tokens as f64)
    }

    fn validate(&mut self, stretch: usize, step: u64) -> Result<StepReport, TrainError> {
        let _awake = self.awake();
        let model = self.learner.model().valid();
        let total_items = self.valid.num_items();
        self.valid_event(LearnerEvent::StartSplit {
            epoch_number: stretch,
            total_items,
        });
        let split = &self.plan.data.report.valid;
        let bytes_per_token = split.bytes as f64 / split.tokens as f64;
        let mut reports = Vec::new();
        let valid = self.valid.clone();
        let mut batches = valid.iter();
        while let Some(batch) = batches.next() {
            let report = InferenceStep::step(&model, batch?).with_text_measures(bytes_per_token);
            model.exchange().check()?;
            reports.push(report.clone());
            let item = TrainingItem::new(report, batches.progress(), Some(reports.len()), None);
            self.valid_event(LearnerEvent::ProcessedItem(item));
        }
        self.valid_event(LearnerEvent::EndSplit(stretch));
        let report = StepReport::mean(&reports).with_text_measures(bytes_per_token);
        Ok(StepReport { step, ..report })
    }

    fn save(&mut self, step: u64) -> Result<(), TrainError> {
        let Plan {
            config,
            shape,
            data,
            ..
        } = self.plan;
        let model = self.learner.model().valid();
        let record = model
            .exchange()
            .take_snapshot()
            .ok_or(TrainError::NoSnapshot { step })?;
        let state = RunState {
            history: self.history.clone(),
            ..RunState::new(step, config, data)
        };
        let contents = Contents {
            shape,
            state: &state,
            config,
            tokenizer: &data.tokenizer_path,
        };
        let checkpoints = Checkpoints::new(&config.run.directory, config.checkpoint.keep);
        let average = self.average.as_mut().map(Average::model);
        let path = model.save(&checkpoints, contents, average, record)?;
        self.plan.outcome().checkpoint = Some(path);
        Ok(())
    }

    fn event(&mut self, event: LearnerEvent<StepReport>) {
        if let Some(events) = &mut self.events {
            self.interrupter.fail_on_error(events.process_train(event));
        }
    }

    fn valid_event(&mut self, event: LearnerEvent<StepReport>) {
        if let Some(events) = &mut self.events {
            self.interrupter.fail_on_error(events.process_valid(event));
        }
    }
}
