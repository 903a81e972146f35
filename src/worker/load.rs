//! From a worker's task to an engine: which device, which file, which limits. The one place that knows the backends.

use super::sizing::{arena_bytes, kv_min_bytes, limits};
use crate::engine::{self, DeviceName, DeviceOptions, EngineOptions, LlmEngine, LoadError, RunnerLimits, StepModel};
use crate::gguf::GgufFile;
use crate::grammar::LazyGrammars;
use crate::models::describe;
use crate::source;
use crate::text::Tokenizer;
use playhouse_actors::engine::{EngineError, LoadProgress};
use playhouse_actors::inventory::DeviceId;
use playhouse_actors::messages::WorkerSpec;
use std::fmt::Display;

/// The engine of a worker, whatever runs its steps.
pub(super) type WorkerEngine = LlmEngine<Box<dyn StepModel>>;

/// Most ids of a vocabulary: the sampler's sums are exact up to it.
const VOCAB_MAX: usize = 1 << 20;

/// Why a device is not the worker's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no such GPU here, no driver, or this build has no kernels.
    #[error("{0}")]
    NoGpu(String),
    /// The name is of no kind we know.
    #[error("{0} is no device, expected `cpu`, `GPU-...`, `MIG-...` or `SIM-...`")]
    Unknown(DeviceId),
}

/// Who runs the steps.
enum Kind {
    /// The CPU: for itself, and for devices that are not there.
    Cpu,
    /// CUDA.
    Gpu,
    Unknown,
}

fn kind(device: &DeviceId) -> Kind {
    match device.as_str() {
        name if device.is_cpu() || name.starts_with("SIM-") => Kind::Cpu,
        name if name.starts_with("GPU-") || name.starts_with("MIG-") => Kind::Gpu,
        _ => Kind::Unknown,
    }
}

/// Whether an error of this device spoils the whole process that saw it.
pub(super) fn is_gpu(device: &DeviceId) -> bool {
    matches!(kind(device), Kind::Gpu)
}

/// Finds the device and says which one it is.
///
/// # Errors
/// [`DeviceError`].
pub(super) fn open_device(device: &DeviceId) -> Result<DeviceId, DeviceError> {
    match kind(device) {
        Kind::Cpu => Ok(device.clone()),
        Kind::Gpu => {
            let found = DeviceName::find(device.as_str()).map_err(|error| DeviceError::NoGpu(error.to_string()))?;
            Ok(DeviceId::gpu(found.to_string()))
        }
        Kind::Unknown => Err(DeviceError::Unknown(device.clone())),
    }
}

/// What was loaded.
pub(super) struct Loaded {
    pub(super) engine: WorkerEngine,
    /// KV of one sequence of the full context.
    pub(super) kv_min_bytes: u64,
    /// Most tokens of a sequence.
    pub(super) n_ctx: usize,
    /// Size of the vocabulary.
    pub(super) n_vocab: usize,
}

/// Loads the model of `spec` on its device.
///
/// # Errors
/// [`EngineError`]: out of memory, or a model or settings that cannot be loaded, whoever tries.
pub(super) fn load(
    spec: &WorkerSpec,
    threads: usize,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Loaded, EngineError> {
    let bad = |error: &dyn Display| EngineError::BadModel(format!("{}: {error}", spec.source));
    let name = device_name(&spec.device)?;
    let _warm = name.warm_up();
    let file = source::open(&spec.source).map_err(|error| bad(&error))?;
    let described = describe(&file).map_err(|error| bad(&error))?;
    let limits = limits(spec, &described).map_err(|error| bad(&error))?;
    let kv_min_bytes = kv_min_bytes(spec, &described).map_err(|error| bad(&error))?;
    if described.n_vocab > VOCAB_MAX {
        return Err(bad(&format!("a vocabulary of {} ids, expected at most {VOCAB_MAX}", described.n_vocab)));
    }
    let options = DeviceOptions { n_threads: Some(threads), memory_cap: spec.memory_bytes_max.map(arena_bytes) };
    let model = load_model(&file, &name, limits, options, progress)?;
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    let model = super::fault::Faults::of(spec).wrap(model);
    let (n_ctx, n_vocab) = (model.n_ctx(), model.n_vocab());
    let options = EngineOptions { max_sequences: spec.max_sequences.max(1) as usize, ..EngineOptions::default() };
    let name = spec.source.clone();
    // Read again, and only if a text is to be held to a form.
    let tokenizer = move || {
        let file = source::open(&name).map_err(|error| error.to_string())?;
        Tokenizer::from_gguf(&file).map_err(|error| error.to_string())
    };
    let engine = LlmEngine::new(model, options).with_constrainer(Box::new(LazyGrammars::new(Box::new(tokenizer))));
    Ok(Loaded { engine, kv_min_bytes, n_ctx, n_vocab })
}

fn device_name(device: &DeviceId) -> Result<DeviceName, EngineError> {
    match kind(device) {
        Kind::Cpu => Ok(DeviceName::Cpu),
        Kind::Gpu => Ok(DeviceName::Gpu(device.to_string())),
        Kind::Unknown => Err(EngineError::BadModel(DeviceError::Unknown(device.clone()).to_string())),
    }
}

fn load_model(
    file: &GgufFile,
    name: &DeviceName,
    limits: RunnerLimits,
    options: DeviceOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Box<dyn StepModel>, EngineError> {
    let named = |error: LoadError| match EngineError::from(error) {
        EngineError::BadModel(reason) => EngineError::BadModel(format!("{}: {reason}", file.label())),
        other => other,
    };
    Ok(engine::load_model(file, name, options, limits, progress).map_err(named)?)
}
