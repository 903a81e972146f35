//! Opens a model's file by the name that a configuration gives it: a path, or a model that is part of this program.

use crate::basho;
use crate::gguf::{GgufError, GgufFile};
use playhouse_config::ModelSource;

/// Why there is no file. The text names it.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It cannot be read, or is damaged.
    #[error(transparent)]
    File(#[from] GgufError),
    /// No such model is part of this program.
    #[error("`embedded:{0}` is not part of this program; expected embedded:basho")]
    NotEmbedded(String),
}

/// Opens the file of a model, or the embedded one.
///
/// # Errors
/// [`SourceError`].
pub fn open(source: &ModelSource) -> Result<GgufFile, SourceError> {
    match source {
        ModelSource::File(path) => Ok(GgufFile::open(path)?),
        ModelSource::Embedded(name) if name == "basho" => Ok(GgufFile::from_static(basho::LABEL, basho::GGUF)?),
        ModelSource::Embedded(name) => Err(SourceError::NotEmbedded(name.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_opened_is_named() {
        assert_eq!(open(&ModelSource::Embedded("basho".into())).expect("part of the program").label(), basho::LABEL);
        let nobody = open(&ModelSource::Embedded("issa".into())).expect_err("no such model");
        assert!(nobody.to_string().contains("embedded:issa"), "{nobody}");
        let nowhere = open(&ModelSource::File("/nowhere.gguf".into())).expect_err("no such file");
        assert!(nowhere.to_string().contains("/nowhere.gguf"), "{nowhere}");
    }
}
