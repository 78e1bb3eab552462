//! Attention over pages in plain tensor operations, and by the kernel for contiguous caches where there is one.

use burn::tensor::{Int, Tensor, TensorData};

use super::{Layout, Sizes, Span};
use crate::mla_decode;

/// See [`super::mla_paged`]. Neighbouring sequences with equally many rows are computed together, over their pages
/// gathered next to each other.
pub(super) fn mla_paged(
    [q_nope, q_pe]: [Tensor<3>; 2],
    kv_b: Tensor<2>,
    cache: Tensor<2>,
    (layout, sizes): (&Layout, Sizes),
) -> Tensor<3> {
    let Sizes {
        heads,
        nope,
        latent,
        value,
        ..
    } = sizes;
    let up = kv_b.reshape([latent, heads, nope + value]);
    let w_uk = up.clone().narrow(2, 0, nope).permute([1, 2, 0]); // [H, N, C]
    let w_uv = up.narrow(2, nope, value).permute([1, 0, 2]); // [H, C, V]
    let q_latent = q_nope.swap_dims(0, 1).matmul(w_uk).swap_dims(0, 1); // [rows, H, C]
    let mut row = 0;
    let mut parts = Vec::new();
    for spans in layout.spans.chunk_by(|a, b| a.length == b.length) {
        let (batch, queries) = (spans.len(), spans[0].length);
        let rows = |x: &Tensor<3>| {
            let part = x.clone().narrow(0, row, batch * queries);
            let [_, _, width] = part.dims();
            part.reshape([batch, queries, heads, width])
        };
        let (latents, lengths) = gathered(&cache, spans, layout);
        let c_kv = latents.clone().narrow(2, 0, latent);
        let k_pe = latents.narrow(2, latent, sizes.rope);
        let part = mla_decode::mla_decode(rows(&q_latent), rows(&q_pe), c_kv, k_pe, lengths);
        parts.push(part.reshape([batch * queries, heads, latent]));
        row += batch * queries;
    }
    Tensor::cat(parts, 0)
        .swap_dims(0, 1)
        .matmul(w_uv)
        .swap_dims(0, 1) // [rows, H, V]
}

/// The latents of some sequences, `[B, S, C + R]`, and how many of the S each has. `[B]`
fn gathered(cache: &Tensor<2>, spans: &[Span], layout: &Layout) -> (Tensor<3>, Tensor<1, Int>) {
    let device = cache.device();
    let [_, width] = cache.dims();
    let longest = spans.iter().map(Span::end).max().unwrap_or(0);
    let slots = spans.iter().flat_map(|span| {
        // What is behind the end is not looked at.
        (0..longest).map(|position| layout.slot(span, position.min(span.end() - 1)) as i32)
    });
    let slots: Vec<i32> = slots.collect();
    let ends: Vec<i32> = spans.iter().map(|span| span.end() as i32).collect();
    let ints = |values: Vec<i32>| {
        let count = values.len();
        Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
    };
    let latents = cache.clone().select(0, ints(slots));
    (latents.reshape([spans.len(), longest, width]), ints(ends))
}
