//! FP8 products made worse on purpose, so that a comparison of precisions can be seen failing: what the report's recipe
//! avoids (section 3.3.2), one piece at a time. For experiments on the CPU in f32.

use burn::{
    backend::{
        Autodiff, Dispatch, Flex,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops, OpsKind},
        },
        backend_extension,
        tensor::{FloatTensor, IntTensor},
    },
    tensor::{Device, Int, Tensor},
};
use rayon::prelude::*;

use super::{
    ScaleFormat, TILE, Tile,
    e4m3::{decode, encode},
    tiles::{by_tile, dequantize, largest, quantize, scales},
};
use crate::{
    flex::{contiguous, dims, elements, float_tensor, indices, is_flex, is_native_f32},
    gemm::{Into, Matrix, multiply, product},
    permute::Permutation,
    vector::vectorized,
};

/// What is done worse. All else is as in [`linear`](super::linear()), but for the order of sums in single precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ablation {
    /// One scale for a whole matrix of activations, gradients or weights, an expert's being one each.
    PerTensor,
    /// Weights in E5M2, which has one bit of the mantissa less.
    E5m2Weights,
    /// Sums as Hopper's tensor cores leave them without promotion: after every 32 products what was summed so far keeps
    /// 14 bits, the others are cut off. Scales stay those of the tiles, so that only the sums differ.
    NoPromotion,
}

/// How products are computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recipe {
    format: ScaleFormat,
    ablation: Ablation,
}

/// Whether there are ablated products on `device`.
pub fn is_supported(device: &Device) -> bool {
    is_flex(device)
}

/// [`linear`](super::linear()), worse, forward and backward.
///
/// # Shapes
/// - `x`: `[M, K]`, `weight`: `[K, N]`
/// - result: `[M, N]`
///
/// # Panics
/// If inner sizes differ, or elsewhere than on the CPU in f32.
pub fn linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    format: ScaleFormat,
    ablation: Ablation,
) -> Tensor<2> {
    let [rows, _] = x.dims();
    let all = Tensor::from_data([rows as i32], &x.device());
    by_segment(x, weight.unsqueeze(), all, Recipe { format, ablation })
}

/// [`grouped_linear`](super::grouped_linear), worse, forward and backward.
///
/// # Shapes
/// - `x`: `[R, K]` in the order of `order`, `weights`: `[E, K, N]`
/// - result: `[R, N]`
///
/// # Panics
/// As [`linear`].
pub fn grouped_linear(
    x: Tensor<2>,
    weights: Tensor<3>,
    order: &Permutation,
    format: ScaleFormat,
    ablation: Ablation,
) -> Tensor<2> {
    by_segment(x, weights, order.rows.clone(), Recipe { format, ablation })
}

fn by_segment(
    x: Tensor<2>,
    weights: Tensor<3>,
    counts: Tensor<1, Int>,
    recipe: Recipe,
) -> Tensor<2> {
    assert_eq!(x.dims()[1], weights.dims()[1], "inner sizes differ");
    assert!(
        is_native_f32(&x.device(), x.dtype()),
        "ablated FP8 products are computed on the CPU in f32"
    );
    Tensor::from_dispatch(Dispatch::ablated_linear(
        x.into_dispatch(),
        weights.into_dispatch(),
        counts.into_dispatch(),
        recipe,
    ))
}

#[backend_extension(Flex, Autodiff)]
pub(crate) trait AblationOps: burn::backend::Backend {
    /// `x_e W_e`: the rows of `x`, as many for each matrix of `weights` as `counts` says.
    fn ablated_linear(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        recipe: Recipe,
    ) -> FloatTensor<Self>;
}

