//! Which experts a token goes to: group-limited top-k (report section 2.1.2, node-limited routing).

mod backward;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod flex;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod kernel;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod launch;
mod reference;
#[cfg(test)]
mod tests;

use burn::{
    backend::{
        Dispatch, backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Int, Tensor},
};

/// How many experts are chosen, and from how many groups of neighbouring experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupLimit {
    /// Experts chosen per token, K.
    pub experts_per_token: usize,
    /// Groups into which the experts are divided evenly, G.
    pub groups: usize,
    /// Groups from which a token's experts may come, M.
    pub groups_per_token: usize,
}

impl GroupLimit {
    /// Whether the limit can be met with `experts` experts: the rule that [`select_experts`] asserts.
    pub fn fits(&self, experts: usize) -> bool {
        self.groups > 0
            && experts.is_multiple_of(self.groups)
            && (1..=self.groups).contains(&self.groups_per_token)
            && (1..=self.groups_per_token * (experts / self.groups))
                .contains(&self.experts_per_token)
    }
}

/// How affinities become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighting {
    /// Whether a token's weights are divided by their sum.
    pub normalised: bool,
    /// What they are multiplied with in the end.
    pub scale: f64,
}

/// Added to the sum of the chosen affinities: keeps the division defined when all of them vanish, as upstream.
const SMALLEST_SUM: f64 = 1e-20;

/// Where tokens go.
#[derive(Clone, Debug)]
pub struct Routed {
    /// Expert indices, best first. `[T, K]`
    pub chosen: Tensor<2, Int>,
    /// Their weights, in the type of the logits. `[T, K]`
    pub weights: Tensor<2>,
}

/// Chooses the experts of every token and weighs them: affinities s = sigmoid(logits), experts by s + bias under
/// the rules of [`select_experts`], weights by s (report equations 12 to 16).
///
/// Computed in single precision for half types. Differentiable with respect to `logits` through the weights; the
/// choice is a constant of the backward pass, and no gradient reaches `bias`. One kernel on CubeCL devices for f32,
/// f16 and bf16, one pass on Flex for f32; elsewhere Burn's operations around [`select_experts`].
///
/// # Shapes
/// - `logits`: `[T, E]`, `bias`: `[E]`
///
/// # Panics
/// If the limit does not fit the number of experts ([`GroupLimit::fits`]), or the bias does not.
pub fn route(
    logits: Tensor<2>,
    bias: Tensor<1>,
    limit: GroupLimit,
    weighting: Weighting,
) -> Routed {
    let [_, experts] = logits.dims();
    assert_limit(limit, experts);
    assert!(
        bias.dims() == [experts],
        "a bias of {:?} for {experts} experts",
        bias.dims()
    );
    let bias = bias.detach();
    let (device, dtype) = (logits.device(), logits.dtype());
    let on_cube = experts <= MOST_EXPERTS && crate::cube::is_native(&device, dtype);
    if on_cube || crate::flex::is_native_f32(&device, dtype) {
        let (logits, bias) = (logits.into_dispatch(), bias.into_dispatch());
        let (chosen, weights) = Dispatch::choose_and_weigh(logits, bias, limit, weighting);
        return Routed {
            chosen: Tensor::from_dispatch(chosen),
            weights: Tensor::from_dispatch(weights),
        };
    }
    reference::route(logits, bias, limit, weighting)
}

/// Chooses the experts of every token.
///
/// A group's score is the sum of its two highest `choice` values (of its one value if it has one expert). The
/// `groups_per_token` best groups stay; every expert of the others is out, whatever its value (DeepSeek masks
/// with -inf: a mask of zero would let them in among negative values). Of the rest the `experts_per_token` best
/// are chosen, best first. Among equal values the lowest index wins, for groups and for experts. NaN counts as
/// -inf.
///
/// Not differentiable: the choice is a constant of the backward pass. Native on Flex for f32 and f64, on CubeCL
/// devices for f32.
///
/// # Shapes
/// - `choice`: `[T, E]`, affinity plus selection bias
/// - result: `[T, K]`, expert indices
///
/// # Panics
/// If the limit does not fit the number of experts ([`GroupLimit::fits`]).
pub fn select_experts(choice: Tensor<2>, limit: GroupLimit) -> Tensor<2, Int> {
    let [_, experts] = choice.dims();
    assert_limit(limit, experts);
    let choice = choice.detach();
    let (device, dtype) = (choice.device(), choice.dtype());
    let on_cube = experts <= MOST_EXPERTS && crate::cube::is_native_f32(&device, dtype);
    if on_cube || crate::flex::is_native(&device, dtype) {
        Tensor::from_dispatch(Dispatch::choose(choice.into_dispatch(), limit))
    } else {
        reference::select_experts(choice, limit)
    }
}

fn assert_limit(limit: GroupLimit, experts: usize) {
    assert!(
        limit.fits(experts),
        "{limit:?} cannot be met with {experts} experts"
    );
}

/// What the kernels for CubeCL devices serve: a token's scores are in shared memory, of which every device has 16 KiB.
const MOST_EXPERTS: usize = 1024;

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub(crate) trait RoutingOps: burn::backend::Backend {
    fn choose(choice: FloatTensor<Self>, limit: GroupLimit) -> IntTensor<Self>;
}

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub(crate) trait RouteOps: burn::backend::Backend {
    fn choose_and_weigh(
        logits: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        limit: GroupLimit,
        weighting: Weighting,
    ) -> (IntTensor<Self>, FloatTensor<Self>);
}

/// The gradient of [`RouteOps`], on backends without autodiff.
pub(crate) trait RouteGrad: burn::backend::Backend {
    /// The gradient with respect to the logits, given that of the weights.
    fn weigh_grad(
        grad: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        chosen: IntTensor<Self>,
        weighting: Weighting,
    ) -> FloatTensor<Self>;
}
