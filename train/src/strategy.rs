//! Training on one device, step by step, as a strategy of Burn's Learner.
//!
//! Burn counts epochs; a run here counts steps. What Burn's events call an epoch is the stretch of steps between two
//! validations.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use burn::{
    data::dataloader::{DataLoaderIterator, Progress},
    module::Module,
    optim::GradientsAccumulator,
    tensor::Device,
    train::{
        EventProcessorTraining, InferenceStep, Learner, LearnerEvent, SupervisedLearningStrategy,
        SupervisedTrainingEventProcessor, TrainLoader, TrainingComponents, TrainingItem,
        ValidLoader,
    },
};

use crate::{
    average::Average,
    config::{NonFinite, TrainConfig},
    learner::{Batch, Exchange, Trainee},
    metrics::{MetricsLog, Record},
    report::StepReport,
    run::{TrainError, settings},
    spike::SpikeAction,
    state::{Checkpoints, Contents, History, RunState},
};

/// A run on one device.
pub(crate) struct SingleDevice {
    pub(crate) device: Device,
    pub(crate) config: TrainConfig,
    pub(crate) shape: deepburn_model::config::ModelConfig,
    pub(crate) data: crate::data::Prepared,
    pub(crate) exchange: Exchange,
    /// Steps done before.
    pub(crate) done: u64,
    /// What happened in them.
    pub(crate) history: History,
    /// Of the weights, for as long as nothing runs.
    pub(crate) average: Mutex<Option<Average>>,
    pub(crate) outcome: Arc<Mutex<Outcome>>,
}

/// What came of a run.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) steps: u64,
    pub(crate) validation: Option<StepReport>,
    pub(crate) checkpoint: Option<std::path::PathBuf>,
    pub(crate) error: Option<TrainError>,
}

type Processor = SupervisedTrainingEventProcessor<Trainee>;

impl SupervisedLearningStrategy<Trainee> for SingleDevice {
    fn fit(
        &self,
        components: TrainingComponents<Trainee>,
        mut learner: Learner<Trainee>,
        train: TrainLoader<Trainee>,
        valid: ValidLoader<Trainee>,
        _: usize,
    ) -> (Trainee, Processor) {
        learner.fork(&self.device);
        let mut run = Run {
            strategy: self,
            interrupter: components.interrupter,
            processor: components.event_processor,
            learner,
            valid,
            history: self.history.clone(),
            average: self
                .average
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        };
        if let Err(error) = run.steps(train.iter()) {
            self.outcome().error = Some(error);
        }
        (run.learner.model(), run.processor)
    }
}

impl SingleDevice {
    fn outcome(&self) -> std::sync::MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Run<'a> {
    strategy: &'a SingleDevice,
    interrupter: burn::train::Interrupter,
    processor: Processor,
    learner: Learner<Trainee>,
    valid: ValidLoader<Trainee>,
    history: History,
    average: Option<Average>,
}

