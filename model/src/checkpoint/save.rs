//! Writing weights, tensor by tensor.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
    sync::Arc,
};

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{Tensor, bf16},
};
use deepburn_kernels::fp8::tiles::{self, ScaleFormat, Tile};
use safetensors::{Dtype, SafeTensors, View, serialize_to_file};
use serde_json::json;

use super::{
    CheckpointError, StoredType, hf_config,
    hf_names::{Stored, is_always_f32, is_quantized, mtp_copies, scales_of, stored},
    load::transpose,
    write_file,
};
use crate::{
    config::ModelConfig, mmap::MappedFile, parameters::Registry, transformer::Transformer,
};

/// How weights are written.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// Weights are split into files of at most this size, unless one tensor is larger.
    pub max_shard_bytes: u64,
    /// The type of the weights.
    pub dtype: StoredType,
}

impl Default for SaveOptions {
    /// Single precision in files of at most 5 GB, as transformers writes them.
    fn default() -> Self {
        Self {
            max_shard_bytes: 5_000_000_000,
            dtype: StoredType::F32,
        }
    }
}

/// Writes `config.json` and the weights into the existing folder `dir`.
///
/// # Errors
/// What the file system answers; with [`StoredType::Fp8`] also a weight with a NaN or an infinity, which has no scale.
pub fn save(
    model: &Transformer,
    config: &ModelConfig,
    dir: &Path,
    options: &SaveOptions,
) -> Result<(), CheckpointError> {
    let registry = Registry::of(model);
    let name = |id| registry.path(id).map(|path| (path.to_owned(), 0));
    let tensors = collect(model, config, dir, options.dtype, &name)?;
    write_config(dir, config, options.dtype)?;
    write_shards(tensors, dir, options.max_shard_bytes)
}

/// A file of a checkpoint that several processes write.
pub struct Shard<'a> {
    /// Which one, from 0.
    pub number: usize,
    /// How many there are.
    pub count: usize,
    /// The name in the model of each parameter to be written, and the number of the first expert in it.
    pub name: &'a dyn Fn(ParamId) -> Option<(String, usize)>,
}

/// Writes a part of a model in single precision as one of several files of weights, into the folder `dir`, which
/// [`write_index`] then completes.
///
/// # Errors
/// What the file system answers.
pub fn save_shard(
    part: &impl Module,
    config: &ModelConfig,
    dir: &Path,
    shard: &Shard<'_>,
) -> Result<(), CheckpointError> {
    let tensors = collect(part, config, dir, StoredType::F32, shard.name)?;
    let path = dir.join(shard_name(shard.number, shard.count));
    write_tensors(tensors.into_iter().collect(), &path)
}

/// Completes a folder of `count` files of [`save_shard`] with `config.json` and the index.
///
/// # Errors
/// What the file system answers, or a file that is missing or malformed.
pub fn write_index(dir: &Path, config: &ModelConfig, count: usize) -> Result<(), CheckpointError> {
    write_config(dir, config, StoredType::F32)?;
    let (mut weight_map, mut total) = (BTreeMap::new(), 0);
    for number in 0..count {
        let file = shard_name(number, count);
        let path = dir.join(&file);
        let mapped = MappedFile::open(&path).map_err(CheckpointError::io(&path))?;
        let parsed = SafeTensors::deserialize(mapped.bytes())
            .map_err(|error| CheckpointError::format(&path, error.to_string()))?;
        for (name, view) in parsed.tensors() {
            total += view.data().len() as u64;
            weight_map.insert(name, file.clone());
        }
    }
    render_index(dir, &weight_map, total)
}

fn write_config(
    dir: &Path,
    config: &ModelConfig,
    dtype: StoredType,
) -> Result<(), CheckpointError> {
    let text = hf_config::render(config, dtype);
    write_file(&dir.join("config.json"), text.as_bytes())
}

/// The name of file `number`, from 0, of `count` files of weights.
pub fn shard_name(number: usize, count: usize) -> String {
    format!("model-{:05}-of-{count:05}.safetensors", number + 1)
}

/// The tensors of a part of a model by the names that they are stored under, with the copies that MTP modules have of
/// those among them that are shared.
fn collect(
    part: &impl Module,
    config: &ModelConfig,
    dir: &Path,
    dtype: StoredType,
    name: &dyn Fn(ParamId) -> Option<(String, usize)>,
) -> Result<BTreeMap<String, StoredTensor>, CheckpointError> {
    let layers = config.num_hidden_layers;
    let mut collector = Collector {
        name,
        layers,
        dtype,
        tensors: BTreeMap::new(),
        without_scale: None,
    };
    part.visit(&mut collector);
    if let Some(name) = collector.without_scale {
        let what = format!("{name}: has NaN or infinity and cannot be written as FP8");
        return Err(CheckpointError::format(dir, what));
    }
    let mut tensors = collector.tensors;
    for depth in 0..config.num_nextn_predict_layers {
        for (copy, original) in mtp_copies(layers, depth, config.tie_word_embeddings) {
            if let Some(original) = tensors.get(&original).cloned() {
                tensors.insert(copy, original);
            }
        }
    }
    Ok(tensors)
}

