//! Moving tokens into expert order and back.

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
    tensor::{Device, Int, Tensor, TensorData},
};

/// Where each of the `T * K` (token, choice) pairs stands when they are sorted by expert.
///
/// Pairs of the same expert keep their order, so results do not depend on the device.
#[derive(Clone, Debug)]
pub struct Permutation {
    /// The pair `token * K + choice` at each row in expert order; `T * K`, which is none, at rows that only pad a
    /// segment and behind the last one. `[R]`, R = T K without padding.
    pub order: Tensor<1, Int>,
    /// The row in expert order of each pair; the inverse of `order`. `[T, K]`
    pub slots: Tensor<2, Int>,
    /// Pairs of each expert, its load. `[E]`
    pub counts: Tensor<1, Int>,
    /// Rows of each expert's segment, its load rounded up to a multiple of the tile. `[E]`
    pub rows: Tensor<1, Int>,
    /// What segments are padded to a multiple of.
    pub tile: usize,
}

impl Permutation {
    /// Sorts pairs by expert. Native on Flex and on CubeCL devices, where the host reads nothing.
    ///
    /// # Shapes
    /// - `chosen`: `[T, K]`, expert indices below `experts`
    pub fn by_expert(chosen: Tensor<2, Int>, experts: usize) -> Self {
        Self::by_expert_padded(chosen, experts, 1)
    }

    /// As [`by_expert`](Self::by_expert), with every expert's segment padded to a multiple of `tile` rows. There are as
    /// many rows as the worst load needs, because the host does not know the load.
    ///
    /// # Shapes
    /// - `chosen`: `[T, K]`, expert indices below `experts`
    ///
    /// # Panics
    /// If `tile` is zero.
    pub fn by_expert_padded(chosen: Tensor<2, Int>, experts: usize, tile: usize) -> Self {
        assert!(tile > 0, "segments are padded to a multiple of zero");
        let (dims, device) = (chosen.dims(), chosen.device());
        let on_cube = experts <= MOST_EXPERTS && crate::cube::is_cube(&device);
        if !on_cube && !crate::flex::is_flex(&device) {
            return reference::sort_by_expert(chosen, experts, tile);
        }
        let (order, slots, counts, rows) =
            Dispatch::sort_by_expert(chosen.into_dispatch(), experts, tile);
        Self {
            order: Tensor::from_dispatch(order),
            slots: Tensor::<1, Int>::from_dispatch(slots).reshape(dims),
            counts: Tensor::from_dispatch(counts),
            rows: Tensor::from_dispatch(rows),
            tile,
        }
    }

    /// Sorts pairs that the host knows. Those of no expert stand in no segment: nothing is computed for them, and they add
    /// nothing to what is combined, whatever their weight.
    ///
    /// # Shapes
    /// - `chosen`: `[T * K]`, `k` for each token
    ///
    /// # Panics
    /// If `tile` or `k` is zero or does not divide `chosen`.
    pub fn of_known(
        chosen: &[Option<usize>],
        k: usize,
        experts: usize,
        tile: usize,
        device: &Device,
    ) -> Self {
        assert!(
            tile > 0 && k > 0 && chosen.len().is_multiple_of(k),
            "{} pairs, {k} for a token, in segments of multiples of {tile}",
            chosen.len()
        );
        let mut counts = vec![0usize; experts];
        for expert in chosen.iter().flatten() {
            counts[*expert] += 1;
        }
        let rows: Vec<usize> = counts.iter().map(|n| n.next_multiple_of(tile)).collect();
        let mut next: Vec<usize> = (0..experts).map(|e| rows[..e].iter().sum()).collect();
        let all: usize = rows.iter().sum();
        // Pairs of no expert share a row of zeros behind the last segment.
        let mut order = vec![chosen.len() as i32; all + tile];
        let slots = chosen.iter().enumerate().map(|(pair, expert)| {
            let Some(expert) = *expert else {
                return all as i32;
            };
            let slot = next[expert];
            next[expert] += 1;
            order[slot] = pair as i32;
            slot as i32
        });
        let slots: Vec<i32> = slots.collect();
        let list = |values: Vec<i32>| {
            let length = values.len();
            Tensor::<1, Int>::from_data(TensorData::new(values, [length]), device)
        };
        let narrow = |values: Vec<usize>| values.into_iter().map(|n| n as i32).collect();
        Self {
            order: list(order),
            slots: list(slots).reshape([chosen.len() / k, k]),
            counts: list(narrow(counts)),
            rows: list(narrow(rows)),
            tile,
        }
    }

