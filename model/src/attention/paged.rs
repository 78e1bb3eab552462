//! Attention over a latent cache in pages: the form for serving, where rows of several sequences are computed together.

use burn::tensor::{Shape, Tensor};
use deepburn_kernels::{
    mla_paged::{Layout, append, mla_paged},
    rope::Rotation,
};

use super::Attention;

/// The latents of all layers, main model first and then prediction modules, in pages that sequences share out among
/// themselves. Which page belongs to whom is not known here.
#[derive(Clone, Debug)]
pub struct PagedCache {
    pub(crate) layers: Vec<LayerPages>,
}

impl PagedCache {
    /// An empty cache of `layers` layers that grows, by doubling, to `pages` pages.
    pub(crate) fn new(layers: usize, pages: usize) -> Self {
        let layer = LayerPages {
            stored: None,
            limit: pages,
        };
        Self {
            layers: vec![layer; layers],
        }
    }
}

/// The latents of one layer: c_kv and the rotated shared key side by side.
#[derive(Clone, Debug)]
pub struct LayerPages {
    stored: Option<Tensor<2>>, // [slots, C + R]
    limit: usize,
}

impl LayerPages {
    /// Puts the rows' latents `[rows, C + R]` into their slots; returns the cache.
    fn append(&mut self, latents: Tensor<2>, layout: &Layout) -> Tensor<2> {
        /// Pages for which room is made at first.
        const SMALLEST: usize = 16;
        let pages = layout.spans.iter().flat_map(|span| &span.pages);
        let needed = pages.max().map_or(0, |&page| page as usize + 1);
        let stored = self.stored.take();
        let room = match stored {
            Some(stored) if stored.dims()[0] >= needed * layout.page => stored,
            stored => {
                let pages = needed.next_power_of_two().max(SMALLEST);
                let pages = pages.min(self.limit).max(needed);
                let [_, width] = latents.dims();
                let options = (&latents.device(), latents.dtype());
                let room = Tensor::zeros(Shape::new([pages * layout.page, width]), options);
                match stored {
                    Some(old) => room.slice_assign([0..old.dims()[0], 0..width], old),
                    None => room,
                }
            }
        };
        let cache = append(room, latents, layout);
        self.stored = Some(cache.clone());
        cache
    }
}

impl Attention {
    /// Puts the latents of `x` into the cache; every row attends over its sequence up to itself.
    ///
    /// # Shapes
    /// - `x`: `[1, rows, D]`, as the result
    pub fn paged(
        &self,
        x: Tensor<3>,
        rope: &Rotation,
        cache: &mut LayerPages,
        layout: &Layout,
    ) -> Tensor<3> {
        let [_, rows, _] = x.dims();
        let (q_nope, q_pe) = self.queries(x.clone(), rope);
        let (c_kv, k_pe) = self.latents(x, rope);
        let latents = Tensor::cat(vec![c_kv, k_pe], 2).squeeze_dim::<2>(0); // [rows, C + R]
        let cache = cache.append(latents, layout);
        let queries = [q_nope, q_pe].map(|q| q.squeeze_dim::<3>(0)); // [rows, H, N or R]
        let out = mla_paged(queries, self.kv_b_proj.weight.val(), cache, layout);
        self.o_proj
            .forward(out.reshape([1, rows, self.heads * self.value]))
    }
}
