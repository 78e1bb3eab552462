//! Matrix products of views: the gemm crate behind checked slices.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::{
    flex::Scalar,
    parts::{Panel, by_panels, pieces},
};

/// A matrix seen in a slice.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    elements: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// The first `rows * columns` of `elements`, row-major.
    pub(crate) fn of(elements: &'a [T], rows: usize, columns: usize) -> Self {
        Self::strided(elements, rows, columns, columns)
    }

    /// Rows of `columns` neighbouring elements, `row_stride` apart.
    pub(crate) fn strided(
        elements: &'a [T],
        rows: usize,
        columns: usize,
        row_stride: usize,
    ) -> Self {
        Self::viewed(elements, [rows, columns], [row_stride as isize, 1])
    }

    /// Elements so many places apart.
    pub(crate) fn viewed(
        elements: &'a [T],
        [rows, columns]: [usize; 2],
        strides: [isize; 2],
    ) -> Self {
        let [row_stride, column_stride] =
            strides.map(|stride| usize::try_from(stride).expect("elements in ascending order"));
        let reach = match rows * columns {
            0 => 0,
            _ => (rows - 1) * row_stride + (columns - 1) * column_stride + 1,
        };
        assert!(
            reach <= elements.len(),
            "a matrix reaches {reach} of {} elements",
            elements.len()
        );
        Self {
            elements,
            rows,
            columns,
            row_stride,
            column_stride,
        }
    }

    /// Some of the rows.
    pub(crate) fn rows(self, rows: std::ops::Range<usize>) -> Self {
        assert!(
            rows.start < rows.end && rows.end <= self.rows,
            "rows {rows:?} of {}",
            self.rows
        );
        Self {
            elements: &self.elements[rows.start * self.row_stride..],
            rows: rows.len(),
            ..self
        }
    }

    /// Some of the columns.
    pub(crate) fn columns(self, columns: std::ops::Range<usize>) -> Self {
        self.transposed().rows(columns).transposed()
    }

    /// A copy of the elements row after row, of a matrix whose columns are neighbours in memory.
    pub(crate) fn row_major(self) -> Vec<T>
    where
        T: Scalar,
    {
        let mut out = vec![T::ZERO; self.rows * self.columns];
        self.copy_row_major(&mut out);
        out
    }

    /// In squares that fit the first-level cache, however far columns are apart.
    fn copy_row_major(self, out: &mut [T])
    where
        T: Scalar,
    {
        const SIDE: usize = 16;
        assert_eq!(self.row_stride, 1, "the elements of a column are apart");
        let (rows, columns) = (self.rows, self.columns);
        let out = &mut out[..rows * columns];
        for left in (0..columns).step_by(SIDE) {
            for top in (0..rows).step_by(SIDE) {
                let (height, width) = (SIDE.min(rows - top), SIDE.min(columns - left));
                let mut square = [[T::ZERO; SIDE]; SIDE];
                for column in 0..width {
                    let start = (left + column) * self.column_stride + top;
                    let elements = &self.elements[start..][..height];
                    for (row, &element) in square.iter_mut().zip(elements) {
                        row[column] = element;
                    }
                }
                for (row, elements) in square.iter().take(height).enumerate() {
                    let start = (top + row) * columns + left;
                    out[start..][..width].copy_from_slice(&elements[..width]);
                }
            }
        }
    }

    /// A row whose elements are neighbours.
    pub(crate) fn row(self, row: usize) -> &'a [T] {
        assert_eq!(self.column_stride, 1, "the elements of a row are apart");
        &self.elements[row * self.row_stride..][..self.columns]
    }

    pub(crate) fn transposed(self) -> Self {
        Self {
            elements: self.elements,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// What happens to the old elements of a product's result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They are replaced.
    Replace,
    /// The product is added to them.
    Add,
}

/// `a b`, row-major, computed by all threads.
pub(crate) fn product<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>) -> Vec<T> {
    if a.rows <= FEW {
        return by_columns(a, b);
    }
    let length = a.rows * b.columns;
    let mut out = Vec::with_capacity(length);
    by_rows(
        a,
        b,
        &mut out.spare_capacity_mut()[..length],
        |a, b, out| {
            multiply_fresh(a, b, out);
        },
    );
    #[allow(unsafe_code, reason = "zeros first would be a pass over memory")]
    // SAFETY: every element was written.
    unsafe {
        out.set_len(length);
    }
    out
}

/// `out += a b` by all threads.
pub(crate) fn add_product<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>, out: &mut [T]) {
    by_rows(a, b, out, |a, b, out| multiply(a, b, out, Into::Add));
}

/// Multiplications that are worth another thread.
pub(crate) const WORTH: usize = 1 << 18;
/// Rows up to which a product is as fast as `b` is read, so that threads should not read the same of it.
const FEW: usize = 16;