fn write_shards(
    tensors: BTreeMap<String, StoredTensor>,
    dir: &Path,
    max_shard_bytes: u64,
) -> Result<(), CheckpointError> {
    let mut shards: Vec<Vec<(String, StoredTensor)>> = vec![Vec::new()];
    let (mut filled, mut total) = (0, 0);
    for (name, tensor) in tensors {
        let bytes = tensor.data_len() as u64;
        if filled > 0 && filled + bytes > max_shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        total += bytes;
        shards
            .last_mut()
            .expect("starts with one shard")
            .push((name, tensor));
    }
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (number, shard) in shards.into_iter().enumerate() {
        let file = match count {
            1 => "model.safetensors".to_owned(),
            _ => shard_name(number, count),
        };
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), file.clone())));
        write_tensors(shard, &dir.join(file))?;
    }
    if count == 1 {
        return Ok(());
    }
    render_index(dir, &weight_map, total)
}

fn write_tensors(tensors: Vec<(String, StoredTensor)>, path: &Path) -> Result<(), CheckpointError> {
    // Made here, with the permissions that others have: the writer below makes a private file.
    let permissions = File::create(path)
        .and_then(|file| file.metadata())
        .map_err(CheckpointError::io(path))?
        .permissions();
    // transformers asks for this entry.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    serialize_to_file(tensors, Some(metadata), path)
        .map_err(|error| CheckpointError::format(path, error.to_string()))?;
    fs::set_permissions(path, permissions).map_err(CheckpointError::io(path))
}

fn render_index(
    dir: &Path,
    weight_map: &BTreeMap<String, String>,
    total: u64,
) -> Result<(), CheckpointError> {
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    let text = serde_json::to_string_pretty(&index).expect("a map with string keys");
    write_file(&dir.join("model.safetensors.index.json"), text.as_bytes())
}

struct Collector<'a> {
    name: &'a dyn Fn(ParamId) -> Option<(String, usize)>,
    layers: usize,
    dtype: StoredType,
    tensors: BTreeMap<String, StoredTensor>,
    /// The first weight that should be quantised but has numbers that are not finite.
    without_scale: Option<String>,
}

impl Collector<'_> {
    /// Adds a tensor of the given stored sizes, and its scales if it is quantised.
    fn add(&mut self, name: String, source: Source, shape: Vec<usize>) {
        let content = match self.dtype {
            _ if is_always_f32(&name) => Content::F32(source),
            StoredType::F32 => Content::F32(source),
            StoredType::Fp8 if is_quantized(&name) => {
                let values = source.read(&shape);
                if !values.iter().all(|value| value.is_finite()) {
                    self.without_scale.get_or_insert(name.clone());
                }
                let scales: Arc<[f32]> =
                    tiles::scales(&values, shape[1], Tile::Block, ScaleFormat::Float32).into();
                let tensor = StoredTensor {
                    content: Content::Scales(scales.clone()),
                    shape: Tile::Block.scale_shape([shape[0], shape[1]]).to_vec(),
                };
                self.tensors.insert(scales_of(&name), tensor);
                Content::Fp8(source, scales)
            }
            StoredType::Bf16 | StoredType::Fp8 => Content::Bf16(source),
        };
        self.tensors.insert(name, StoredTensor { content, shape });
    }
}

impl ModuleVisitor for Collector<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some((path, first_expert)) = (self.name)(param.id) else {
            return;
        };
        let tensor = param.val();
        let shape = tensor.dims().to_vec();
        let values = tensor.reshape([shape.iter().product::<usize>()]);
        let source = |values, turned| Source { values, turned };
        match stored(&path, self.layers) {
            Stored::AsIs(name) => self.add(name, source(values, false), shape),
            Stored::Transposed(name) => {
                self.add(name, source(values, true), vec![shape[1], shape[0]]);
            }
            Stored::Experts { prefix, suffix } => {
                let [experts, rows, columns] = [shape[0], shape[1], shape[2]];
                let size = rows * columns;
                for expert in 0..experts {
                    let values = values.clone().narrow(0, expert * size, size);
                    let name = format!("{prefix}{}{suffix}", first_expert + expert);
                    self.add(name, source(values, true), vec![columns, rows]);
                }
            }
        }
    }
}

/// A tensor to be written.
#[derive(Clone)]
struct StoredTensor {
    content: Content,
    shape: Vec<usize>,
}

