//! Attention over a latent cache in pages: MLA in its absorbed form (report section 2.1.1) for rows of several sequences.
//!
//! The cache of a layer is one matrix of slots. A page is a run of neighbouring slots; a sequence has any pages in any
//! order, and several sequences may have the same ones. So sequences grow and end without moving what is cached.

mod flex;
mod reference;

use burn::tensor::Tensor;

use crate::flex::is_native_f32;

/// Rows of several sequences, one after another, and where their latents are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Slots per page.
    pub page: usize,
    /// The rows' sequences, in order.
    pub spans: Vec<Span>,
}

/// The rows of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Pages of the sequence, enough for all its positions.
    pub pages: Vec<u32>,
    /// Position of the first row: what is cached before it.
    pub start: usize,
    /// Rows, at least one.
    pub length: usize,
}

impl Span {
    /// Positions up to the last row.
    pub fn end(&self) -> usize {
        self.start + self.length
    }
}

impl Layout {
    /// All rows.
    pub fn rows(&self) -> usize {
        self.spans.iter().map(|span| span.length).sum()
    }

    /// The position of every row.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.spans.iter().flat_map(|span| span.start..span.end())
    }

    /// The slot of a position.
    fn slot(&self, span: &Span, position: usize) -> usize {
        span.pages[position / self.page] as usize * self.page + position % self.page
    }
}

/// The cache with the rows' latents in their slots. What else is in it stays; in place if nobody else holds it.
///
/// # Shapes
/// - `cache`: `[slots, C + R]`, as the result; `latents`: `[rows, C + R]`
pub fn append(cache: Tensor<2>, latents: Tensor<2>, layout: &Layout) -> Tensor<2> {
    let [_, width] = cache.dims();
    let mut cache = cache;
    let mut row = 0;
    for span in &layout.spans {
        let mut position = span.start;
        while position < span.end() {
            let in_page = layout.page - position % layout.page;
            let count = in_page.min(span.end() - position);
            let slot = layout.slot(span, position);
            let values = latents.clone().narrow(0, row, count);
            cache = cache.slice_assign([slot..slot + count, 0..width], values);
            position += count;
            row += count;
        }
    }
    cache
}

/// Per row and head `softmax(q W_UK c + q_pe k_pe) c W_UV`, each row over the positions of its sequence up to its own.
///
/// `kv_b` has, side by side for every head, N columns that make keys of a latent and V that make values. Not
/// differentiable: the result is a constant of the backward pass. Native on Flex for f32, where sums are in an order that
/// does not depend on the other sequences.
///
/// # Shapes
/// - `q_nope`: `[rows, H, N]`, `q_pe`: `[rows, H, R]`, both scaled for the softmax
/// - `kv_b`: `[C, H (N + V)]`
/// - `cache`: `[slots, C + R]`, the rows' own latents included
/// - result: `[rows, H, V]`
///
/// # Panics
/// If sizes do not fit each other.
pub fn mla_paged(
    [q_nope, q_pe]: [Tensor<3>; 2],
    kv_b: Tensor<2>,
    cache: Tensor<2>,
    layout: &Layout,
) -> Tensor<3> {
    let sizes = Sizes::of(
        [q_nope.dims(), q_pe.dims()],
        kv_b.dims(),
        cache.dims(),
        layout,
    );
    let device = q_nope.device();
    if is_native_f32(&device, q_nope.dtype()) && !device.is_autodiff() {
        flex::mla_paged([q_nope, q_pe], kv_b, cache, (layout, sizes))
    } else {
        reference::mla_paged([q_nope, q_pe], kv_b, cache, (layout, sizes))
    }
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    heads: usize,
    nope: usize,
    rope: usize,
    latent: usize,
    value: usize,
}

