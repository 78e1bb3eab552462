//! How tokens come to their experts and back: on one device by sorting rows, over several by sending them.

use std::fmt::Debug;

use burn::tensor::{Int, Tensor};
use deepburn_kernels::permute::{combine, permute};

use super::{Experts, Routing};

/// Brings tokens to the experts that they were routed to.
pub trait TokenDispatcher: Debug + Send + Sync {
    /// Begins. What else is computed before [`Dispatch::finish`] overlaps with tokens on their way.
    ///
    /// # Shapes
    /// - `tokens`: `[T, D]`
    fn dispatch(&self, tokens: Tensor<2>, routing: &Routing) -> Box<dyn Dispatch>;
}

/// Tokens on their way.
pub trait Dispatch {
    /// Applies the experts that this device has to the tokens that come to it, and gathers the results of the tokens that
    /// were sent.
    fn finish(self: Box<Self>, experts: &Experts) -> Dispatched;
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Dispatched {
    /// The weighted sum of each token's experts. `[T, D]`
    pub hidden: Tensor<2>,
    /// How many of these tokens went to each expert of the layer. `[E]`
    pub load: Tensor<1, Int>,
}

/// All experts are here.
#[derive(Clone, Copy, Debug)]
pub struct LocalDispatcher;

struct LocalDispatch {
    tokens: Tensor<2>,
    routing: Routing,
}

impl TokenDispatcher for LocalDispatcher {
    fn dispatch(&self, tokens: Tensor<2>, routing: &Routing) -> Box<dyn Dispatch> {
        let routing = routing.clone();
        Box::new(LocalDispatch { tokens, routing })
    }
}

impl Dispatch for LocalDispatch {
    fn finish(self: Box<Self>, experts: &Experts) -> Dispatched {
        let Routing {
            chosen, weights, ..
        } = self.routing;
        let order = experts.order(chosen);
        let outputs = experts.forward(permute(self.tokens, &order), &order);
        Dispatched {
            hidden: combine(outputs, weights, &order),
            load: order.counts,
        }
    }
}
