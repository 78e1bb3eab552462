//! Grouped products against loops, on every device of the build.

use burn::tensor::{DType, Device, TensorData, Tolerance};
use proptest::prelude::*;

use super::*;

/// Rows of each segment, rows behind the last, and the sizes of a matrix.
#[derive(Clone, Debug)]
struct Case {
    counts: Vec<i32>,
    rest: usize,
    k: usize,
    n: usize,
}

impl Case {
    fn rows(&self) -> usize {
        self.counts.iter().sum::<i32>() as usize + self.rest
    }

    /// Numbers for every row, NaN where it is of no segment.
    fn matrix(&self, columns: usize, seed: usize) -> Vec<f32> {
        let mut values = numbers((self.rows() - self.rest) * columns, seed);
        values.resize(self.rows() * columns, f32::NAN);
        values
    }

    /// The segment of each row.
    fn segments(&self) -> Vec<Option<usize>> {
        let mut segments = Vec::new();
        for (segment, &count) in self.counts.iter().enumerate() {
            segments.extend(vec![Some(segment); count as usize]);
        }
        segments.resize(self.rows(), None);
        segments
    }
}

fn case(
    experts: impl Strategy<Value = usize>,
    longest: i32,
    sizes: impl Strategy<Value = (usize, usize)>,
) -> impl Strategy<Value = Case> {
    let rest = prop_oneof![2 => Just(0usize), 1 => 1usize..70];
    (experts, rest, sizes).prop_flat_map(move |(experts, rest, (k, n))| {
        let count = prop_oneof![Just(0), 1..longest];
        prop::collection::vec(count, experts).prop_map(move |counts| Case { counts, rest, k, n })
    })
}

/// Numbers between -1 and 1 that differ from place to place.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    let number = |at: usize| ((at + seed) * 37 % 101) as f32 / 50.0 - 1.0;
    (0..count).map(number).collect()
}

/// The products and, with `dy` given, both gradients from the definition, in double precision.
fn oracle(case: &Case, x: &[f32], w: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
    let Case { k, n, .. } = *case;
    let mut y = vec![0.0f64; case.rows() * n];
    let mut dx = vec![0.0f64; x.len()];
    let mut dw = vec![0.0f64; w.len()];
    for (row, segment) in case.segments().into_iter().enumerate() {
        let Some(segment) = segment else { continue };
        for i in 0..k {
            for j in 0..n {
                let (x_at, w_at, y_at) = (row * k + i, (segment * k + i) * n + j, row * n + j);
                y[y_at] += f64::from(x[x_at]) * f64::from(w[w_at]);
                dx[x_at] += f64::from(dy[y_at]) * f64::from(w[w_at]);
                dw[w_at] += f64::from(dy[y_at]) * f64::from(x[x_at]);
            }
        }
    }
    [y, dx, dw].map(|values| values.into_iter().map(|value| value as f32).collect())
}

/// The version that serves `device`, or the reference, and its gradients.
fn run(case: &Case, dtype: DType, device: &Device, native: bool) -> [TensorData; 3] {
    let device = device.clone().autodiff();
    let (rows, experts) = (case.rows(), case.counts.len());
    let matrix = |columns, seed| {
        let data = TensorData::new(case.matrix(columns, seed), [rows, columns]);
        Tensor::<2>::from_data(data, (&device, dtype))
    };
    let (x, dy) = (matrix(case.k, 0).require_grad(), matrix(case.n, 5));
    let w = numbers(experts * case.k * case.n, 3);
    let w = TensorData::new(w, [experts, case.k, case.n]);
    let w = Tensor::<3>::from_data(w, (&device, dtype)).require_grad();
    let counts = TensorData::new(case.counts.clone(), [experts]);
    let counts = Tensor::<1, Int>::from_data(counts, &device);
    let y = match native {
        true => grouped_matmul(x.clone(), w.clone(), counts),
        false => reference::grouped_matmul(x.clone(), w.clone(), counts),
    };
    let grads = (y.clone() * dy).sum().backward();
    [
        y.into_data().convert::<f32>(),
        x.grad(&grads).unwrap().into_data().convert::<f32>(),
        w.grad(&grads).unwrap().into_data().convert::<f32>(),
    ]
}

fn check(case: &Case, dtype: DType, device: &Device, close: f32) {
    let (rows, experts) = (case.rows(), case.counts.len());
    let x = case.matrix(case.k, 0);
    let w = numbers(experts * case.k * case.n, 3);
    let dy = case.matrix(case.n, 5);
    let [y, dx, dw] = oracle(case, &x, &w, &dy);
    let expected = [
        TensorData::new(y, [rows, case.n]),
        TensorData::new(dx, [rows, case.k]),
        TensorData::new(dw, [experts, case.k, case.n]),
    ];
    let close = Tolerance::<f32>::absolute(close);
    let found = run(case, dtype, device, true);
    for (found, expected) in found.iter().zip(&expected) {
        found.assert_approx_eq(expected, close);
    }
    if case.counts.iter().any(|&count| count > 0) {
        let reference = run(case, DType::F32, &Device::flex(), false);
        for (reference, expected) in reference.iter().zip(&expected) {
            reference.assert_approx_eq(expected, Tolerance::<f32>::absolute(CLOSE));
        }
    }
}

/// Sums of at most 300 products of numbers below one, in f32: rounding below 300 * 300 / 2 * 6e-8 in the worst case and
/// 1e-5 in practice, where a product too many or too few counts for up to one.
const CLOSE: f32 = 1e-4;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn products_agree_with_loops(case in case(1usize..6, 40, (1usize..40, 1usize..40))) {
        prop_assume!(case.rows() > 0);
        check(&case, DType::F32, &Device::flex(), CLOSE);
    }
}

#[cfg(feature = "wgpu")]
mod on_wgpu {
    use super::*;
    use crate::cube::wgpu;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]

        /// Segments, depths and widths below, at and above those of a tile.
        #[test]
        fn products_agree_with_loops(
            case in case(
                prop::sample::select(&[1, 5][..]),
                150,
                (prop_oneof![1usize..20, Just(64), 60usize..140], prop_oneof![1usize..20, Just(64), 60usize..140]),
            )
        ) {
            prop_assume!(case.rows() > 0);
            check(&case, DType::F32, &wgpu(), CLOSE);
        }
    }

    #[test]
    fn half_precision_is_summed_in_single() {
        let case = Case {
            counts: vec![3, 0, 70, 1],
            rest: 5,
            k: 33,
            n: 65,
        };
        // Inputs and results rounded to 11 bits; sums up to about 12.
        check(&case, DType::F16, &wgpu(), 3e-2);
    }

    #[test]
    fn no_rows_have_no_products_and_no_gradient() {
        let device = wgpu().autodiff();
        let x = Tensor::<2>::zeros([0, 8], &device);
        let w = Tensor::<3>::ones([3, 8, 4], &device).require_grad();
        let counts = Tensor::<1, Int>::zeros([3], &device);
        let y = grouped_matmul(x, w.clone(), counts);
        assert_eq!(y.dims(), [0, 4]);
        let grad = w.grad(&y.sum().backward()).unwrap();
        let zeros = TensorData::new(vec![0.0f32; 96], [3, 8, 4]);
        grad.into_data().assert_eq(&zeros, true);
    }
}
