//! Devices by name, and models on them: the one place that knows every backend.

use super::weights::model_shape;
use super::{LoadError, Runner, RunnerLimits, StepModel};
use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::{self, CudaBackend, visible_gpus};
use crate::backend::{BackendError, KvDtype, MemoryUse};
use crate::gguf::GgufFile;
use crate::models::describe;
use playhouse_actors::engine::LoadProgress;

/// A device that can hold a model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DeviceName {
    /// All cores of this machine.
    Cpu,
    /// The GPU with this UUID, as NVML and CUDA print it.
    Gpu(String),
}

impl DeviceName {
    /// How keys and values are stored there unless somebody asks for another way.
    pub fn default_kv(&self) -> KvDtype {
        match self {
            DeviceName::Cpu => KvDtype::F32,
            DeviceName::Gpu(_) => KvDtype::F16,
        }
    }

    /// Begins to get the device ready while something else is done; it is kept until the result is dropped.
    pub fn warm_up(&self) -> Option<cuda::Warm> {
        match self {
            DeviceName::Cpu => None,
            DeviceName::Gpu(uuid) => Some(cuda::warm(uuid)),
        }
    }

    /// The device that `word` names: `cpu`, `gpu` or `cuda` (the first one), `cuda:N` (in CUDA's order), a UUID, or `auto`,
    /// which is the first GPU if there is one and the CPU otherwise. Only words that ask for a GPU look for the driver.
    ///
    /// # Errors
    /// [`DeviceError`], with what is missing.
    pub fn find(word: &str) -> Result<DeviceName, DeviceError> {
        let unknown = || DeviceError::Unknown { word: word.to_owned() };
        let nth = match word {
            "cpu" => return Ok(DeviceName::Cpu),
            "auto" => return Ok(Self::gpu(word, 0).unwrap_or(DeviceName::Cpu)),
            "gpu" | "cuda" => 0,
            uuid if uuid.starts_with("GPU-") => return Self::gpu_by_uuid(uuid),
            other => other.strip_prefix("cuda:").and_then(|n| n.parse().ok()).ok_or_else(unknown)?,
        };
        Self::gpu(word, nth)
    }

    fn gpu(word: &str, nth: usize) -> Result<DeviceName, DeviceError> {
        let all = usable_gpus(word)?;
        let n_gpus = all.len();
        let gpu = all.into_iter().nth(nth);
        gpu.map(DeviceName::Gpu).ok_or_else(|| DeviceError::NoGpu {
            word: word.to_owned(),
            reason: format!("this process sees {n_gpus} GPUs"),
        })
    }

    fn gpu_by_uuid(uuid: &str) -> Result<DeviceName, DeviceError> {
        let all = usable_gpus(uuid)?;
        if all.iter().any(|gpu| gpu == uuid) {
            return Ok(DeviceName::Gpu(uuid.to_owned()));
        }
        let reason = format!("this process sees {}", if all.is_empty() { "none".into() } else { all.join(", ") });
        Err(DeviceError::NoGpu { word: uuid.to_owned(), reason })
    }
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceName::Cpu => f.pad("cpu"),
            DeviceName::Gpu(uuid) => f.pad(uuid),
        }
    }
}

/// Why a word names no device that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// No such kind of device.
    #[error("unknown device `{word}`; expected `auto`, `cpu`, `gpu`, `cuda:N` or a GPU's UUID (GPU-...)")]
    Unknown {
        /// What was asked for.
        word: String,
    },
    /// There is no such GPU, no driver, or this build has no kernels.
    #[error("no usable GPU for device `{word}`: {reason}; `cpu` runs the model without one")]
    NoGpu {
        /// What was asked for.
        word: String,
        /// What is missing.
        reason: String,
    },
}

/// UUIDs of the GPUs that this process can run on, in CUDA's order.
fn usable_gpus(word: &str) -> Result<Vec<String>, DeviceError> {
    let no_gpu = |reason: String| DeviceError::NoGpu { word: word.to_owned(), reason };
    cuda::kernels_built().map_err(|e| no_gpu(e.to_string()))?;
    let all = visible_gpus().map_err(|e| no_gpu(e.to_string()))?;
    Ok(all.into_iter().map(|gpu| gpu.uuid).collect())
}

/// What a device may be used for, beside the model's own limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceOptions {
    /// Threads on the CPU; one per core if `None`.
    pub n_threads: Option<usize>,
    /// Most bytes of a GPU's memory; all that is free if `None`.
    pub memory_cap: Option<u64>,
}

/// A resident model on whatever device. It may move to another thread before its first step, and stays there.
pub type BoxedModel = Box<dyn StepModel + Send>;

/// Loads the model in `file` onto a device.
///
/// # Errors
/// As [`Runner::load`]; [`BackendError::Device`] if the device is not there.
pub fn load_model(
    file: &GgufFile,
    device: &DeviceName,
    options: DeviceOptions,
    limits: RunnerLimits,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<BoxedModel, LoadError> {
    Ok(match device {
        DeviceName::Cpu => {
            let backend = options.n_threads.map_or_else(CpuBackend::new, CpuBackend::with_threads);
            Box::new(Runner::load(file, backend, limits, progress)?)
        }
        DeviceName::Gpu(uuid) => {
            Box::new(Runner::load(file, CudaBackend::open(uuid, options.memory_cap)?, limits, progress)?)
        }
    })
}

/// The bytes that [`load_model`] takes on a GPU of `n_sms` multiprocessors, predicted from the file alone.
///
/// The driver's context and the kernels come on top: about 0.5 GB that do not depend on the model.
///
/// # Errors
/// The file is no model that we can run.
pub fn gpu_memory(file: &GgufFile, limits: &RunnerLimits, n_sms: usize) -> Result<MemoryUse, LoadError> {
    let spec = describe(file)?;
    Ok(cuda::memory_use(&model_shape(file, &spec, limits)?, n_sms))
}

impl From<DeviceError> for BackendError {
    fn from(error: DeviceError) -> Self {
        let (DeviceError::Unknown { word } | DeviceError::NoGpu { word, .. }) = &error;
        BackendError::Device { device: word.clone(), op: "finding the device".into(), detail: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_name_devices() {
        assert_eq!(DeviceName::find("cpu"), Ok(DeviceName::Cpu));
        for word in ["", "gpus", "cuda:", "cuda:x", "CPU"] {
            assert_eq!(DeviceName::find(word), Err(DeviceError::Unknown { word: word.into() }));
        }
        // With or without a GPU: a name that nothing has is refused with the reason, and `auto` finds something.
        let none = DeviceName::find("GPU-00000000-0000-0000-0000-000000000000").expect_err("nothing is called that");
        assert!(none.to_string().contains("no usable GPU"), "{none}");
        assert!(DeviceName::find("auto").is_ok());
    }
}
