//! Reading weights: each parameter is converted on its own.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{DType, Device, Tensor, TensorData},
};
use deepburn_kernels::compact::CompactFormat;
use safetensors::{Dtype, tensor::TensorView};

use super::{
    CheckpointError,
    elements::elements,
    files::{StoredTensors, WeightFiles},
    hf_config::{self, HfConfigError},
    hf_names::{Stored, mtp_copies, scaled_by, scales_of, stored},
};
use crate::{config::ModelConfig, parameters::ModulePath, transformer::Transformer};

/// Reads `config.json` of the checkpoint in `dir`, or `dir` itself if it is such a file.
///
/// # Errors
/// An unreadable file or one that describes no model of this architecture.
pub fn read_config(dir: &Path) -> Result<ModelConfig, CheckpointError> {
    read_config_as(dir, hf_config::parse)
}

fn read_config_as<T>(
    dir: &Path,
    parse: impl FnOnce(&str) -> Result<T, HfConfigError>,
) -> Result<T, CheckpointError> {
    let path: PathBuf = if dir.is_file() {
        dir.to_owned()
    } else {
        dir.join("config.json")
    };
    let text = std::fs::read_to_string(&path).map_err(CheckpointError::io(&path))?;
    parse(&text).map_err(|source| CheckpointError::Config { path, source })
}

/// Reads the checkpoint in `dir`. Weights stored as f32, f16, bf16 or FP8 are held as f32.
///
/// # Errors
/// Unreadable or malformed files; tensors that are missing, unexpected, of another shape or type or with unusable
/// scales, all of them listed.
pub fn load(dir: &Path, device: &Device) -> Result<(ModelConfig, Transformer), CheckpointError> {
    load_as(dir, device, &|_| true, None)
}

/// As [`load`], but only the parameters whose names are `wanted` are read. The others stay lazy.
///
/// # Errors
/// As [`load`]; what is not wanted may be missing or of another shape.
pub fn load_parts(
    dir: &Path,
    device: &Device,
    wanted: &dyn Fn(&str) -> bool,
) -> Result<(ModelConfig, Transformer), CheckpointError> {
    load_as(dir, device, wanted, None)
}

/// As [`load`], with weights held in a compact format as by [`Transformer::hold`]: only one layer's at a time are there in
/// single precision.
///
/// # Errors
/// As [`load`], and a device that [`CompactFormat::check`] refuses.
pub fn load_held(
    dir: &Path,
    device: &Device,
    format: CompactFormat,
) -> Result<(ModelConfig, Transformer), CheckpointError> {
    format.check(device)?;
    load_as(dir, device, &|_| true, Some(format))
}

fn load_as(
    dir: &Path,
    device: &Device,
    wanted: &dyn Fn(&str) -> bool,
    held: Option<CompactFormat>,
) -> Result<(ModelConfig, Transformer), CheckpointError> {
    let (config, quantized) = read_config_as(dir, hf_config::parse_for_weights)?;
    let files = WeightFiles::open(dir)?;
    let source = Source {
        quantized,
        wanted,
        held,
        release: &|data| files.release(data),
    };
    let model = assemble(&config, source, files.tensors()?, device);
    match model {
        Ok(model) => Ok((config, model)),
        Err(problems) => Err(CheckpointError::Tensors {
            path: dir.to_owned(),
            problems,
        }),
    }
}

/// How stored tensors are read.
struct Source<'a> {
    /// Whether `config.json` says how FP8 is scaled.
    quantized: bool,
    /// The compact format that weights are held in, if any.
    held: Option<CompactFormat>,
    /// Which parameters are read, by their names in the model.
    wanted: &'a dyn Fn(&str) -> bool,
    /// Is called with what has been read.
    release: &'a dyn Fn(&[u8]),
}