    /// Tokens and choices per token, `[T, K]`.
    pub fn dims(&self) -> [usize; 2] {
        self.slots.dims()
    }
}

/// The rows that `pairs` need in the worst case: all experts that can have a pair lack `tile - 1` rows.
fn padded_rows(pairs: usize, experts: usize, tile: usize) -> usize {
    (pairs + experts.min(pairs) * (tile - 1)) / tile * tile
}

/// What the sort on CubeCL devices serves: the sizes of all segments are in shared memory, of which every device has
/// 16 KiB.
const MOST_EXPERTS: usize = 4096;

/// Copies each token's row to its places in expert order; rows that pad are zero. Native on Flex for f32 and f64, on
/// CubeCL devices for f32, f16 and bf16.
///
/// # Shapes
/// - `x`: `[T, D]`
/// - result: `[R, D]`
///
/// # Panics
/// If `x` does not have the permutation's number of tokens.
pub fn permute(x: Tensor<2>, permutation: &Permutation) -> Tensor<2> {
    let ([tokens, _], [expected, _]) = (x.dims(), permutation.dims());
    assert!(
        tokens == expected,
        "{tokens} tokens for a permutation of {expected}"
    );
    if is_native(&x) {
        Tensor::from_dispatch(Dispatch::permute_rows(
            x.into_dispatch(),
            permutation.order.clone().into_dispatch(),
            permutation.slots.clone().into_dispatch(),
        ))
    } else {
        reference::permute(x, permutation)
    }
}

/// Sums each token's rows back from expert order, weighted: the inverse movement of [`permute`]. Rows that pad are
/// ignored. Native as `permute`; half types are summed in single precision there.
///
/// # Shapes
/// - `y`: `[R, D]`
/// - `weights`: `[T, K]`
/// - result: `[T, D]`
///
/// # Panics
/// If sizes do not fit the permutation, or types each other.
pub fn combine(y: Tensor<2>, weights: Tensor<2>, permutation: &Permutation) -> Tensor<2> {
    let ([rows, _], [expected]) = (y.dims(), permutation.order.dims());
    assert!(
        rows == expected && weights.dims() == permutation.dims(),
        "{rows} rows and weights {:?} for a permutation of {expected} and {:?}",
        weights.dims(),
        permutation.dims()
    );
    assert!(
        y.dtype() == weights.dtype(),
        "rows in {:?} with weights in {:?}",
        y.dtype(),
        weights.dtype()
    );
    if is_native(&y) {
        Tensor::from_dispatch(Dispatch::combine_rows(
            y.into_dispatch(),
            weights.into_dispatch(),
            permutation.order.clone().into_dispatch(),
            permutation.slots.clone().into_dispatch(),
        ))
    } else {
        reference::combine(y, weights, permutation)
    }
}

fn is_native(rows: &Tensor<2>) -> bool {
    let (device, dtype) = (rows.device(), rows.dtype());
    crate::flex::is_native(&device, dtype) || crate::cube::is_native(&device, dtype)
}

/// `order`, `slots`, `counts` and `rows` of a [`Permutation`], all of one dimension.
pub(crate) type Sorted<I> = (I, I, I, I);

#[backend_extension(Cube: cfg(any(feature = "wgpu", feature = "cuda")), Flex, Autodiff)]
pub(crate) trait PermuteOps: burn::backend::Backend {
    fn sort_by_expert(
        chosen: IntTensor<Self>,
        experts: usize,
        tile: usize,
    ) -> (
        IntTensor<Self>,
        IntTensor<Self>,
        IntTensor<Self>,
        IntTensor<Self>,
    );

    fn permute_rows(
        x: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self>;

    fn combine_rows(
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// The gradients of [`PermuteOps`], on backends without autodiff.
pub(crate) trait PermuteGrad: burn::backend::Backend {
    /// The gradient of `permute_rows`: each token's sum of its rows' gradients.
    fn permute_rows_grad(grad: FloatTensor<Self>, slots: IntTensor<Self>) -> FloatTensor<Self>;

    /// The gradients of `combine_rows` with respect to `y` and to `weights`.
    fn combine_rows_grad(
        grad: FloatTensor<Self>,
        y: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        order: IntTensor<Self>,
        slots: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}
