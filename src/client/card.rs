//! What the host knows of a model without having loaded it: names, sizes, and the way from text to tokens.

use crate::gguf::GgufError;
use crate::grammar::{GrammarError, Grammars};
use crate::models::{ModelError, ModelSpec, describe};
use crate::source::{self, SourceError};
use crate::text::{ChatTemplate, TemplateError, TextError, Tokenizer};
use playhouse_actors::engine::Constraint;
use playhouse_config::{Model, ModelSource};
use std::sync::OnceLock;
use std::time::SystemTime;

/// Why a model's file cannot be served. The text names the file.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// It cannot be read, or is damaged.
    #[error(transparent)]
    File(#[from] GgufError),
    /// It is no model that we run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Its vocabulary is damaged or of an unknown kind.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Its chat template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// No such model is part of this program.
    #[error("`embedded:{0}` is not part of this program; expected embedded:basho")]
    NotEmbedded(String),
}

/// A model as clients see it.
#[derive(Debug)]
pub struct ModelCard {
    /// What clients call it.
    pub name: String,
    /// What they may also call it.
    pub aliases: Vec<String>,
    /// Where its weights are.
    pub source: ModelSource,
    /// Its description: sizes and layers.
    pub spec: ModelSpec,
    /// Bytes of the file's tensors.
    pub file_bytes: u64,
    /// Most tokens of a sequence as configured; the model's own limit is in `spec`.
    pub context: u32,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// How a conversation becomes a prompt; base models have none.
    pub template: Option<ChatTemplate>,
    /// When the card was made.
    pub created: SystemTime,
    grammars: OnceLock<Result<Grammars, GrammarError>>,
}

impl CardError {
    /// Whether the file, or a part of it, is not there or may not be read.
    pub fn is_missing(&self) -> bool {
        use crate::gguf::GgufErrorKind::{MissingShard, NotFound};
        matches!(self, Self::File(error) if matches!(error.kind(), NotFound | MissingShard))
    }
}

impl From<SourceError> for CardError {
    fn from(error: SourceError) -> Self {
        match error {
            SourceError::File(error) => Self::File(error),
            SourceError::NotEmbedded(name) => Self::NotEmbedded(name),
        }
    }
}

impl ModelCard {
    /// Reads what there is to know from the model's file. Blocks for as long as a vocabulary takes to read: up to a
    /// second.
    ///
    /// # Errors
    /// [`CardError`].
    pub fn read(model: &Model) -> Result<Self, CardError> {
        let file = source::open(&model.source)?;
        let spec = describe(&file)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let template = ChatTemplate::from_gguf(&file, &tokenizer)?;
        let trained = u32::try_from(spec.n_ctx_train).unwrap_or(u32::MAX);
        Ok(Self {
            name: model.name.clone(),
            aliases: model.aliases.clone(),
            source: model.source.clone(),
            file_bytes: file.tensors().map(|tensor| tensor.n_bytes()).sum(),
            context: model.context.unwrap_or(trained).min(trained),
            spec,
            tokenizer,
            template,
            created: SystemTime::now(),
            grammars: OnceLock::new(),
        })
    }

    /// Checks that a text can be held to `constraint`. The first time takes up to a second: call it where that may be.
    ///
    /// # Errors
    /// [`GrammarError`].
    pub fn check(&self, constraint: &Constraint) -> Result<(), GrammarError> {
        let grammars = self.grammars.get_or_init(|| Grammars::new(&self.tokenizer));
        grammars.as_ref().map_err(Clone::clone)?.check(constraint)
    }
}
