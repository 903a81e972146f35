//! Why a file is no model that Playhouse can run.

use crate::gguf::GgufError;

/// A file was refused as a model. Every message names the file and the key or tensor.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ModelError {
    /// A key that is missing, of the wrong type or out of range, or bytes that cannot be read.
    #[error(transparent)]
    File(#[from] GgufError),
    /// `general.architecture` is none of ours.
    #[error("{file}: key `general.architecture`: expected one of {known}, found \"{found}\"")]
    UnknownArchitecture { file: String, found: String, known: String },
    /// `general.type` says that the file is something else than a model, such as an adapter.
    #[error("{file}: key `general.type`: expected \"model\", found \"{found}\"")]
    NotAModel { file: String, found: String },
    /// A key of the architecture that we do not honour, so that running the model might compute something else.
    #[error(
        "{file}: key `{key}`: {architecture} models with this key are not supported; expected no such key, found {found}"
    )]
    UnsupportedKey { file: String, architecture: &'static str, key: String, found: String },
    /// A tensor that the architecture needs is not there.
    #[error("{file}: tensor `{tensor}`: expected dimensions {expected:?}, found no such tensor")]
    MissingTensor { file: String, tensor: String, expected: Vec<u64> },
    /// A tensor that nothing would use.
    #[error(
        "{file}: tensor `{tensor}`: expected no such tensor in a {architecture} model with these keys, found dimensions {found:?}"
    )]
    SurplusTensor { file: String, architecture: &'static str, tensor: String, found: Vec<u64> },
    /// A tensor of another shape than the metadata implies. Dimensions in file order, row length first.
    #[error("{file}: tensor `{tensor}`: expected dimensions {expected:?}, found {found:?}")]
    WrongShape { file: String, tensor: String, expected: Vec<u64>, found: Vec<u64> },
}