/// The product, of which every thread computes some columns.
fn by_columns<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>) -> Vec<T> {
    /// Columns of a part are a multiple of it: whole vectors.
    const VECTORS: usize = 64;
    /// Elements of `b` whose reading is worth another thread: some microseconds.
    const READ: usize = 1 << 14;
    let parts = (b.rows * b.columns / READ).clamp(1, rayon::current_num_threads());
    let width = b.columns.div_ceil(parts).next_multiple_of(VECTORS);
    let panels: Vec<Panel> = pieces(b.columns, width)
        .map(|columns| Panel {
            rows: 0..a.rows,
            columns,
        })
        .collect();
    by_panels([a.rows, b.columns], &panels, |at, out| {
        multiply(a, b.columns(panels[at].columns.clone()), out, Into::Replace);
    })
}

/// Hands parts of the rows of the result to the threads.
fn by_rows<T: Scalar, O: Send>(
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    out: &mut [O],
    multiply: impl Fn(Matrix<'_, T>, Matrix<'_, T>, &mut [O]) + Sync,
) {
    let work = a.rows * a.columns * b.columns;
    let parts = (work / WORTH).clamp(1, rayon::current_num_threads());
    if parts == 1 || a.rows < 2 {
        return multiply(a, b, out);
    }
    let rows = a.rows.div_ceil(parts);
    out.par_chunks_mut(rows * b.columns)
        .enumerate()
        .for_each(|(part, out)| {
            let a = a.rows(part * rows..part * rows + out.len() / b.columns);
            multiply(a, b, out);
        });
}

/// `out = a b` or `out += a b`, row-major and without gaps, on the calling thread.
pub(crate) fn multiply<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>, out: &mut [T], into: Into) {
    assert_eq!(out.len(), a.rows * b.columns, "the result has another size");
    call(a, b, out.as_mut_ptr(), into);
}

/// As [`multiply`] for a result that is not written yet, and then is.
pub(crate) fn multiply_fresh<'o, T: Scalar>(
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    out: &'o mut [MaybeUninit<T>],
) -> &'o mut [T] {
    assert_eq!(out.len(), a.rows * b.columns, "the result has another size");
    call(a, b, out.as_mut_ptr().cast(), Into::Replace);
    #[allow(unsafe_code, reason = "zeros first would be a pass over memory")]
    // SAFETY: every element was written.
    unsafe {
        out.assume_init_mut()
    }
}

/// Columns so far apart fall into few sets of the first-level cache, and the gemm crate reads 64 of them side by side.
const FAR: usize = 512;
/// Rows of `a` that are worth a copy of `b`.
const MANY: usize = 96;

/// The product into `a.rows * b.columns` elements from `out` on, piece by piece where `b` has to be copied.
fn call<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>, out: *mut T, into: Into) {
    assert_eq!(a.columns, b.rows, "inner sizes differ");
    if a.rows * b.columns == 0 {
        return;
    }
    let (stride, add) = (b.columns, into == Into::Add);
    if b.rows == 0 {
        call_gemm(a, b, out, stride, add);
    } else if a.column_stride != 1 {
        for columns in pieces(b.columns, columns_without_copy()) {
            let out = out.wrapping_add(columns.start);
            call_gemm(a, b.columns(columns), out, stride, add);
        }
    } else if b.row_stride != 1 || b.column_stride < FAR || a.rows < MANY {
        call_gemm(a, b, out, stride, add);
    } else {
        const PIECE: [usize; 2] = [512, 64];
        let mut piece = vec![T::ZERO; PIECE[0] * PIECE[1]];
        for columns in pieces(b.columns, PIECE[1]) {
            let out = out.wrapping_add(columns.start);
            for inner in pieces(b.rows, PIECE[0]) {
                let part = b.rows(inner.clone()).columns(columns.clone());
                part.copy_row_major(&mut piece);
                let part = Matrix::of(&piece, part.rows, part.columns);
                let add = add || inner.start > 0;
                call_gemm(a.columns(inner), part, out, stride, add);
            }
        }
    }
}

/// Columns of a product for which the gemm crate reads the rows of a transposed `a` where they are: two of its tiles of
/// AVX-512. For more it copies them, six elements at a time.
fn columns_without_copy() -> usize {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        return 128;
    }
    usize::MAX
}

/// The product into rows of `out` that are `stride` apart.
fn call_gemm<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>, out: *mut T, stride: usize, add: bool) {
    #[allow(unsafe_code, reason = "the gemm crate takes pointers and strides")]
    // SAFETY: a `Matrix` reaches no further than its slice, which its constructors check, and the callers of `call` borrow
    // as many elements as the result has mutably, so that the three do not overlap. A piece of the result is some of its
    // columns. Where the product replaces elements, they are written and not read.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            1,
            stride as isize,
            add,
            a.elements.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.elements.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            if add { T::ONE } else { T::ZERO },
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
