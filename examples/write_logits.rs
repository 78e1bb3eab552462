//! Writes the logits of a checkpoint for a fixed sequence of tokens, for comparison with another implementation:
//! `cargo run --release --example write_logits CHECKPOINT OUT.safetensors`, then
//! `tests/oracle/check_transformers.py CHECKPOINT OUT.safetensors`.

use std::{collections::HashMap, path::PathBuf};

use anyhow::Context;
use burn::tensor::{Device, Int, Tensor, TensorData};
use deepburn_model::{attention::AttentionMask, checkpoint};
use safetensors::{Dtype, serialize_to_file, tensor::TensorView};

const BATCH: usize = 2;
const LENGTH: usize = 48;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (dir, out) = arguments
        .next()
        .zip(arguments.next())
        .context("usage: write_logits CHECKPOINT OUT")?;
    let device = Device::flex();
    let (config, model) = checkpoint::load(&dir, &device)?;
    let ids: Vec<i64> = (0..BATCH * LENGTH)
        .map(|at| (at * 7919 + 13) as i64 % config.vocab_size as i64)
        .collect();
    let tokens =
        Tensor::<2, Int>::from_data(TensorData::new(ids.clone(), [BATCH, LENGTH]), &device);
    let hidden = model
        .forward(tokens, &AttentionMask::causal(LENGTH, &device))
        .hidden;
    let logits: Vec<f32> = model.logits(hidden).into_data().iter().collect();

    let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let logits: Vec<u8> = logits
        .iter()
        .flat_map(|logit| logit.to_le_bytes())
        .collect();
    let shape = vec![BATCH, LENGTH, config.vocab_size];
    let tensors = HashMap::from([
        (
            "input_ids",
            TensorView::new(Dtype::I64, shape[..2].to_vec(), &ids)?,
        ),
        ("logits", TensorView::new(Dtype::F32, shape, &logits)?),
    ]);
    serialize_to_file(tensors, None, &out).with_context(|| out.display().to_string())
}