impl Run<'_> {
    fn steps(
        &mut self,
        mut batches: Box<dyn DataLoaderIterator<Batch> + '_>,
    ) -> Result<(), TrainError> {
        let SingleDevice { config, done, .. } = self.strategy;
        let (steps, interval) = (config.run.steps, config.validation.interval);
        let mut log = MetricsLog::open(&config.run.directory, *done)?;
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
            let (report, save) = self.step(step, &mut batches)?;
            log.write(&Record::Train(report.clone()))?;
            let progress =
                Progress::new((step % interval + 1) as usize, length, Some("steps".into()));
            let item = TrainingItem::new(
                report,
                progress,
                Some(step as usize + 1),
                Some(self.learner.lr_current()),
            );
            self.event(LearnerEvent::ProcessedItem(item));
            self.strategy.outcome().steps = step + 1;

            let last = step + 1 == steps;
            let stopping = self.interrupter.should_stop();
            if last || (step + 1).is_multiple_of(interval) {
                self.event(LearnerEvent::EndSplit(stretch));
                if !stopping || last {
                    let report = self.validate(stretch, step + 1)?;
                    log.write(&Record::Validation(report.clone()))?;
                    self.strategy.outcome().validation = Some(report);
                }
                self.event(LearnerEvent::EndEpoch(stretch));
            }
            if save {
                self.save(step + 1)?;
            }
            if stopping && save {
                break;
            }
        }
        Ok(self.processor.flush()?)
    }

    /// One optimizer step; the flag says whether a checkpoint is due.
    fn step(
        &mut self,
        step: u64,
        batches: &mut Box<dyn DataLoaderIterator<Batch> + '_>,
    ) -> Result<(StepReport, bool), TrainError> {
        let SingleDevice {
            config, exchange, ..
        } = self.strategy;
        let steps = config.run.steps;
        let due = step + 1 == steps || (step + 1).is_multiple_of(config.checkpoint.interval);
        let settings = settings(config, step);
        exchange.begin(settings);
        let started = Instant::now();
        let mut gradients = GradientsAccumulator::new();
        let mut reports = Vec::new();
        for _ in 0..config.batch.accumulation {
            let batch = batches.next().ok_or(TrainError::DataEnded { step })??;
            let output = self.learner.train_step(batch);
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
        let save = due || self.interrupter.should_stop();
        if save {
            exchange.want_snapshot();
        }
        self.learner.lr_step();
        self.learner.optimizer_step(gradients.grads());
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
            average.update(self.learner.model().valid().model);
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
        Ok((report, save))
    }

    fn measured(&self, report: StepReport) -> StepReport {
        let split = &self.strategy.data.report.train;
        report.with_text_measures(split.bytes as f64 / split.tokens as f64)
    }

    fn validate(&mut self, stretch: usize, step: u64) -> Result<StepReport, TrainError> {
        let model = self.learner.model().valid();
        let total_items = self.valid.num_items();
        self.valid_event(LearnerEvent::StartSplit {
            epoch_number: stretch,
            total_items,
        });
        let split = &self.strategy.data.report.valid;
        let bytes_per_token = split.bytes as f64 / split.tokens as f64;
        let mut reports = Vec::new();
        let valid = self.valid.clone();
        let mut batches = valid.iter();
        while let Some(batch) = batches.next() {
            let report = InferenceStep::step(&model, batch?).with_text_measures(bytes_per_token);
            reports.push(report.clone());
            let item = TrainingItem::new(report, batches.progress(), Some(reports.len()), None);
            self.valid_event(LearnerEvent::ProcessedItem(item));
        }
        self.valid_event(LearnerEvent::EndSplit(stretch));
        let report = StepReport::mean(&reports).with_text_measures(bytes_per_token);
        Ok(StepReport { step, ..report })
    }

    fn save(&mut self, step: u64) -> Result<(), TrainError> {
        let SingleDevice {
            config,
            shape,
            data,
            exchange,
            ..
        } = self.strategy;
        let record = exchange
            .take_snapshot()
            .ok_or(TrainError::NoSnapshot { step })?;
        let model = self.learner.model().valid().model;
        let state = RunState {
            history: self.history.clone(),
            ..RunState::new(step, config, data)
        };
        let contents = Contents {
            model: &model,
            average: self.average.as_mut().map(Average::model),
            shape,
            state: &state,
            config,
            tokenizer: &data.tokenizer_path,
        };
        let checkpoints = Checkpoints::new(&config.run.directory, config.checkpoint.keep);
        self.strategy.outcome().checkpoint = Some(checkpoints.write(contents, record)?);
        Ok(())
    }

    fn event(&mut self, event: LearnerEvent<StepReport>) {
        self.interrupter
            .fail_on_error(self.processor.process_train(event));
    }

    fn valid_event(&mut self, event: LearnerEvent<StepReport>) {
        self.interrupter
            .fail_on_error(self.processor.process_valid(event));
    }
}
