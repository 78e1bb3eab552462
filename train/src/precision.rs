//! What is computed and kept in which type (report section 3.3, figures 6 and 7).

use burn::tensor::DType;
use deepburn_kernels::fp8::{ScaleFormat, ablation::Ablation};
use deepburn_model::projection::Arithmetic;
use serde::{Deserialize, Serialize};

use crate::parallel::Wire;

/// The precision of a training run.
///
/// | | `fp32` | `bf16` | `fp8` |
/// |---|---|---|---|
/// | products of attention's and experts' linear layers: forward, input gradient, weight gradient | FP32 | BF16 | FP8 (E4M3) |
/// | scales of their activations and gradients, one per 1 x 128 | | | any; powers of two into `o_proj` and the routed experts |
/// | scales of their weights, one per 128 x 128 | | | any |
/// | sums of products | FP32 | FP32 | FP32, promoted every 128 |
/// | activations between layers' parts, and their gradients | FP32 | BF16 | BF16 |
/// | inputs of the routed experts' SwiGLU, kept for the backward pass | FP32 | BF16 | FP8, its output computed again |
/// | embedding, output head, projection of MTP | FP32 | BF16 | BF16 |
/// | tokens on their way to experts on other ranks, and their gradients | FP32 | BF16 | FP8, scales powers of two; back BF16 |
/// | router, norms, softmax, attention's sums, loss | FP32 | FP32 | FP32 |
/// | weights that are updated and saved | FP32 | FP32 | FP32 |
/// | weights' gradients | FP32 | FP32 | FP32 |
/// | AdamW's moments | FP32 | BF16 | BF16 |
/// | average of the weights, if one is kept | FP32 | FP32 | FP32 |
///
/// BF16 and FP8 are numbers of these types on every device; where a kernel needs them in single precision, as on the
/// CPU, they are stored so. AdamW's moments are stored in the type that the table says where the device has it, as all but
/// those of wgpu do.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision throughout.
    #[default]
    Fp32,
    /// BF16 with FP32 where the table says so.
    Bf16,
    /// The report's recipe.
    Fp8,
}

impl Precision {
    /// How the model computes.
    pub fn arithmetic(self) -> Arithmetic {
        match self {
            Self::Fp32 => Arithmetic::FULL,
            Self::Bf16 => Arithmetic {
                bf16: true,
                ..Arithmetic::FULL
            },
            Self::Fp8 => Arithmetic {
                bf16: true,
                ..Arithmetic::fp8(ScaleFormat::Float32)
            },
        }
    }

    /// In what tokens travel to experts on other ranks, and back.
    pub fn wire(self) -> Wire {
        match self {
            Self::Fp32 => Wire::F32,
            Self::Bf16 => Wire::BF16,
            Self::Fp8 => Wire::FP8,
        }
    }

    /// Bytes that are kept for each parameter, whatever the batch.
    pub fn bytes_per_parameter(self) -> [(&'static str, usize); 3] {
        [
            ("weights", DType::F32.size()),
            ("gradients", DType::F32.size()),
            ("moments", 2 * self.moments().size()),
        ]
    }

    /// The type of AdamW's moments.
    pub fn moments(self) -> DType {
        match self {
            Self::Fp32 => DType::F32,
            Self::Bf16 | Self::Fp8 => DType::BF16,
        }
    }
}

/// Bytes that an average of the weights takes on the CPU for each parameter.
pub const BYTES_OF_AVERAGE: usize = 4;

/// [`Ablation`] as it is written.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fp8Ablation {
    /// One scale for a whole matrix.
    PerTensor,
    /// Weights in E5M2.
    E5m2Weights,
    /// Sums of 14 bits.
    NoPromotion,
}

impl From<Fp8Ablation> for Ablation {
    fn from(ablation: Fp8Ablation) -> Self {
        match ablation {
            Fp8Ablation::PerTensor => Self::PerTensor,
            Fp8Ablation::E5m2Weights => Self::E5m2Weights,
            Fp8Ablation::NoPromotion => Self::NoPromotion,
        }
    }
}