impl Sizes {
    fn of(
        [q_nope, q_pe]: [[usize; 3]; 2],
        kv_b: [usize; 2],
        cache: [usize; 2],
        layout: &Layout,
    ) -> Self {
        let [rows, heads, nope] = q_nope;
        let [latent, columns] = kv_b;
        let rope = q_pe[2];
        assert!(
            rows == layout.rows()
                && q_pe == [rows, heads, rope]
                && cache[1] == latent + rope
                && columns.is_multiple_of(heads)
                && columns / heads >= nope,
            "q_nope {q_nope:?}, q_pe {q_pe:?}, kv_b {kv_b:?} and cache {cache:?} do not fit {} rows",
            layout.rows()
        );
        for span in &layout.spans {
            let slots = span
                .pages
                .iter()
                .map(|&page| (page as usize + 1) * layout.page);
            assert!(
                span.length > 0
                    && span.pages.len() * layout.page >= span.end()
                    && slots.max().is_some_and(|last| last <= cache[0]),
                "{span:?} of pages of {} does not fit cache {cache:?}",
                layout.page
            );
        }
        Self {
            heads,
            nope,
            rope,
            latent,
            value: columns / heads - nope,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;

    fn layout() -> Layout {
        let span = |pages: &[u32], start, length| Span {
            pages: pages.to_vec(),
            start,
            length,
        };
        // A prompt, single steps, a chunk that begins inside a page, pages in any order and shared.
        Layout {
            page: 4,
            spans: vec![
                span(&[2, 0, 5, 1, 7], 0, 19),
                span(&[3], 0, 1),
                span(&[2, 0, 6], 9, 1),
                span(&[2, 0, 9, 8], 10, 6),
                span(&[2, 0, 10], 8, 1),
            ],
        }
    }

    /// A chunk and a single step behind more positions than are attended to at a time; the chunk's first rows see none of
    /// the last ones.
    fn long() -> Layout {
        let span = |start, length| Span {
            pages: (0..393).rev().collect(),
            start,
            length,
        };
        Layout {
            page: 6,
            spans: vec![span(1500, 70), span(1100, 1)],
        }
    }

    fn inputs(
        device: &Device,
        layout: &Layout,
        [heads, nope, rope, latent, value]: [usize; 5],
    ) -> ([Tensor<3>; 2], Tensor<2>, Tensor<2>) {
        let random3 = |width| {
            let shape = [layout.rows(), heads, width];
            Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), device)
        };
        let random2 =
            |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.5), device);
        (
            [random3(nope), random3(rope)],
            random2([latent, heads * (nope + value)]),
            random2([slots(layout), latent + rope]),
        )
    }

    fn slots(layout: &Layout) -> usize {
        let pages = layout.spans.iter().flat_map(|span| &span.pages);
        (*pages.max().expect("some") as usize + 1) * layout.page
    }

    /// Sums of up to 40 products of numbers around one.
    #[test]
    fn native_agrees_with_reference() {
        let device = Device::flex();
        let sizes = [[3, 5, 2, 7, 6], [1, 4, 4, 4, 4], [70, 3, 2, 5, 4]];
        for (layout, sizes) in [layout(), long()]
            .into_iter()
            .flat_map(|layout| sizes.map(|sizes| (layout.clone(), sizes)))
        {
            let (q, kv_b, cache) = inputs(&device, &layout, sizes);
            let found = mla_paged(q.clone(), kv_b.clone(), cache.clone(), &layout);
            let all = Sizes::of(
                [q[0].dims(), q[1].dims()],
                kv_b.dims(),
                cache.dims(),
                &layout,
            );
            let expected = reference::mla_paged(q, kv_b, cache, (&layout, all));
            found
                .into_data()
                .assert_approx_eq(&expected.into_data(), Tolerance::<f32>::absolute(2e-5));
        }
    }

    #[test]
    fn a_sequence_alone_gives_the_same_numbers() {
        let device = Device::flex();
        let all = layout();
        let (q, kv_b, cache) = inputs(&device, &all, [3, 5, 2, 7, 6]);
        let together = mla_paged(q.clone(), kv_b.clone(), cache.clone(), &all);
        let mut row = 0;
        for span in &all.spans {
            let part = |x: &Tensor<3>| x.clone().narrow(0, row, span.length);
            let alone = Layout {
                page: 4,
                spans: vec![span.clone()],
            };
            let found = mla_paged(
                [part(&q[0]), part(&q[1])],
                kv_b.clone(),
                cache.clone(),
                &alone,
            );
            assert_eq!(found.into_data(), part(&together).into_data());
            row += span.length;
        }
    }

    #[test]
    fn latents_go_to_their_slots_and_nothing_else_changes() {
        let device = Device::flex();
        let layout = Layout {
            page: 4,
            spans: vec![
                Span {
                    pages: vec![2, 0],
                    start: 3,
                    length: 4,
                },
                Span {
                    pages: vec![1],
                    start: 0,
                    length: 1,
                },
            ],
        };
        let latents = Tensor::<2>::from_data([[1.0], [2.0], [3.0], [4.0], [5.0]], &device);
        let cache = append(Tensor::zeros([12, 1], &device), latents, &layout);
        let found: Vec<f32> = cache.into_data().iter().collect();
        assert_eq!(
            found,
            [2.0, 3.0, 4.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
        );
        assert_eq!(layout.positions().collect::<Vec<_>>(), [3, 4, 5, 6, 0]);
    }
}
