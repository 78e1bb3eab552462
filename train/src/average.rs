//! The exponential moving average of the weights, kept in the CPU's memory and brought up to date beside the next step
//! (report section 3.2.3).

use std::{collections::VecDeque, thread::JoinHandle};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{Device, Tensor},
};

/// An average of the parameters of a model, or of a rank's part of one, over steps.
///
/// It begins with the parameters themselves; after each step it is `decay` of what it was and `1 - decay` of what they
/// are, in single precision.
#[derive(Debug)]
pub struct Average<M: Module> {
    decay: f64,
    state: State<M>,
}

#[derive(Debug)]
enum State<M> {
    Still(Box<M>),
    /// A thread is bringing it up to date.
    Moving(JoinHandle<M>),
    /// Only while it changes hands.
    Taken,
}

impl<M: Module + 'static> Average<M> {
    /// An average that begins, or goes on, with the parameters of `model`.
    pub fn new(model: M, decay: f64) -> Self {
        let model = Box::new(model.to_device(&Device::flex()));
        Self {
            decay,
            state: State::Still(model),
        }
    }

    /// Begins to take in the parameters after a step, on a thread of its own; waits for the one before first.
    ///
    /// `model` is without autodiff. Its tensors are shared, not copied: an optimizer that updates in place copies what is
    /// still being read.
    pub fn update(&mut self, model: M) {
        let (average, decay) = (self.take(), self.decay);
        let moved = move || {
            zipped(average, &model, |average, weight| {
                average * decay + weight * (1.0 - decay)
            })
        };
        self.state = State::Moving(std::thread::spawn(moved));
    }

    /// The average of all that was taken in.
    pub fn model(&mut self) -> &M {
        self.state = State::Still(Box::new(self.take()));
        match &self.state {
            State::Still(model) => model,
            _ => unreachable!("it was just set"),
        }
    }

    fn take(&mut self) -> M {
        match std::mem::replace(&mut self.state, State::Taken) {
            State::Still(model) => *model,
            State::Moving(thread) => match thread.join() {
                Ok(model) => model,
                Err(panic) => std::panic::resume_unwind(panic),
            },
            State::Taken => unreachable!("nobody else has it"),
        }
    }
}

/// Waits for its thread, which may hold what has to end before the run does.
impl<M: Module> Drop for Average<M> {
    fn drop(&mut self) {
        if let State::Moving(thread) = std::mem::replace(&mut self.state, State::Taken) {
            // What it panicked with has been printed.
            let _ = thread.join();
        }
    }
}

/// The parameters of `module` with the values of another's of the same shape.
pub(crate) fn with_values<M: Module>(module: M, values: &M) -> M {
    zipped(module, values, |_, value| value)
}

/// What `f` makes of each parameter and that of another module of the same shape, both as vectors.
fn zipped<M: Module>(module: M, other: &M, f: impl Fn(Tensor<1>, Tensor<1>) -> Tensor<1>) -> M {
    /// Parameters in the order of the modules, as vectors: the rank of each is a type.
    struct Others(VecDeque<Tensor<1>>);

    impl ModuleVisitor for Others {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push_back(param.val().reshape([-1]));
        }
    }

    struct Zip<F> {
        others: VecDeque<Tensor<1>>,
        f: F,
    }

    impl<F: Fn(Tensor<1>, Tensor<1>) -> Tensor<1>> ModuleMapper for Zip<F> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let other = self.others.pop_front().expect("modules of one shape");
            param.map(|value| {
                let other = Tensor::<1>::from_data(other.into_data(), &value.device());
                let shape = value.dims();
                (self.f)(value.reshape([-1]), other).reshape(shape)
            })
        }
    }

    let mut others = Others(VecDeque::new());
    other.visit(&mut others);
    let others = others.0;
    module.map(&mut Zip { others, f })
}

#[cfg(test)]
mod tests {
    use deepburn_model::{checkpoint::hf_config, transformer::Transformer};

    use super::*;

    fn model(seed: u64) -> Transformer {
        let shape = include_str!("../../configs/model/tiny.json");
        Transformer::new(&hf_config::parse(shape).unwrap(), seed, &Device::flex())
    }

    fn parameters(model: &Transformer) -> Vec<Vec<f32>> {
        struct Values(Vec<Vec<f32>>);
        impl ModuleVisitor for Values {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.0.push(param.val().into_data().iter().collect());
            }
        }
        let mut values = Values(Vec::new());
        model.visit(&mut values);
        values.0
    }

    /// The weight of what it began with is the decay to the power of the steps; nothing corrects it.
    #[test]
    fn it_is_that_of_a_loop_over_numbers() {
        let models: Vec<_> = (0..4).map(model).collect();
        let mut average = Average::new(models[0].clone(), 0.75);
        let mut expected = parameters(&models[0]);
        for model in &models[1..] {
            average.update(model.clone());
            for (average, weights) in expected.iter_mut().zip(parameters(model)) {
                for (average, weight) in average.iter_mut().zip(weights) {
                    *average = *average * 0.75 + weight * 0.25;
                }
            }
        }
        assert_eq!(parameters(average.model()), expected);
        assert_ne!(parameters(&models[0]), expected);
    }

    #[test]
    fn a_model_that_changes_afterwards_is_not_seen() {
        let mut average = Average::new(model(0), 0.5);
        let next = model(1);
        average.update(next.clone());
        struct Zeros;
        impl ModuleMapper for Zeros {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                param.map(|weight| weight * 0.0)
            }
        }
        let zeros = next.map(&mut Zeros);
        let half = |a: f32, b: f32| a * 0.5 + b * 0.5;
        let mut expected = parameters(&model(0));
        for (sum, weights) in expected.iter_mut().zip(parameters(&model(1))) {
            sum.iter_mut()
                .zip(weights)
                .for_each(|(sum, weight)| *sum = half(*sum, weight));
        }
        assert_eq!(parameters(average.model()), expected);
        assert!(
            parameters(&zeros)
                .concat()
                .iter()
                .all(|weight| *weight == 0.0)
        );
    }
}
