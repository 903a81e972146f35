//! From the flags that name a model to a model that can run: what `run`, `bench` and `perplexity` share.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use playhouse_actors::engine::{LoadPhase, LoadProgress};

use super::{CliError, Exit};
use crate::backend::{BackendError, KvDtype};
use crate::basho;
use crate::engine::{BoxedModel, DeviceError, DeviceName, DeviceOptions, LoadError, RunnerLimits, load_model};
use crate::gguf::GgufFile;
use crate::models::{ModelSpec, describe};
use crate::text::{ChatTemplate, Tokenizer};
use crate::worker::sizing::arena_bytes;
use playhouse_config::units::parse_size;

/// The flags that say which model runs where.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ModelArgs {
    /// The GGUF file; of a split one, the first part [default: basho, the embedded model]
    #[arg(long, short, value_name = "FILE")]
    pub(crate) model: Option<PathBuf>,
    /// Where to run: `cpu`, `gpu`, `cuda:N`, a GPU's UUID, or `auto` for the best there is
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// Most tokens of prompt and answer together [default: what the model was made for, at most 4096]
    #[arg(long, short, visible_alias = "ctx-size", value_name = "TOKENS")]
    pub(crate) ctx: Option<usize>,
    /// Most memory of a GPU to take, such as `24GB` [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory_limit: Option<u64>,
    /// Threads on the CPU [default: one per core]. The text does not depend on it
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) threads: Option<u16>,
    /// A Hugging Face `tokenizer.json` to use instead of the file's vocabulary
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
}

/// A model that is ready to run, with its way from text to tokens and back.
pub(crate) struct LoadedModel {
    /// The file, for its metadata.
    pub(crate) file: GgufFile,
    /// The vocabulary.
    pub(crate) tokenizer: Tokenizer,
    /// How a conversation becomes a prompt; base models have none.
    pub(crate) template: Option<ChatTemplate>,
    /// The resident model.
    pub(crate) runner: BoxedModel,
    /// Its description.
    pub(crate) spec: ModelSpec,
    /// Where it is.
    pub(crate) device: DeviceName,
    /// How long it took.
    pub(crate) load_time: Duration,
}

/// Room for `n_sequences` sequences at once. Memory is taken for four of full length at most: choices share their prompt, and
/// where blocks run out the youngest waits for the others.
pub(crate) fn limits_for(n_ctx: usize, n_sequences: usize, kv: KvDtype) -> RunnerLimits {
    let limits = RunnerLimits::new(n_ctx, n_sequences, kv);
    RunnerLimits { n_kv_blocks: RunnerLimits::new(n_ctx, n_sequences.min(4), kv).n_kv_blocks, ..limits }
}

/// The context where neither the user nor the model asks for less: more costs memory whether it is used or not.
const DEFAULT_CTX: usize = 4096;

impl ModelArgs {
    /// Opens the file, or the embedded one.
    ///
    /// # Errors
    /// The file cannot be read or is damaged.
    pub(crate) fn open(&self) -> Result<GgufFile, CliError> {
        match &self.model {
            Some(path) => Ok(GgufFile::open(path)?),
            None => Ok(GgufFile::from_static(basho::LABEL, basho::GGUF)?),
        }
    }

    /// The tokenizer of an open file, or the one that the flags name.
    ///
    /// # Errors
    /// It is missing, damaged, or of an unknown kind.
    pub(crate) fn tokenizer(&self, file: &GgufFile) -> Result<Tokenizer, CliError> {
        Ok(match &self.tokenizer {
            Some(path) => Tokenizer::from_json_file(path)?,
            None => Tokenizer::from_gguf(file)?,
        })
    }

