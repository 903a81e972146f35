//! Architectures as data: one row in one table, one file each.
//!
//! ```text
//! GgufFile ── general.architecture ──> a row of ARCHITECTURES ── describe ──> ModelSpec
//!                                        keys: read or refused      tensors: used exactly once or refused
//! ```
//!
//! A [`ModelSpec`] says which tensors a model has and what is computed from them; `engine::forward` computes it on any
//! backend. Nothing here touches a device or the bytes of a tensor.
//!
//! | file | what it is |
//! |---|---|
//! | `spec.rs` | the vocabulary |
//! | `keys.rs`, `validate.rs` | what a file must and must not have |
//! | `common.rs` | what our architectures share |
//! | `qwen2.rs` `llama.rs` `phi3.rs` `gpt_oss.rs` | one architecture each |
//! | `rope.rs` | tables of cosines and sines |

mod error;
pub mod spec;
mod keys;
mod validate;
mod common;
mod qwen2;
mod llama;
mod phi3;
mod gpt_oss;
pub mod rope;

pub use error::ModelError;
pub use keys::Keys;
pub use spec::ModelSpec;

use crate::gguf::GgufFile;

/// A row of the table.
pub struct Architecture {
    /// The value of `general.architecture`.
    pub name: &'static str,
    /// Models of this architecture, for people.
    pub models: &'static str,
    describe: fn(&Keys<'_>) -> Result<ModelSpec, ModelError>,
}

/// Every architecture that Playhouse runs.
pub const ARCHITECTURES: &[Architecture] = &[qwen2::QWEN2, llama::LLAMA, phi3::PHI3, gpt_oss::GPT_OSS];

/// Describes the model in a file.
///
/// Every key under the architecture's name has been honoured and every tensor has its place, or this is an error.
///
/// # Errors
/// [`ModelError`]: not one of [`ARCHITECTURES`]; a key or tensor is missing, wrong, or surplus.
pub fn describe(file: &GgufFile) -> Result<ModelSpec, ModelError> {
    let found = file.metadata().str("general.architecture")?;
    let Some(architecture) = ARCHITECTURES.iter().find(|a| a.name == found) else {
        return Err(ModelError::UnknownArchitecture {
            file: file.label().to_owned(),
            found: crate::gguf::quote(found),
            known: ARCHITECTURES.iter().map(|a| a.name).collect::<Vec<_>>().join(", "),
        });
    };
    if let Some(kind) = file.metadata().opt_str("general.type")?.filter(|&kind| kind != "model") {
        return Err(ModelError::NotAModel { file: file.label().to_owned(), found: crate::gguf::quote(kind) });
    }
    (architecture.describe)(&Keys::new(file, architecture.name))
}
