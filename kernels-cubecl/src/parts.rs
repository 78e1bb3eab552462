//! Results that tasks on all threads fill part by part, without a pass over memory that only makes zeros of it.

#![allow(unsafe_code, reason = "memory is used before all of it is initialised")]

use std::{cmp::Reverse, mem::MaybeUninit, ops::Range};

use rayon::prelude::*;

use crate::flex::Scalar;

/// A vector of `length` elements in parts of `size`, the last one shorter: `fill` gets the number of each part and its
/// elements, zeros that it has just had written to cache. Also what `fill` returned, in order.
pub(crate) fn by_parts<T: Scalar, R: Send>(
    length: usize,
    size: usize,
    fill: impl Fn(usize, &mut [T]) -> R + Sync,
) -> (Vec<T>, Vec<R>) {
    let mut out = Vec::with_capacity(length);
    let parts = fresh(&mut out, length).par_chunks_mut(size.max(1));
    let returned = parts
        .enumerate()
        .map(|(part, elements)| fill(part, zeroed(elements)))
        .collect();
    // SAFETY: the parts cover all elements, and each was made zeros.
    unsafe {
        out.set_len(length);
    }
    (out, returned)
}

/// As [`by_parts`] with two vectors of the same length.
pub(crate) fn two_by_parts<T: Scalar>(
    length: usize,
    size: usize,
    fill: impl Fn(usize, &mut [T], &mut [T]) + Sync,
) -> [Vec<T>; 2] {
    let mut out = [Vec::with_capacity(length), Vec::with_capacity(length)];
    let [first, second] = &mut out;
    let first = fresh(first, length).par_chunks_mut(size.max(1));
    let second = fresh(second, length).par_chunks_mut(size.max(1));
    first
        .zip(second)
        .enumerate()
        .for_each(|(part, (first, second))| fill(part, zeroed(first), zeroed(second)));
    for out in &mut out {
        // SAFETY: as in `by_parts`.
        unsafe {
            out.set_len(length);
        }
    }
    out
}

/// A vector of parts of any sizes that follow each other, each filled as in [`by_parts`].
pub(crate) fn by_sizes<T: Scalar>(
    sizes: &[usize],
    fill: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let [out] = by_rows(sizes, [1], |part, [out]| {
        let out = zeroed(out);
        fill(part, out);
        [out]
    });
    out
}

/// Matrices of the given widths, in parts that are some rows of each of them and follow each other. `fill` gets the elements
/// of a part, which are not written yet, and returns them, written. Parts of most rows are begun first, so that threads
/// end together.
pub(crate) fn by_rows<T: Scalar, const N: usize>(
    rows: &[usize],
    widths: [usize; N],
    fill: impl for<'a> Fn(usize, [&'a mut [MaybeUninit<T>]; N]) -> [&'a mut [T]; N] + Sync,
) -> [Vec<T>; N] {
    let lengths = widths.map(|width| width * rows.iter().sum::<usize>());
    let mut all = lengths.map(Vec::with_capacity);
    let mut parts: Vec<_> = rows.iter().map(|_| [const { None }; N]).collect();
    for (which, out) in all.iter_mut().enumerate() {
        let mut rest = fresh(out, lengths[which]);
        for (part, rows) in parts.iter_mut().zip(rows) {
            let (elements, others) = rest.split_at_mut(rows * widths[which]);
            part[which] = Some(elements);
            rest = others;
        }
    }
    let mut parts: Vec<_> = parts.into_iter().enumerate().collect();
    parts.sort_by_key(|&(part, _)| Reverse(rows[part]));
    let fill = |(part, elements): (usize, [Option<&mut [MaybeUninit<T>]>; N])| {
        let elements = elements.map(|elements| elements.expect("of every matrix"));
        let given = elements
            .each_ref()
            .map(|elements| (elements.as_ptr().cast(), elements.len()));
        let filled = fill(part, elements);
        let filled = filled.map(|elements| (elements.as_ptr(), elements.len()));
        assert_eq!(filled, given, "other elements than those to fill");
    };
    match parts.len() {
        1 => parts.into_iter().for_each(fill),
        _ => parts.into_iter().par_bridge().for_each(fill),
    }
    for (out, length) in all.iter_mut().zip(lengths) {
        // SAFETY: the parts cover all elements, and those of each came back as initialised ones.
        unsafe {
            out.set_len(length);
        }
    }
    all
}

