//! `reference_grads.safetensors`: the gradient of every parameter, by the names of Hugging Face.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Gradients, Int, Tensor},
};
use deepburn_model::{
    attention::AttentionMask,
    checkpoint::hf_names::{Stored, stored},
    loss::cross_entropy,
    parameters::ModulePath,
    transformer::Transformer,
};

use super::{
    Subject,
    comparison::{Comparison, values},
    reference::ReferenceFile,
    report::Report,
    tolerance, training,
};

/// The name of the file.
pub(super) const FILE: &str = "reference_grads.safetensors";

/// Tensors as a checkpoint stores them: shape and elements by name.
pub(super) type Named = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Recomputes the gradients of the first batch's loss.
pub(super) fn verify(subject: &Subject, report: &mut Report) -> anyhow::Result<()> {
    let file = ReferenceFile::read(subject.dir, FILE)?;
    let (model, device) = subject.trainable()?;
    let input = ReferenceFile::read(subject.dir, training::FILE)?;
    let tokens = training::batch(&input, 0, subject.config.vocab_size, &device)?;
    let loss = next_token_loss(&model, &tokens);
    let found = of_loss(&model, subject.config.num_hidden_layers, loss);
    compare(&file, report, &found)
}

/// Mean cross-entropy of each token but the first.
fn next_token_loss(model: &Transformer, tokens: &Tensor<2, Int>) -> Tensor<1> {
    let [_, length] = tokens.dims();
    let mask = AttentionMask::causal(length, &tokens.device());
    let hidden = model.forward(tokens.clone(), &mask).hidden;
    let logits = model.logits(hidden.narrow(1, 0, length - 1));
    cross_entropy(logits, tokens.clone().narrow(1, 1, length - 1))
}

/// Compares every gradient of a file.
pub(super) fn compare(
    file: &ReferenceFile,
    report: &mut Report,
    found: &Named,
) -> anyhow::Result<()> {
    let mut comparison = Comparison::new(file, report, &[]);
    for (name, (shape, values)) in found {
        comparison.floats(name, shape, values, tolerance::GRADIENT)?;
    }
    comparison.finish();
    Ok(())
}

/// The gradients of `loss`; zero for parameters that it does not depend on.
pub(super) fn of_loss(model: &Transformer, layers: usize, loss: Tensor<1>) -> Named {
    collect(model, layers, Some(loss.backward()))
}

/// The parameters themselves.
pub(super) fn parameters(model: &Transformer, layers: usize) -> Named {
    collect(model, layers, None)
}

fn collect(model: &Transformer, layers: usize, gradients: Option<Gradients>) -> Named {
    struct Collector {
        path: ModulePath,
        layers: usize,
        gradients: Option<Gradients>,
        found: Named,
    }
    impl ModuleVisitor for Collector {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, container: &str) {
            self.path.exit(container);
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = match &self.gradients {
                None => param.val(),
                Some(gradients) => {
                    let value = param.val();
                    let gradient = value.grad(gradients);
                    gradient.unwrap_or_else(|| value.detach().zeros_like())
                }
            };
            let mut shape = tensor.dims().to_vec();
            match stored(&self.path.join(), self.layers) {
                Stored::AsIs(name) => {
                    self.found.insert(name, (shape, values(tensor)));
                }
                Stored::Transposed(name) => {
                    shape.reverse();
                    self.found.insert(name, (shape, values(tensor.transpose())));
                }
                Stored::Experts { prefix, suffix } => {
                    let one = vec![shape[2], shape[1]];
                    let all = values(tensor.transpose());
                    for (expert, values) in all.chunks(shape[1] * shape[2]).enumerate() {
                        let name = format!("{prefix}{expert}{suffix}");
                        self.found.insert(name, (one.clone(), values.to_vec()));
                    }
                }
            }
        }
    }
    let mut collector = Collector {
        path: ModulePath::default(),
        layers,
        gradients,
        found: Named::new(),
    };
    model.visit(&mut collector);
    collector.found
}
