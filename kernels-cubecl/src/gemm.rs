//! Matrix products of views: the gemm crate behind checked slices.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::{
    flex::Scalar,
    parts::{Panel, by_panels},
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
    fn columns(self, columns: std::ops::Range<usize>) -> Self {
        self.transposed().rows(columns).transposed()
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
    by_rows(a, b, &mut out.spare_capacity_mut()[..length], multiply_into);
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
    let work = a.rows * a.columns * b.columns;
    let parts = (work / WORTH).clamp(1, rayon::current_num_threads());
    let width = b.columns.div_ceil(parts).next_multiple_of(VECTORS);
    let panels: Vec<Panel> = (0..b.columns)
        .step_by(width)
        .map(|start| Panel {
            rows: 0..a.rows,
            columns: start..b.columns.min(start + width),
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

/// As [`multiply`] for a result that is not written yet.
fn multiply_into<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>, out: &mut [MaybeUninit<T>]) {
    assert_eq!(out.len(), a.rows * b.columns, "the result has another size");
    call(a, b, out.as_mut_ptr().cast(), Into::Replace);
}

/// The product into `a.rows * b.columns` elements from `out` on.
fn call<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>, out: *mut T, into: Into) {
    assert_eq!(a.columns, b.rows, "inner sizes differ");
    if a.rows * b.columns == 0 {
        return;
    }
    let add = into == Into::Add;
    #[allow(unsafe_code, reason = "the gemm crate takes pointers and strides")]
    // SAFETY: a `Matrix` reaches no further than its slice, which its constructors check, and both callers borrow as
    // many elements as the result has mutably, so that the three do not overlap. Where the product replaces them, they
    // are written and not read.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out,
            1,
            b.columns as isize,
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