/// The gradients of [`AblationOps`], on backends without autodiff.
pub(crate) trait AblationGrad: burn::backend::Backend {
    /// `dy_e W_e^T` and `x_e^T dy_e`.
    fn ablated_grads(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        recipe: Recipe,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl AblationOps for Flex {
    fn ablated_linear(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        recipe: Recipe,
    ) -> FloatTensor<Self> {
        let ([rows, _], [_, k, n]) = (dims(&x), dims(&weights));
        let (x, weights) = (contiguous(x), contiguous(weights));
        let mut x = elements::<f32>(&x);
        let mut y = Vec::with_capacity(rows * n);
        let matrices = elements::<f32>(&weights).chunks(k * n);
        for (count, weight) in indices(&counts).into_iter().zip(matrices) {
            let segment = x.split_off(..count * k).expect("as many rows as counted");
            y.extend(recipe.product(segment, &transposed(weight, n), k, Tile::Block));
        }
        float_tensor(y, [rows, n])
    }
}

impl AblationGrad for Flex {
    fn ablated_grads(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        recipe: Recipe,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let ([rows, _], [experts, k, n]) = (dims(&x), dims(&weights));
        let [grad, x, weights] = [grad, x, weights].map(contiguous);
        let (mut grad, mut x) = (elements::<f32>(&grad), elements::<f32>(&x));
        let mut of_x = Vec::with_capacity(rows * k);
        let mut of_weights = Vec::with_capacity(experts * k * n);
        let matrices = elements::<f32>(&weights).chunks(k * n);
        for (count, weight) in indices(&counts).into_iter().zip(matrices) {
            let x = x.split_off(..count * k).expect("as many rows as counted");
            let grad = grad.split_off(..count * n).expect("as many rows");
            of_x.extend(recipe.product(grad, weight, n, Tile::Block));
            let (x, grad) = (transposed(x, k), transposed(grad, n));
            match count {
                0 => of_weights.resize(of_weights.len() + k * n, 0.0),
                _ => of_weights.extend(recipe.product(&x, &grad, count, Tile::Row)),
            }
        }
        (
            float_tensor(of_x, [rows, k]),
            float_tensor(of_weights, [experts, k, n]),
        )
    }
}

impl Recipe {
    /// `a b^T` of matrices with rows of `inner`, quantised first: `a` in rows' tiles, `b` in rows' tiles or blocks.
    fn product(self, a: &[f32], b: &[f32], inner: usize, b_tile: Tile) -> Vec<f32> {
        if a.is_empty() {
            return Vec::new();
        }
        let (a, b) = (
            self.rounded(a, inner, Tile::Row),
            self.rounded(b, inner, b_tile),
        );
        if self.ablation == Ablation::NoPromotion {
            return short_sums(&a, &b, inner);
        }
        let a = Matrix::of(&a, a.len() / inner, inner);
        product(a, Matrix::of(&b, b.len() / inner, inner).transposed())
    }

    /// The matrix that codes and scales stand for.
    fn rounded(self, values: &[f32], columns: usize, tile: Tile) -> Vec<f32> {
        let format = match tile {
            Tile::Row => self.format,
            Tile::Block => ScaleFormat::Float32,
        };
        if self.ablation == Ablation::PerTensor {
            let scale = tile.scale(largest(values), format);
            let rounded = values
                .par_iter()
                .map(|value| decode(encode(value / scale)) * scale);
            return rounded.collect();
        }
        let as_e5m2 = self.ablation == Ablation::E5m2Weights && tile == Tile::Block;
        let rounded = |values: &[f32]| {
            let mut factors = scales(values, columns, tile, format);
            if !as_e5m2 {
                let codes = quantize(values, columns, tile, &factors);
                return dequantize(&codes, columns, tile, &factors);
            }
            // 448 over 57344, the largest number of E5M2.
            factors.iter_mut().for_each(|factor| *factor /= 128.0);
            by_tile(values, columns, tile, &factors, |value, factor| {
                e5m2(value / factor) * factor
            })
        };
        values
            .par_chunks(TILE * columns)
            .flat_map_iter(rounded)
            .collect()
    }
}

/// The number of E5M2 that is nearest, the even one of two; the largest one beyond it.
#[inline(always)]
fn e5m2(value: f32) -> f32 {
    const MAX: f32 = 57_344.0;
    /// Least normal number, 2^-14.
    const NORMAL: f32 = 1.0 / 16_384.0;
    /// Where neighbours are as far apart as the subnormal numbers are, 2^-16.
    const SUBNORMAL_STEPS: f32 = 128.0;
    let magnitude = value.abs().min(MAX);
    let bits = magnitude.to_bits();
    let rounded = if magnitude < NORMAL {
        magnitude + SUBNORMAL_STEPS - SUBNORMAL_STEPS
    } else {
        f32::from_bits((bits + 0xf_ffff + (bits >> 21 & 1)) & !0x1f_ffff)
    };
    if value.is_nan() {
        value
    } else {
        rounded.copysign(value)
    }
}

/// `a b^T` with sums of 14 bits: see [`Ablation::NoPromotion`].
fn short_sums(a: &[f32], b: &[f32], inner: usize) -> Vec<f32> {
    /// Elements of the inner size that one instruction sums.
    const STEP: usize = 32;
    const ROWS: usize = 64;
    let (rows, columns) = (a.len() / inner, b.len() / inner);
    let mut out = vec![0f32; rows * columns];
    let chunks = out
        .par_chunks_mut(ROWS * columns)
        .zip(a.par_chunks(ROWS * inner));
    chunks.for_each(|(out, a)| {
        let mut partial = vec![0f32; out.len()];
        for start in (0..inner).step_by(STEP) {
            let length = STEP.min(inner - start);
            let a = Matrix::strided(&a[start..], a.len() / inner, length, inner);
            let b = Matrix::strided(&b[start..], columns, length, inner);
            multiply(a, b.transposed(), &mut partial, Into::Replace);
            vectorized!({
                for (sum, partial) in out.iter_mut().zip(&partial) {
                    *sum = cut(*sum + partial);
                }
            });
        }
    });
    out
}

/// The 14 highest bits of a number's mantissa, the implicit one included.
#[inline(always)]
fn cut(value: f32) -> f32 {
    f32::from_bits(value.to_bits() & !((1 << (24 - 14)) - 1))
}

/// A matrix of `columns` with rows and columns exchanged.
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    let at = |at: usize| values[at % rows * columns + at / rows];
    (0..values.len()).into_par_iter().map(at).collect()
}

#[derive(Debug)]
struct AblatedLinear;

impl<B: AblationOps + AblationGrad> Backward<B, 2> for AblatedLinear {
    type State = (FloatTensor<B>, FloatTensor<B>, IntTensor<B>, Recipe);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let (x, weights, counts, recipe) = ops.state;
        let (of_x, of_weights) = B::ablated_grads(grad, x, weights, counts, recipe);
        for (node, grad) in ops.parents.into_iter().zip([of_x, of_weights]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

impl<B: AblationOps + AblationGrad, C: CheckpointStrategy> AblationOps for Autodiff<B, C> {
    fn ablated_linear(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        counts: IntTensor<Self>,
        recipe: Recipe,
    ) -> FloatTensor<Self> {
        match AblatedLinear
            .prepare::<C>([x.node(), weights.node()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (x, weights) = (x.into_primitive(), weights.into_primitive());
                let state = (x.clone(), weights.clone(), counts.clone(), recipe);
                prep.finish(state, B::ablated_linear(x, weights, counts, recipe))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::ablated_linear(
                x.into_primitive(),
                weights.into_primitive(),
                counts,
                recipe,
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, TensorData, f16};

    use super::*;

    const ALL: [Ablation; 3] = [
        Ablation::PerTensor,
        Ablation::E5m2Weights,
        Ablation::NoPromotion,
    ];

    /// E5M2 is the upper half of the 16-bit numbers of IEEE 754, but that codes from 0x7c on are not numbers.
    #[test]
    fn e5m2_is_the_upper_half_of_f16() {
        let number = |code: u8| f16::from_bits(u16::from(code) << 8).to_f32();
        for code in 0..0x7bu8 {
            let (low, high) = (number(code), number(code + 1));
            let middle = (low + high) / 2.0;
            let even = if code & 1 == 0 { low } else { high };
            for sign in [1.0, -1.0] {
                assert_eq!(e5m2(sign * low).to_bits(), (sign * low).to_bits());
                assert_eq!(e5m2(sign * middle), sign * even, "{middle}");
                assert_eq!(e5m2(sign * middle.next_down()), sign * low);
                assert_eq!(e5m2(sign * middle.next_up()), sign * high);
            }
        }
        assert_eq!(number(0x7b), 57_344.0);
        assert_eq!([e5m2(1e9), e5m2(f32::NEG_INFINITY)], [57_344.0, -57_344.0]);
        assert!(e5m2(f32::NAN).is_nan());
    }

    /// Small whole numbers with one of 448 in every tile, along rows and along columns: all scales are 1, or 1 / 128 with
    /// E5M2, all rounded numbers whole, and no sum is rounded but those that are cut.
    fn whole_numbers(rows: usize, columns: usize, seed: usize) -> Tensor<2> {
        let at = |at: usize| match (at / columns, at % columns) {
            (row, column) if (row + column) % TILE == seed => 448.0,
            (row, column) => ((row * 37 + column * 101 + seed) * 7919 % 61) as f32 - 30.0,
        };
        matrix((0..rows * columns).map(at).collect(), columns)
    }

    fn matrix(elements: Vec<f32>, columns: usize) -> Tensor<2> {
        let elements = TensorData::new(elements.clone(), [elements.len() / columns, columns]);
        Tensor::from_data(elements, &Device::flex().autodiff())
    }

    fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().iter().collect()
    }

    /// `a b^T` element by element from the definitions, in whole numbers.
    fn one_by_one(a: Tensor<2>, b: Tensor<2>, b_is_weight: bool, ablation: Ablation) -> Vec<f32> {
        let [_, inner] = a.dims();
        let rounded = |x: Tensor<2>, numbers: &[f32]| -> Vec<i64> {
            let nearest = |value: f32| {
                let distance = |code: &usize| (numbers[*code] - value.abs()).abs();
                // The first of two that are equally near wins: the even one.
                let codes = (0..numbers.len())
                    .step_by(2)
                    .chain((1..numbers.len()).step_by(2));
                let code = codes
                    .min_by(|a, b| distance(a).total_cmp(&distance(b)))
                    .unwrap();
                numbers[code].copysign(value) as i64
            };
            values(x).into_iter().map(nearest).collect()
        };
        let e4m3: Vec<f32> = (0..0x7f).map(decode).collect();
        let e5m2 = (0..0x7c).map(|code| f16::from_bits(code << 8).to_f32() / 128.0);
        let b_numbers = match ablation {
            Ablation::E5m2Weights if b_is_weight => e5m2.collect(),
            _ => e4m3.clone(),
        };
        let (a, b) = (rounded(a, &e4m3), rounded(b, &b_numbers));
        let sum = |(a, b): (&[i64], &[i64])| {
            let steps = a.chunks(32).zip(b.chunks(32));
            steps.fold(0i64, |sum, (a, b)| {
                let sum = sum + a.iter().zip(b).map(|(a, b)| a * b).sum::<i64>();
                let bits = i64::BITS - sum.abs().leading_zeros();
                match ablation {
                    Ablation::NoPromotion if bits > 14 => {
                        sum / (1 << (bits - 14)) * (1 << (bits - 14))
                    }
                    _ => sum,
                }
            }) as f32
        };
        let pairs = a
            .chunks(inner)
            .flat_map(|a| b.chunks(inner).map(move |b| (a, b)));
        pairs.map(sum).collect()
    }

    #[test]
    fn products_and_gradients_are_those_of_the_definitions() {
        for ablation in ALL {
            let (m, k, n) = (2 * TILE, TILE, 3 * TILE);
            let x = whole_numbers(m, k, 1).require_grad();
            let w = whole_numbers(k, n, 5).require_grad();
            let dy = whole_numbers(m, n, 9);
            let y = linear(x.clone(), w.clone(), ScaleFormat::PowerOfTwo, ablation);
            let grads = (y.clone() * dy.clone()).sum().backward();
            let (of_x, of_w) = (x.grad(&grads).unwrap(), w.grad(&grads).unwrap());
            let (x, w) = (x.detach(), w.detach());
            let expected = one_by_one(x.clone(), w.clone().transpose(), true, ablation);
            assert_eq!(values(y), expected, "{ablation:?}");
            let expected = one_by_one(dy.clone(), w, true, ablation);
            assert_eq!(values(of_x), expected, "{ablation:?}");
            let expected = one_by_one(x.transpose(), dy.transpose(), false, ablation);
            assert_eq!(values(of_w), expected, "{ablation:?}");
        }
    }

    #[test]
    fn one_scale_loses_what_is_small_beside_other_tiles() {
        let small = 2f32.powi(-12);
        let x = matrix(vec![448.0, 0.0, small, 0.0], 2);
        let w = matrix(vec![1.0, 0.0, 0.0, 1.0], 2);
        let product = |x, w| values(linear(x, w, ScaleFormat::Float32, Ablation::PerTensor));
        assert_eq!(product(x.clone(), w.clone()), [448.0, 0.0, 0.0, 0.0]);
        assert_eq!(product(w, x.clone()), [448.0, 0.0, 0.0, 0.0]);
        let alone = product(x.narrow(0, 1, 1), matrix(vec![1.0, 0.0, 0.0, 1.0], 2));
        // 448 times a scale that was rounded.
        assert!((alone[0] / small - 1.0).abs() < 1e-6, "{alone:?}");
    }

    /// The sum of 4096 products of numbers from 0 to 1 grows evenly over 128 steps, of which each cuts half of the 14th
    /// bit's unit on average: 2^-15 to 2^-14 of what was summed so far, together 64 times that of the result.
    #[test]
    fn sums_of_14_bits_are_low_by_as_much_as_is_cut() {
        let uniform = |shape| {
            let numbers = Distribution::Uniform(0.0, 1.0);
            Tensor::<2>::random(shape, numbers, &Device::flex())
        };
        let (x, w) = (uniform([64, 4096]), uniform([4096, 64]));
        let format = ScaleFormat::Float32;
        let exact = values(super::super::linear(x.clone(), w.clone(), format));
        let found = values(linear(x, w, format, Ablation::NoPromotion));
        let low: f32 = exact
            .iter()
            .zip(&found)
            .map(|(exact, found)| 1.0 - found / exact)
            .sum();
        let mean = low / exact.len() as f32;
        assert!(
            (64.0 * 2f32.powi(-15)..64.0 * 2f32.powi(-14)).contains(&mean),
            "{mean}"
        );
    }

    #[test]
    fn experts_are_multiplied_one_by_one() {
        let device = Device::flex().autodiff();
        let random =
            |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        // The expert in the middle has no row.
        let chosen = Tensor::<2, Int>::from_data([[0], [2], [0], [0], [2]], &device);
        let order = Permutation::by_expert(chosen, 3);
        for ablation in ALL {
            let format = ScaleFormat::Float32;
            let x = random([5, 40]).require_grad();
            let weights = random([3, 40 * 24])
                .reshape([3, 40, 24])
                .detach()
                .require_grad();
            let dy = random([5, 24]);
            let y = grouped_linear(x.clone(), weights.clone(), &order, format, ablation);
            let grads = (y.clone() * dy.clone()).sum().backward();
            let of_weights = weights.grad(&grads).unwrap();
            assert!(
                values(of_weights.clone().narrow(0, 1, 1))
                    .iter()
                    .all(|grad| *grad == 0.0)
            );
            for (expert, rows) in [(0, 0..3), (2, 3..5)] {
                let x_e = x.clone().slice([rows.clone()]).detach().require_grad();
                let w_e = weights.clone().detach().narrow(0, expert, 1);
                let w_e = w_e.squeeze_dim::<2>(0).detach().require_grad();
                let y_e = linear(x_e.clone(), w_e.clone(), format, ablation);
                let grads_e = (y_e.clone() * dy.clone().slice([rows.clone()]))
                    .sum()
                    .backward();
                assert_eq!(values(y.clone().slice([rows.clone()])), values(y_e));
                let of_x = x.grad(&grads).unwrap().slice([rows]);
                assert_eq!(values(of_x), values(x_e.grad(&grads_e).unwrap()));
                let of_w = of_weights.clone().narrow(0, expert, 1);
                assert_eq!(values(of_w), values(w_e.grad(&grads_e).unwrap()));
            }
        }
    }
}