/// The model of the given tensors, or what is wrong with them.
fn assemble(
    config: &ModelConfig,
    source: Source<'_>,
    tensors: StoredTensors<'_>,
    device: &Device,
) -> Result<Transformer, Vec<String>> {
    let StoredTensors {
        by_name: tensors,
        problems,
    } = tensors;
    let mut loader = Loader {
        path: ModulePath::default(),
        layers: config.num_hidden_layers,
        device,
        source,
        unread: tensors.keys().map(String::as_str).collect(),
        tensors: &tensors,
        problems,
    };
    let model = loader.fill(Transformer::new(config, 0, device));
    for depth in 0..config.num_nextn_predict_layers {
        loader.check_copies(depth, config.tie_word_embeddings);
    }
    if config.tie_word_embeddings {
        loader.check_copy("lm_head.weight", "model.embed_tokens.weight");
    }
    let problems = loader.finish();
    if problems.is_empty() {
        Ok(model)
    } else {
        Err(problems)
    }
}

struct Loader<'a> {
    path: ModulePath,
    layers: usize,
    device: &'a Device,
    source: Source<'a>,
    tensors: &'a BTreeMap<String, TensorView<'a>>,
    unread: BTreeSet<&'a str>,
    problems: Vec<String>,
}

impl Loader<'_> {
    /// The elements of a stored tensor if it is there with the expected sizes.
    fn take(&mut self, name: &str, expected: &[usize]) -> Option<Vec<f32>> {
        let Some(view) = self.tensors.get(name) else {
            self.problems
                .push(format!("{name}: missing, expected {expected:?}"));
            return None;
        };
        self.mark_read(name, view);
        if view.shape() != expected {
            let found = view.shape();
            self.problems
                .push(format!("{name}: expected {expected:?}, found {found:?}"));
            return None;
        }
        let elements = elements(name, view, self.tensors, self.source.quantized);
        (self.source.release)(view.data());
        match elements {
            Ok(values) => Some(values),
            Err(problems) => {
                self.problems.extend(problems);
                None
            }
        }
    }

    /// The model with its parameters as they are stored.
    fn fill(&mut self, mut model: Transformer) -> Transformer {
        let Some(format) = self.source.held else {
            return model.map(self);
        };
        const HELD: &str = "single precision on a device that was checked";
        let layers = std::mem::take(&mut model.layers);
        let mut held = Vec::with_capacity(layers.len());
        self.path.enter("layers", "Transformer");
        for (index, layer) in layers.into_iter().enumerate() {
            self.path.enter(&index.to_string(), "Vec");
            let mut layer = layer.map(self);
            // Where a tensor is missing there is nothing to be held, and the model is not going to be used.
            if self.problems.is_empty() {
                layer.hold(format).expect(HELD);
            }
            held.push(layer);
            self.path.exit("Vec");
        }
        self.path.exit("Transformer");
        let mut model = model.map(self);
        if self.problems.is_empty() {
            model.hold_outside_layers(format).expect(HELD);
        }
        model.layers = held;
        model
    }

    /// Leaves a parameter unread that is not wanted.
    fn pass_over(&mut self, experts: usize) {
        let names = match stored(&self.path.join(), self.layers) {
            Stored::AsIs(name) | Stored::Transposed(name) => vec![name],
            Stored::Experts { prefix, suffix } => (0..experts)
                .map(|expert| format!("{prefix}{expert}{suffix}"))
                .collect(),
        };
        for name in names {
            if let Some(view) = self.tensors.get(&name) {
                self.mark_read(&name, view);
            }
        }
    }

    fn read(&mut self, shape: &[usize]) -> Option<Vec<f32>> {
        match stored(&self.path.join(), self.layers) {
            Stored::AsIs(name) => self.take(&name, shape),
            Stored::Transposed(name) => {
                let [rows, columns] = [shape[0], shape[1]];
                self.take(&name, &[columns, rows])
                    .map(|values| transpose(&values, columns))
            }
            Stored::Experts { prefix, suffix } => {
                let [experts, rows, columns] = [shape[0], shape[1], shape[2]];
                let mut all = Some(Vec::new());
                for expert in 0..experts {
                    let name = format!("{prefix}{expert}{suffix}");
                    let one = self.take(&name, &[columns, rows]);
                    // Go on after a failure, so that every expert's problem is listed.
                    all = all.zip(one).map(|(mut all, one)| {
                        all.reserve_exact(if all.is_empty() {
                            experts * one.len()
                        } else {
                            0
                        });
                        all.extend(transpose(&one, columns));
                        all
                    });
                }
                all
            }
        }
    }

    fn check_copies(&mut self, depth: usize, tied: bool) {
        for (copy, original) in mtp_copies(self.layers, depth, tied) {
            self.check_copy(&copy, &original);
        }
    }

    /// A stored copy of a shared matrix may be absent, but must not differ.
    fn check_copy(&mut self, copy: &str, original: &str) {
        let (Some(found), Some(expected)) = (self.tensors.get(copy), self.tensors.get(original))
        else {
            return;
        };
        self.mark_read(copy, found);
        let bytes = |name: &str| self.tensors.get(name).map(|view| view.data());
        let same_scales = found.dtype() != Dtype::F8_E4M3
            || bytes(&scales_of(copy)) == bytes(&scales_of(original));
        if found.dtype() != expected.dtype() || found.data() != expected.data() || !same_scales {
            self.problems.push(format!(
                "{copy}: differs from {original}, which it should repeat"
            ));
        }
    }

    /// FP8 is read with its scales.
    fn mark_read(&mut self, name: &str, view: &TensorView<'_>) {
        self.unread.remove(name);
        if view.dtype() == Dtype::F8_E4M3 {
            self.unread.remove(scales_of(name).as_str());
        }
    }

    /// All problems, to which come the tensors that nothing read.
    fn finish(self) -> Vec<String> {
        let is_fp8 = |name| {
            let view = self.tensors.get(name);
            view.is_some_and(|view| view.dtype() == Dtype::F8_E4M3)
        };
        let mut problems = self.problems;
        problems.extend(self.unread.iter().map(|name| match scaled_by(name) {
            Some(weight) if !is_fp8(weight) => {
                format!("{name}: scales {weight}, which is not there as F8_E4M3")
            }
            _ => format!("{name}: not a tensor of this model"),
        }));
        problems
    }
}