#[derive(Clone)]
enum Content {
    F32(Source),
    Bf16(Source),
    Fp8(Source, Arc<[f32]>),
    Scales(Arc<[f32]>),
}

/// Elements that are read from the device, and turned, only when their turn comes.
#[derive(Clone)]
struct Source {
    values: Tensor<1>,
    turned: bool,
}

impl Source {
    /// The elements in the order of the sizes that they are stored with.
    fn read(&self, shape: &[usize]) -> Vec<f32> {
        let values: Vec<f32> = self.values.to_data().iter().collect();
        if self.turned {
            transpose(&values, shape[1])
        } else {
            values
        }
    }
}

impl View for StoredTensor {
    fn dtype(&self) -> Dtype {
        match self.content {
            Content::F32(_) | Content::Scales(_) => Dtype::F32,
            Content::Bf16(_) => Dtype::BF16,
            Content::Fp8(..) => Dtype::F8_E4M3,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let f32_bytes =
            |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
        let bytes = match &self.content {
            Content::F32(source) => f32_bytes(&source.read(&self.shape)),
            Content::Bf16(source) => {
                let values = source.read(&self.shape).into_iter();
                values
                    .flat_map(|value| bf16::from_f32(value).to_le_bytes())
                    .collect()
            }
            Content::Fp8(source, scales) => tiles::quantize(
                &source.read(&self.shape),
                self.shape[1],
                Tile::Block,
                scales,
            ),
            Content::Scales(scales) => f32_bytes(scales),
        };
        bytes.into()
    }

    fn data_len(&self) -> usize {
        let elements: usize = self.shape.iter().product();
        elements * self.dtype().bitsize() / 8
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use safetensors::SafeTensors;

    use super::*;
    use crate::{
        checkpoint::{load, write_directory},
        config::tests::tiny,
    };

    fn saved(model: &Transformer, dtype: StoredType) -> (tempfile::TempDir, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let options = SaveOptions {
            dtype,
            ..SaveOptions::default()
        };
        save(model, &tiny(), dir.path(), &options).unwrap();
        let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
        (dir, bytes)
    }

    #[test]
    fn each_tensor_has_the_type_that_upstream_gives_it() {
        let device = Device::flex();
        let model = Transformer::new(&tiny(), 5, &device);
        for stored_type in [StoredType::F32, StoredType::Bf16, StoredType::Fp8] {
            let (dir, bytes) = saved(&model, stored_type);
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let mut quantized = 0;
            for (name, view) in file.tensors() {
                let expected = match stored_type {
                    _ if is_always_f32(&name) || name.ends_with("_scale_inv") => Dtype::F32,
                    StoredType::F32 => Dtype::F32,
                    StoredType::Fp8 if is_quantized(&name) => {
                        quantized += 1;
                        assert!(file.tensor(&scales_of(&name)).is_ok(), "{name}");
                        Dtype::F8_E4M3
                    }
                    _ => Dtype::BF16,
                };
                assert_eq!(view.dtype(), expected, "{name}");
            }
            // Four layers with five projections in attention each; a dense part of three, and three more in each of
            // eight experts and a shared one.
            let expected = if stored_type == StoredType::Fp8 {
                4 * 5 + 3 + 3 * 9 * 3
            } else {
                0
            };
            assert_eq!(quantized, expected);
            load(dir.path(), &device).unwrap();
        }
    }

    #[test]
    fn bf16_rounds_to_the_nearest_and_the_even_one_of_two() {
        let shape = vec![4];
        // 1 is followed by 1 + 2^-7, after which comes 1 + 2^-6.
        let values = [1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8), 1.004, -1.0];
        let values = Tensor::from_data(values, &Device::flex());
        let turned = false;
        let content = Content::Bf16(Source { values, turned });
        let bytes = StoredTensor { content, shape }.data().into_owned();
        let found: Vec<f32> = bytes
            .chunks_exact(2)
            .map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f32())
            .collect();
        assert_eq!(found, [1.0, 1.0 + 2f32.powi(-6), 1.0078125, -1.0]);
    }

    #[test]
    fn what_has_no_scale_is_not_written() {
        let config = tiny();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut model = Transformer::new(&config, 5, &Device::flex());
            let weight = &mut model.layers[1].self_attn.o_proj.weight;
            *weight = weight.clone().map(|values| values.mul_scalar(bad));
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("out");
            let options = SaveOptions {
                dtype: StoredType::Fp8,
                ..SaveOptions::default()
            };
            let message = write_directory(&path, |dir| save(&model, &config, dir, &options))
                .unwrap_err()
                .to_string();
            let expected = "model.layers.1.self_attn.o_proj.weight: has NaN or infinity and cannot";
            assert!(message.contains(expected), "{message}");
            assert!(!path.exists());
        }
    }
}
