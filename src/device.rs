//! The `--device` option: from a name to a Burn device that works, or an error that says what there is.

use std::{fmt, str::FromStr};

use burn::tensor::Device;

/// The kinds of device that this build can use.
const COMPILED: &[&str] = &[
    "cpu",
    #[cfg(feature = "wgpu")]
    "wgpu",
    #[cfg(feature = "cuda")]
    "cuda",
];

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DeviceSpec {
    /// The CPU.
    #[default]
    Cpu,
    /// A device that wgpu reaches: that of this number, or the one that wgpu prefers.
    Wgpu(Option<usize>),
    /// The NVIDIA GPU of this number, or the first; of several processes, that of a process's number on its node.
    Cuda(Option<usize>),
}

impl FromStr for DeviceSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || format!("must be one of cpu, wgpu, wgpu:N, cuda, cuda:N; found {text:?}");
        let (kind, number) = match text.split_once(':') {
            Some((kind, number)) => (kind, Some(number.parse().map_err(|_| unknown())?)),
            None => (text, None),
        };
        match (kind, number) {
            ("cpu", None) => Ok(Self::Cpu),
            ("wgpu", number) => Ok(Self::Wgpu(number)),
            ("cuda", number) => Ok(Self::Cuda(number)),
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Wgpu(None) => f.write_str("wgpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Wgpu(Some(number)) => write!(f, "wgpu:{number}"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

impl DeviceSpec {
    /// The device of one of several processes on a node.
    pub(crate) fn of_rank(self, local: Option<usize>) -> Self {
        match self {
            Self::Cuda(None) => Self::Cuda(local),
            other => other,
        }
    }

    /// Opens the device and computes something on it, which fixes its default number types.
    ///
    /// # Errors
    /// A device that is not compiled in, not there, or does not work. Nothing of it panics.
    pub(crate) fn open(&self) -> anyhow::Result<Device> {
        match *self {
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "wgpu")]
            Self::Wgpu(number) => {
                use burn::tensor::{DeviceKind, DeviceType};
                let found = gpu::select(self, DeviceType::Wgpu, number.unwrap_or(0))?;
                // Without a number, CubeCL chooses, which CUBECL_WGPU_DEFAULT_DEVICE can direct.
                let preferred = || Device::wgpu(DeviceKind::DefaultDevice);
                gpu::tried(self, number.map_or_else(preferred, |_| found))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(number) => {
                let found = gpu::select(self, burn::tensor::DeviceType::Cuda, number.unwrap_or(0))?;
                gpu::tried(self, found)
            }
            #[allow(unreachable_patterns, reason = "reached in builds with fewer features")]
            Self::Wgpu(_) => Err(self.not_compiled("wgpu")),
            #[allow(unreachable_patterns, reason = "reached in builds with fewer features")]
            Self::Cuda(_) => Err(self.not_compiled("cuda")),
        }
    }

    #[allow(dead_code, reason = "unused in builds with all features")]
    fn not_compiled(&self, feature: &str) -> anyhow::Error {
        let has = COMPILED.join(", ");
        anyhow::anyhow!(
            "device {self}: this build has {has}; build with --features {feature} for it"
        )
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda", test))]
#[allow(dead_code, reason = "tests of builds without a GPU use a part")]
mod gpu {
    use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

    use anyhow::bail;
    use burn::tensor::{Device, DeviceType, Tensor};

    use super::{COMPILED, DeviceSpec};

    /// The device of this number among those of its kind.
    pub(super) fn select(
        spec: &DeviceSpec,
        kind: DeviceType,
        number: usize,
    ) -> anyhow::Result<Device> {
        let found: Vec<Device> = match quietly(|| Device::enumerate(kind)) {
            Ok(devices) => devices.into_iter().collect(),
            Err(problem) => bail!("device {spec}: {problem}"),
        };
        if let Some(device) = found.get(number) {
            return Ok(device.clone());
        }
        match found.len() {
            0 => bail!(
                "device {spec}: this machine has no such device, or no driver for it; this build has {}",
                COMPILED.join(", ")
            ),
            count => bail!("device {spec}: this machine has numbers 0 to {}", count - 1),
        }
    }

    /// The device, after a first computation on it.
    pub(super) fn tried(spec: &DeviceSpec, device: Device) -> anyhow::Result<Device> {
        let sum = quietly(|| (Tensor::<1>::from_data([1.0], &device) + 1.0).try_into_data());
        let problem = match sum {
            Ok(Ok(data)) if data.iter::<f32>().eq([2.0]) => return Ok(device),
            Ok(Ok(data)) => format!("1 + 1 gives {data}"),
            Ok(Err(error)) => error.to_string(),
            Err(problem) => problem,
        };
        bail!("device {spec}: does not work: {problem}")
    }

    /// Runs `action`; a panic in it prints nothing, and its message is the error.
    pub(super) fn quietly<T>(action: impl FnOnce() -> T) -> Result<T, String> {
        let hook = take_hook();
        set_hook(Box::new(|_| {}));
        let result = catch_unwind(AssertUnwindSafe(action));
        set_hook(hook);
        result.map_err(|payload| {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
            text.unwrap_or("an unknown problem").to_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (text, spec, written) in [
            ("cpu", DeviceSpec::Cpu, "cpu"),
            ("wgpu", DeviceSpec::Wgpu(None), "wgpu"),
            ("wgpu:0", DeviceSpec::Wgpu(Some(0)), "wgpu:0"),
            ("cuda", DeviceSpec::Cuda(None), "cuda"),
            ("cuda:3", DeviceSpec::Cuda(Some(3)), "cuda:3"),
        ] {
            assert_eq!(text.parse(), Ok(spec));
            assert_eq!(spec.to_string(), written);
            assert_eq!(written.parse(), Ok(spec));
        }
        for text in [
            "", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "CUDA", "cuda:0:1",
        ] {
            let message = text.parse::<DeviceSpec>().unwrap_err();
            assert_eq!(
                message,
                format!("must be one of cpu, wgpu, wgpu:N, cuda, cuda:N; found {text:?}")
            );
        }
    }

    #[test]
    fn a_device_that_is_not_compiled_in_is_refused_with_what_is() {
        assert!(DeviceSpec::Cpu.open().is_ok());
        #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
        for (spec, message) in [
            (
                DeviceSpec::Cuda(Some(1)),
                "device cuda:1: this build has cpu; build with --features cuda for it",
            ),
            (
                DeviceSpec::Wgpu(None),
                "device wgpu: this build has cpu; build with --features wgpu for it",
            ),
        ] {
            assert_eq!(spec.open().unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn processes_of_a_node_have_a_gpu_each() {
        assert_eq!(
            DeviceSpec::Cuda(None).of_rank(Some(3)).to_string(),
            "cuda:3"
        );
        assert_eq!(
            DeviceSpec::Cuda(Some(1)).of_rank(Some(3)).to_string(),
            "cuda:1"
        );
        assert_eq!(DeviceSpec::Cpu.of_rank(Some(3)), DeviceSpec::Cpu);
    }

    #[test]
    fn devices_are_found_by_number_and_tried() {
        let select = |number| {
            let spec = DeviceSpec::Cuda(Some(number));
            gpu::select(&spec, burn::tensor::DeviceType::Flex, number)
        };
        assert_eq!(select(0).unwrap(), Device::flex());
        assert_eq!(
            select(1).unwrap_err().to_string(),
            "device cuda:1: this machine has numbers 0 to 0"
        );
        assert!(gpu::tried(&DeviceSpec::Cpu, Device::flex()).is_ok());
    }

    #[test]
    fn panics_become_messages() {
        assert_eq!(gpu::quietly(|| 3), Ok(3));
        let panicked = gpu::quietly(|| -> u8 { panic!("no driver at {}", 7) });
        assert_eq!(panicked, Err("no driver at 7".to_owned()));
    }
}