/// Some rows and columns of a matrix.
pub(crate) struct Panel {
    pub(crate) rows: Range<usize>,
    pub(crate) columns: Range<usize>,
}

/// A row-major matrix of panels, each filled by itself as in [`by_parts`]; zero where none is. Those of the same rows
/// follow each other from left to right.
pub(crate) fn by_panels<T: Scalar>(
    [rows, columns]: [usize; 2],
    panels: &[Panel],
    fill: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let sizes = panels
        .iter()
        .map(|panel| panel.rows.len() * panel.columns.len());
    let sizes: Vec<usize> = sizes.collect();
    let filled = by_sizes(&sizes, fill);
    if filled.len() == rows * columns && (rows == 1 || panels.len() == 1) {
        return filled;
    }
    let mut out = vec![T::ZERO; rows * columns];
    let mut rest = &filled[..];
    for (panel, size) in panels.iter().zip(sizes) {
        let (elements, others) = rest.split_at(size);
        let rows = out[panel.rows.start * columns..].chunks_mut(columns);
        for (row, elements) in rows.zip(elements.chunks_exact(panel.columns.len())) {
            row[panel.columns.clone()].copy_from_slice(elements);
        }
        rest = others;
    }
    out
}

/// Ranges of `size` that cover `0..length`, the last one shorter.
pub(crate) fn pieces(length: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let starts = (0..length).step_by(size);
    starts.map(move |start| start..length.min(start.saturating_add(size)))
}

fn fresh<T>(out: &mut Vec<T>, length: usize) -> &mut [MaybeUninit<T>] {
    &mut out.spare_capacity_mut()[..length]
}

/// Zeros.
pub(crate) fn zeroed<T: Scalar>(elements: &mut [MaybeUninit<T>]) -> &mut [T] {
    elements.fill(MaybeUninit::new(T::ZERO));
    // SAFETY: all elements have just been written.
    unsafe { elements.assume_init_mut() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_element_once() {
        let (out, returned) = by_parts(10, 4, |part, out: &mut [f32]| {
            out.iter_mut().for_each(|x| *x += 1.0 + part as f32);
            out.len()
        });
        assert_eq!(out, [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0]);
        assert_eq!(returned, [4, 4, 2]);
        let [first, second] = two_by_parts(3, 2, |part, first: &mut [f32], second| {
            first.fill(part as f32);
            second[0] = 5.0;
        });
        assert_eq!((first, second), (vec![0.0, 0.0, 1.0], vec![5.0, 0.0, 5.0]));
        let out = by_sizes(&[2, 0, 1], |part, out: &mut [f32]| out.fill(part as f32));
        assert_eq!(out, [0.0, 0.0, 2.0]);
        let [narrow, wide] = by_rows(&[1, 2], [1, 2], |part, all| {
            let [narrow, wide] = all.map(zeroed);
            narrow.fill(part as f32);
            wide[0] = 3.0;
            [narrow, wide]
        });
        assert_eq!(narrow, [0.0, 1.0, 1.0]);
        assert_eq!(wide, [3.0, 0.0, 3.0, 0.0, 0.0, 0.0]);
        let (out, _) = by_parts(0, 0, |_, _: &mut [f32]| ());
        assert!(out.is_empty());
    }

    #[test]
    fn panels_become_rows() {
        let panel = |rows, columns| Panel { rows, columns };
        let panels = [panel(0..2, 0..2), panel(0..2, 2..3), panel(3..4, 1..3)];
        let out = by_panels([4, 3], &panels, |at, out: &mut [f32]| {
            for (element, out) in out.iter_mut().enumerate() {
                *out = (10 * at + element + 1) as f32;
            }
        });
        let rows = [
            [1.0, 2.0, 11.0],
            [3.0, 4.0, 12.0],
            [0.0; 3],
            [0.0, 21.0, 22.0],
        ];
        assert_eq!(out, rows.concat());
        let row = by_panels([1, 3], &[panel(0..1, 0..3)], |_, out: &mut [f32]| {
            out.fill(7.0)
        });
        assert_eq!(row, [7.0; 3]);
    }
}
