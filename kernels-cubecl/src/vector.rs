//! Elementwise arithmetic on the CPU in the widest vectors that the processor has.

use pulp::NullaryFnOnce;

/// Runs an expression compiled for the widest vectors of this processor. What it calls must be inlined into it: what is not
/// has the vectors of the oldest one.
macro_rules! vectorized {
    ($body:expr) => {
        pulp::Arch::new().dispatch($crate::vector::Loop(
            #[inline(always)]
            || $body,
        ))
    };
}

pub(crate) use vectorized;

/// The expression of [`vectorized`]. A large closure is inlined into none of its callers, of which there is one for each kind of
/// vectors, unless it says so; and not if it is called as one that can be called once.
pub(crate) struct Loop<F>(pub(crate) F);

impl<R, F: FnMut() -> R> NullaryFnOnce for Loop<F> {
    type Output = R;

    #[inline(always)]
    fn call(mut self) -> R {
        (self.0)()
    }
}

/// `e^x` to 2 units in the last place, 0 below -87. Branchless, so that loops over it become vector code.
///
/// The argument is split into n ln 2 + r with |r| <= ln 2 / 2; e^r is its Taylor polynomial of degree 7.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.0;
    const HIGHEST: f32 = 88.0;
    /// Adding and subtracting it rounds to a whole number, which is then in its lowest bits.
    const ROUNDER: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first exact under multiplication with small whole numbers.
    const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

    let clamped = x.clamp(LOWEST, HIGHEST);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = clamped - n * LN2[0] - n * LN2[1];
    let mut p = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * r + coefficient;
    }
    let exponent = shifted
        .to_bits()
        .wrapping_sub(ROUNDER.to_bits())
        .wrapping_add(127)
        << 23;
    let result = p * f32::from_bits(exponent);
    if x < LOWEST { 0.0 } else { result }
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The largest element, -inf if there is none. NaN is passed over.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    fold(
        values,
        f32::NEG_INFINITY,
        |a, b| if b > a { b } else { a },
        |x| x,
    )
}

/// The sum of `f` over the elements, in sixteen interleaved sums: a fixed order that fits one vector register.
#[inline(always)]
pub(crate) fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    fold(values, 0.0, |a, b| a + b, f)
}

/// The sum of products of two rows, in the order of [`sum`].
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest = a_chunks.remainder().iter().zip(b_chunks.remainder());
    let mut total = rest.map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    for lane in lanes {
        total += lane;
    }
    total
}

/// Whether [`f32::mul_add`] is an instruction in [`vectorized`] code. Where it is not, it is a function call.
pub(crate) fn multiplies_and_adds() -> bool {
    #[cfg(target_arch = "x86_64")]
    return pulp::x86::V3::try_new().is_some();
    #[cfg(not(target_arch = "x86_64"))]
    return cfg!(target_arch = "aarch64");
}

/// Single-precision numbers of the widest vector.
pub(crate) const LANES: usize = 16;

#[inline(always)]
fn fold(
    values: &[f32],
    start: f32,
    combine: impl Fn(f32, f32) -> f32,
    f: impl Fn(f32) -> f32,
) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = combine(lanes[lane], f(chunk[lane]));
        }
    }
    let mut total = start;
    for &value in rest {
        total = combine(total, f(value));
    }
    for lane in lanes {
        total = combine(total, lane);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_two_units_in_the_last_place() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let exact = f64::from(x).exp();
            let off = (f64::from(exp(x)) / exact - 1.0).abs();
            assert!(
                off < 2.0 * f64::from(f32::EPSILON),
                "exp({x}) is off by {off:e}"
            );
            x += 0.00731;
        }
        assert_eq!(
            (exp(f32::NEG_INFINITY), exp(-100.0), exp(0.0)),
            (0.0, 0.0, 1.0)
        );
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_cover_every_element() {
        let values: Vec<f32> = (0..37).map(|i| (i as f32) - 18.0).collect();
        assert_eq!(max(&values), 18.0);
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        assert_eq!(sum(&values, |x| x), 0.0);
        assert_eq!(
            dot(&values, &values),
            values.iter().map(|x| x * x).sum::<f32>()
        );
    }
}
