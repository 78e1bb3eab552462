//! From hidden states to what a token is chosen from: whole logits only where the choice needs them.

use burn::tensor::{Int, Tensor, TensorData};
use deepburn_model::transformer::Transformer;

use crate::{engine::EngineError, sampler::SamplerError};

/// What a position's token is chosen from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Row<'a> {
    /// The most probable token, found on the device.
    Best(u32),
    /// All logits. `[W]`
    Logits(&'a [f32]),
}

/// The results of several positions.
pub(super) struct Rows {
    best: Vec<u32>,
    logits: Vec<f32>,
    vocabulary: usize,
    /// For every row whether it is among the best ones, and which.
    places: Vec<(bool, usize)>,
}

impl Rows {
    /// Applies the output head; `plain` says which rows need no more than the most probable token.
    ///
    /// # Shapes
    /// - `hidden`: `[rows, D]`
    pub(super) fn new(
        model: &Transformer,
        hidden: Tensor<2>,
        plain: &[bool],
    ) -> Result<Self, EngineError> {
        let logits = model.logits(hidden); // [rows, W]
        let [_, vocabulary] = logits.dims();
        let (mut best, mut others) = (Vec::new(), Vec::new());
        let places = plain.iter().enumerate().map(|(row, &plain)| {
            let rows = if plain { &mut best } else { &mut others };
            rows.push(row);
            (plain, rows.len() - 1)
        });
        let places = places.collect();
        Ok(Self {
            best: match best.is_empty() {
                true => Vec::new(),
                false => best_tokens(chosen(&logits, &best))?,
            },
            logits: match others.is_empty() {
                true => Vec::new(),
                false => numbers(chosen(&logits, &others))?,
            },
            vocabulary,
            places,
        })
    }

    /// The result of one position.
    pub(super) fn row(&self, row: usize) -> Row<'_> {
        match self.places[row] {
            (true, at) => Row::Best(self.best[at]),
            (false, at) => {
                Row::Logits(&self.logits[at * self.vocabulary..(at + 1) * self.vocabulary])
            }
        }
    }
}

/// Some of the rows, all of them without a copy.
fn chosen(logits: &Tensor<2>, rows: &[usize]) -> Tensor<2> {
    match rows.len() == logits.dims()[0] {
        true => logits.clone(),
        false => logits.clone().select(0, indices(rows, logits)),
    }
}

/// Row numbers on the device of `like`.
pub(super) fn indices<const N: usize>(rows: &[usize], like: &Tensor<N>) -> Tensor<1, Int> {
    let rows: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    let count = rows.len();
    Tensor::from_data(TensorData::new(rows, [count]), &like.device())
}

fn best_tokens(logits: Tensor<2>) -> Result<Vec<u32>, EngineError> {
    let [_, len] = logits.dims();
    let (values, tokens) = logits.max_dim_with_indices(1);
    let tokens = tokens.try_into_data().map_err(EngineError::Device)?;
    let tokens: Vec<u32> = tokens.iter::<u32>().collect();
    for (&token, value) in tokens.iter().zip(numbers(values)?) {
        if value.is_nan() || value == f32::INFINITY {
            let index = token as usize;
            return Err(SamplerError::Logit { index, value }.into());
        }
        if value == f32::NEG_INFINITY {
            return Err(SamplerError::NoCandidate { len }.into());
        }
    }
    Ok(tokens)
}

fn numbers(values: Tensor<2>) -> Result<Vec<f32>, EngineError> {
    let data = values.try_into_data().map_err(EngineError::Device)?;
    Ok(data.iter::<f32>().collect())
}