    /// Loads the model, with a bar on stderr if that is a terminal. `limits` gets the context and the device's way to store keys
    /// and values, and says what else the model must be able to take; all of it is allocated here.
    ///
    /// # Errors
    /// With the exit code that the cause deserves: 2, 65, 66, 69 or 75.
    pub(crate) fn load(&self, limits: impl FnOnce(usize, KvDtype) -> RunnerLimits) -> Result<LoadedModel, CliError> {
        let start = Instant::now();
        let device = self.device()?;
        let _warm = device.warm_up();
        let file = self.open()?;
        let spec = describe(&file).map_err(LoadError::from)?;
        let tokenizer = self.tokenizer(&file)?;
        check_vocabulary(&file, &tokenizer, &spec)?;
        let template = ChatTemplate::from_gguf(&file, &tokenizer).map_err(|e| CliError::new(Exit::BadModel, e))?;
        let limits = limits(self.n_ctx(&spec)?, device.default_kv());
        let bar = Bar::new();
        let options =
            DeviceOptions { n_threads: self.threads.map(usize::from), memory_cap: self.memory_limit.map(arena_bytes) };
        let runner = load_model(&file, &device, options, limits, &mut |progress| bar.show(&progress))?;
        bar.clear();
        Ok(LoadedModel { file, tokenizer, template, runner, spec, device, load_time: start.elapsed() })
    }

    /// The device that the flags name.
    ///
    /// # Errors
    /// There is none of that name.
    pub(crate) fn device(&self) -> Result<DeviceName, CliError> {
        DeviceName::find(&self.device).map_err(|error| {
            let exit = match error {
                DeviceError::Unknown { .. } => Exit::Usage,
                DeviceError::NoGpu { .. } => Exit::NoDevice,
            };
            CliError::new(exit, error)
        })
    }

    fn n_ctx(&self, spec: &ModelSpec) -> Result<usize, CliError> {
        match self.ctx {
            None => Ok(spec.n_ctx_train.min(DEFAULT_CTX)),
            Some(n_ctx) if 0 < n_ctx && n_ctx <= spec.n_ctx_train => Ok(n_ctx),
            Some(n_ctx) => Err(CliError::usage(format!(
                "--ctx is {n_ctx}, expected 1 to {}, the context the model was made for",
                spec.n_ctx_train
            ))),
        }
    }
}

fn check_vocabulary(file: &GgufFile, tokenizer: &Tokenizer, spec: &ModelSpec) -> Result<(), CliError> {
    if tokenizer.n_vocab() <= spec.n_vocab {
        return Ok(());
    }
    let message = format!(
        "{}: the tokenizer has {} tokens, the model's vocabulary only {}; they do not belong together",
        file.label(),
        tokenizer.n_vocab(),
        spec.n_vocab
    );
    Err(CliError::new(Exit::BadModel, message))
}

/// A progress bar on stderr; nothing where stderr is no terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        // indicatif draws on stderr, and only if it is a terminal.
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{msg:9} {bar:40} {bytes}/{total_bytes} {bytes_per_sec}");
        bar.set_style(style.expect("the template is a constant"));
        Self(bar)
    }

    fn show(&self, progress: &LoadProgress) {
        self.0.set_message(match progress.phase {
            LoadPhase::Open => "opening",
            LoadPhase::Weights => "loading",
            LoadPhase::Allocate => "allocating",
            LoadPhase::WarmUp => "warming up",
            LoadPhase::Ready => "ready",
        });
        self.0.set_length(progress.bytes_total);
        self.0.set_position(progress.bytes_done);
    }

    fn clear(&self) {
        self.0.finish_and_clear();
    }
}

impl From<LoadError> for CliError {
    fn from(error: LoadError) -> Self {
        let exit = match &error {
            LoadError::Model(_) => Exit::BadModel,
            LoadError::Backend(error) => backend_exit(error),
            LoadError::Limit { .. } => Exit::Usage,
        };
        Self::new(exit, error)
    }
}

/// The exit code of a backend's error.
pub(crate) fn backend_exit(error: &BackendError) -> Exit {
    match error {
        BackendError::OutOfMemory { .. } => Exit::Transient,
        BackendError::Unsupported { .. } => Exit::BadModel,
        BackendError::Device { .. } => Exit::NoDevice,
    }
}
