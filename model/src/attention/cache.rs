//! The latent cache: per token and layer c_kv (C numbers) and the rotated shared key (R numbers).

use burn::tensor::{Shape, Tensor};

/// The latents of one layer, grown by doubling so that appending a token does not copy the rest.
#[derive(Clone, Debug, Default)]
pub struct LayerCache {
    stored: Option<(Tensor<3>, Tensor<3>)>, // [B, capacity, C], [B, capacity, R]
    length: usize,
}

impl LayerCache {
    /// Cached tokens, S.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends `[B, T, C]` and `[B, T, R]`; returns all that is cached.
    pub(super) fn append(&mut self, c_kv: Tensor<3>, k_pe: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        /// Tokens for which room is made at first.
        const SMALLEST: usize = 64;
        let added = c_kv.dims()[1];
        let length = self.length + added;
        let (c_room, k_room) = match self.stored.take() {
            Some((c_room, k_room)) if c_room.dims()[1] >= length => (c_room, k_room),
            stored => {
                let capacity = length.next_power_of_two().max(SMALLEST);
                let (c_old, k_old) = stored.unzip();
                (
                    with_room(c_old, &c_kv, self.length, capacity),
                    with_room(k_old, &k_pe, self.length, capacity),
                )
            }
        };
        let added = self.length..length;
        let c_room = c_room.slice_assign(slot(&c_kv, added.clone()), c_kv);
        let k_room = k_room.slice_assign(slot(&k_pe, added), k_pe);
        self.length = length;
        self.stored = Some((c_room.clone(), k_room.clone()));
        (c_room.narrow(1, 0, length), k_room.narrow(1, 0, length))
    }
}

fn slot(values: &Tensor<3>, tokens: std::ops::Range<usize>) -> [std::ops::Range<usize>; 3] {
    let [batch, _, width] = values.dims();
    [0..batch, tokens, 0..width]
}

fn with_room(
    old: Option<Tensor<3>>,
    like: &Tensor<3>,
    length: usize,
    capacity: usize,
) -> Tensor<3> {
    let [batch, _, width] = like.dims();
    let options = (&like.device(), like.dtype());
    let room = Tensor::zeros(Shape::new([batch, capacity, width]), options);
    match old {
        Some(old) => room.slice_assign(slot(like, 0..length), old.narrow(1, 0, length)),
        None => room,
    }
}

/// The latents of all layers.
#[derive(Clone, Debug)]
pub struct LatentCache {
    pub(crate) layers: Vec<LayerCache>,
}

impl LatentCache {
    /// An empty cache for a model of `layers` layers.
    pub fn new(layers: usize) -> Self {
        Self {
            layers: vec![LayerCache::default(); layers],
        }
    }

    /// Cached tokens per sequence.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::len)
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