impl ModuleMapper for Loader<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.path.exit(container);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let shape = param.lazy_shape();
        if !(self.source.wanted)(&self.path.join()) {
            self.pass_over(shape[0]);
            return param;
        }
        let Some(values) = self.read(&shape.to_vec()) else {
            return param;
        };
        let tensor = Tensor::from_data(TensorData::new(values, shape), (self.device, DType::F32));
        // A lazy parameter takes the tensor without making its initial values first.
        let id = param.id;
        param.transform_for_load(tensor, id)
    }
}

/// Transposes a row-major matrix of `rows` rows.
pub(super) fn transpose(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    let mut turned = Vec::with_capacity(values.len());
    for column in 0..columns {
        turned.extend(values.iter().skip(column).step_by(columns));
    }
    turned
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::{
        checkpoint::{SaveOptions, StoredType, files, save},
        config::{YarnConfig, tests::tiny},
    };

    /// `config.json` and `model.safetensors` of a model with every part in it, one layer of each kind.
    fn checkpoint(dtype: StoredType) -> (Vec<u8>, Vec<u8>) {
        let config = ModelConfig {
            num_hidden_layers: 2,
            n_routed_experts: 4,
            rope_scaling: Some(YarnConfig {
                factor: 4.0,
                original_max_position_embeddings: 64,
                beta_fast: 32.0,
                beta_slow: 1.0,
                mscale: 1.0,
                mscale_all_dim: 1.0,
            }),
            ..tiny()
        };
        let dir = tempfile::tempdir().unwrap();
        let options = SaveOptions {
            dtype,
            ..SaveOptions::default()
        };
        let model = Transformer::new(&config, 5, &Device::flex());
        save(&model, &config, dir.path(), &options).unwrap();
        let read = |name| std::fs::read(dir.path().join(name)).unwrap();
        (read("config.json"), read("model.safetensors"))
    }

    /// As [`load`], from what files would hold.
    fn load_bytes(config: &[u8], weights: &[u8]) -> Result<Transformer, String> {
        let text = str::from_utf8(config).map_err(|error| error.to_string())?;
        let (config, quantized) =
            hf_config::parse_for_weights(text).map_err(|error| error.to_string())?;
        let tensors = files::tensors(&[(Path::new("model.safetensors"), weights)], None)
            .map_err(|error| error.to_string())?;
        assemble(&config, source(quantized), tensors, &Device::flex())
            .map_err(|problems| problems.join("\n"))
    }

    /// All parameters, as they are.
    fn source(quantized: bool) -> Source<'static> {
        Source {
            quantized,
            held: None,
            wanted: &|_| true,
            release: &|_| {},
        }
    }

    /// Changes, drops or adds a byte before `end`, or swaps a short piece for another one.
    fn mutate(bytes: &mut Vec<u8>, end: usize, rng: &mut ChaCha8Rng) {
        let at = rng.random_range(0..end);
        // Half of the new bytes are digits, which leave JSON what it is.
        let byte = if rng.random() {
            rng.random_range(b'0'..=b'9')
        } else {
            rng.random()
        };
        match rng.random_range(0..4) {
            0 => bytes[at] = byte,
            1 => {
                bytes.remove(at);
            }
            2 => bytes.insert(at, byte),
            _ => {
                let length = rng.random_range(1..16).min(end - at);
                let from = rng.random_range(0..=end - length);
                bytes.copy_within(from..from + length, at);
            }
        }
    }

    #[test]
    fn ten_thousand_damaged_checkpoints_are_errors_or_load() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (mut loaded, mut refused) = (0, 0);
        for dtype in [StoredType::Bf16, StoredType::Fp8] {
            let (config, weights) = checkpoint(dtype);
            assert!(load_bytes(&config, &weights).is_ok());
            let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
            for number in 0..5_000 {
                let (mut config, mut weights) = (config.clone(), weights.clone());
                for _ in 0..rng.random_range(1..=3) {
                    if rng.random() {
                        let end = config.len();
                        mutate(&mut config, end, &mut rng);
                    } else {
                        mutate(&mut weights, header, &mut rng);
                    }
                }
                match catch_unwind(AssertUnwindSafe(|| load_bytes(&config, &weights))) {
                    Ok(Ok(_)) => loaded += 1,
                    Ok(Err(message)) => {
                        assert!(!message.is_empty());
                        refused += 1;
                    }
                    Err(_) => panic!("{dtype:?}, mutation {number}: panicked"),
                }
            }
        }
        // Keys that the model does not use may say anything; most other damage is noticed.
        assert!(loaded > 100 && refused > 5_000, "{loaded} {refused}");
    }

    #[test]
    fn scales_without_an_fp8_weight_are_listed() {
        let (_, bf16) = checkpoint(StoredType::Bf16);
        let (config, fp8) = checkpoint(StoredType::Fp8);
        let path = Path::new("model.safetensors");
        let mut tensors = files::tensors(&[(path, &fp8)], None).unwrap();
        let whole = files::tensors(&[(path, &bf16)], None).unwrap();
        let name = "model.layers.0.mlp.up_proj.weight";
        let view = whole.by_name[name].clone();
        tensors.by_name.insert(name.to_owned(), view);
        let (config, quantized) =
            hf_config::parse_for_weights(str::from_utf8(&config).unwrap()).unwrap();
        let problems = assemble(&config, source(quantized), tensors, &Device::flex()).unwrap_err();
        assert_eq!(
            problems,
            [format!(
                "{name}_scale_inv: scales {name}, which is not there as F8_E4M3"
            )]
        );
    }
}
