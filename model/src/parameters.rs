//! Parameters by name: listing and counting without allocating them.

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::Tensor,
};

use crate::config::ModelConfig;

/// A parameter of a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Names of the fields that lead to it, joined by dots; enum variants have no name here.
    pub path: String,
    /// Its sizes, as stored in the module.
    pub shape: Vec<usize>,
}

impl Parameter {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// All float parameters of a module, in order. Lazy ones stay so.
pub fn list(module: &impl Module) -> Vec<Parameter> {
    identified(module)
        .into_iter()
        .map(|(_, parameter)| parameter)
        .collect()
}

/// The parameters of a whole model by their identity, which follows from their names (see [`crate::init`]): what a
/// parameter is called is known also in a part of the model, where other fields lead to it.
#[derive(Clone, Debug)]
pub struct Registry(HashMap<u64, (usize, Parameter)>);

impl Registry {
    /// Of a whole model, whose lazy parameters stay so.
    pub fn of(model: &impl Module) -> Self {
        let numbered = identified(model).into_iter().enumerate();
        Self(
            numbered
                .map(|(at, (id, parameter))| (id.val(), (at, parameter)))
                .collect(),
        )
    }

    /// The name of a parameter of the model.
    pub fn path(&self, id: ParamId) -> Option<&str> {
        let (_, parameter) = self.0.get(&id.val())?;
        Some(&parameter.path)
    }

    /// The identities, as numbers, of the parameters of a part of the model.
    pub fn held(&self, part: &impl Module) -> impl Iterator<Item = u64> {
        identified(part).into_iter().map(|(id, _)| id.val())
    }

    /// The place of a parameter among all of the model, from 0.
    pub fn place(&self, id: ParamId) -> Option<usize> {
        self.0.get(&id.val()).map(|(place, _)| *place)
    }
}

fn identified(module: &impl Module) -> Vec<(ParamId, Parameter)> {
    #[derive(Default)]
    struct Lister {
        path: ModulePath,
        found: Vec<(ParamId, Parameter)>,
    }
    impl ModuleVisitor for Lister {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }
        fn exit_module(&mut self, _: &str, container: &str) {
            self.path.exit(container);
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let parameter = Parameter {
                path: self.path.join(),
                shape: param.lazy_shape().to_vec(),
            };
            self.found.push((param.id, parameter));
        }
    }
    let mut lister = Lister::default();
    module.visit(&mut lister);
    lister.found
}

/// The names on the way to a parameter, as a visitor or mapper meets them.
#[derive(Clone, Debug, Default)]
pub struct ModulePath(Vec<String>);

impl ModulePath {
    /// To be called from `enter_module`.
    pub fn enter(&mut self, name: &str, container: &str) {
        if !is_variant(container) {
            self.0.push(name.to_owned());
        }
    }

    /// To be called from `exit_module`.
    pub fn exit(&mut self, container: &str) {
        if !is_variant(container) {
            self.0.pop();
        }
    }

    /// The names joined by dots.
    pub fn join(&self) -> String {
        self.0.join(".")
    }
}

/// Burn enters enums by the name of their variant.
fn is_variant(container: &str) -> bool {
    container.starts_with("Enum:")
}

/// Parameters by part of the model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParameterCount {
    /// Embedding matrix.
    pub embedding: usize,
    /// Output head; zero where it shares the embedding matrix.
    pub head: usize,
    /// Attention of all layers.
    pub attention: usize,
    /// Dense feed-forward parts.
    pub dense: usize,
    /// Routed experts.
    pub routed_experts: usize,
    /// Shared experts.
    pub shared_experts: usize,
    /// Routers with their selection biases.
    pub routers: usize,
    /// Norms outside attention.
    pub norms: usize,
    /// Multi-token prediction modules without the shared embedding and head; in none of the sums below.
    pub mtp: usize,
    /// Of `routed_experts`, those that one token uses.
    pub active_experts: usize,
}

impl ParameterCount {
    /// Counts a model of the given shape.
    pub fn of(parameters: &[Parameter], config: &ModelConfig) -> Self {
        let mut count = Self::default();
        for parameter in parameters {
            let path = parameter.path.as_str();
            let part = if path.starts_with("mtp.") {
                &mut count.mtp
            } else if path.starts_with("embed_tokens.") {
                &mut count.embedding
            } else if path.starts_with("lm_head.") {
                &mut count.head
            } else if path.contains(".self_attn.") {
                &mut count.attention
            } else if path.contains(".mlp.experts.") {
                &mut count.routed_experts
            } else if path.contains(".mlp.shared_experts.") {
                &mut count.shared_experts
            } else if path.contains(".mlp.gate.") {
                &mut count.routers
            } else if path.contains(".mlp.") {
                &mut count.dense
            } else {
                &mut count.norms
            };
            *part += parameter.len();
        }
        count.active_experts =
            count.routed_experts / config.n_routed_experts * config.num_experts_per_tok;
        count
    }

    /// All parameters of the main model, embedding and head included, MTP modules apart.
    pub fn total(&self) -> usize {
        self.embedding + self.head + self.per_token_fixed() + self.routed_experts
    }

    /// Parameters that one token is multiplied with: as [`ParameterCount::total`], but only its chosen experts, and
    /// the embedding, a lookup of one row, only where it is also the head.
    pub fn active(&self) -> usize {
        let head = if self.head == 0 {
            self.embedding
        } else {
            self.head
        };
        head + self.per_token_fixed() + self.active_experts
    }

    fn per_token_fixed(&self) -> usize {
        self.attention + self.dense + self.shared_experts + self.routers + self.norms
    }
}
