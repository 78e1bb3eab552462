//! Matrix products of views on the calling thread: the gemm crate behind checked slices.

use crate::flex::Scalar;

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
        let reach = if rows == 0 || columns == 0 {
            0
        } else {
            (rows - 1) * row_stride + columns
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
            column_stride: 1,
        }
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

/// `out = a b` or `out += a b`, row-major and without gaps.
pub(crate) fn multiply<T: Scalar>(a: Matrix<'_, T>, b: Matrix<'_, T>, out: &mut [T], into: Into) {
    assert_eq!(a.columns, b.rows, "inner sizes differ");
    assert_eq!(out.len(), a.rows * b.columns, "the result has another size");
    if out.is_empty() {
        return;
    }
    if a.columns == 0 {
        if into == Into::Replace {
            out.fill(T::ZERO);
        }
        return;
    }
    let add = into == Into::Add;
    // SAFETY: a `Matrix` reaches no further than its slice, which its constructors check, and `out` has as many
    // elements as the result; the three do not overlap because `out` is borrowed mutably.
    #[allow(unsafe_code, reason = "the gemm crate takes pointers and strides")]
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
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
