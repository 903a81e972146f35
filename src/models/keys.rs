//! Reads the keys of one architecture and remembers which: what no description has read is not honoured, and refused.

use super::ModelError;
use crate::gguf::{GgufError, GgufFile};
use std::cell::RefCell;
use std::collections::HashSet;

/// No model has a size above this; below it, products of three sizes fit 64 bits with room to spare.
const MAX_SIZE: u32 = 1 << 20;

/// The keys `<architecture>.*` of a file.
pub struct Keys<'a> {
    file: &'a GgufFile,
    architecture: &'static str,
    read: RefCell<HashSet<String>>,
}

impl<'a> Keys<'a> {
    /// The keys under `architecture` in `file`.
    pub fn new(file: &'a GgufFile, architecture: &'static str) -> Self {
        Self { file, architecture, read: RefCell::default() }
    }

    /// The architecture's name.
    pub fn architecture(&self) -> &'static str {
        self.architecture
    }

    /// The file.
    pub fn file(&self) -> &'a GgufFile {
        self.file
    }

    /// The full key, noted as honoured.
    fn key(&self, name: &str) -> String {
        let key = format!("{}.{name}", self.architecture);
        self.read.borrow_mut().insert(key.clone());
        key
    }

    /// Whether the key is there. Does not count as reading it.
    pub fn has(&self, name: &str) -> bool {
        self.file.metadata().contains(&format!("{}.{name}", self.architecture))
    }

    /// Whether the tensor is there.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// An error about the value of a key.
    pub fn invalid(&self, name: &str, expected: impl std::fmt::Display) -> GgufError {
        self.file.metadata().invalid(&self.key(name), expected)
    }

    /// A size: at least 1.
    ///
    /// # Errors
    /// The key is missing, no integer, 0, or absurd.
    pub fn size(&self, name: &str) -> Result<usize, GgufError> {
        let value = self.file.metadata().u32(&self.key(name))?;
        self.checked_size(name, value)
    }

    /// A size that may be left out.
    ///
    /// # Errors
    /// The key is there and no integer, 0, or absurd.
    pub fn opt_size(&self, name: &str) -> Result<Option<usize>, GgufError> {
        let value = self.file.metadata().opt_u32(&self.key(name))?;
        value.map(|value| self.checked_size(name, value)).transpose()
    }

    fn checked_size(&self, name: &str, value: u32) -> Result<usize, GgufError> {
        match value {
            1..=MAX_SIZE => Ok(value as usize),
            _ => Err(self.invalid(name, format_args!("a size from 1 to {MAX_SIZE}"))),
        }
    }

    /// A number of tokens, up to 2^32; `None` if 0 or left out.
    ///
    /// # Errors
    /// The key is there and no integer.
    pub fn opt_tokens(&self, name: &str) -> Result<Option<usize>, GgufError> {
        Ok(self.file.metadata().opt_u32(&self.key(name))?.filter(|&n| n > 0).map(|n| n as usize))
    }

    /// A number of tokens, at least 1.
    ///
    /// # Errors
    /// The key is missing, no integer, or 0.
    pub fn tokens(&self, name: &str) -> Result<usize, GgufError> {
        self.file.metadata().u32(&self.key(name))?;
        self.opt_tokens(name)?.ok_or_else(|| self.invalid(name, "at least 1 token"))
    }

    /// A positive, finite number.
    ///
    /// # Errors
    /// The key is missing, no float, or out of range.
    pub fn positive(&self, name: &str) -> Result<f32, GgufError> {
        self.file.metadata().f32(&self.key(name))?;
        self.opt_positive(name).map(|value| value.unwrap_or_default())
    }

    /// A positive, finite number that may be left out.
    ///
    /// # Errors
    /// The key is there and no float, or out of range.
    pub fn opt_positive(&self, name: &str) -> Result<Option<f32>, GgufError> {
        match self.file.metadata().opt_f32(&self.key(name))? {
            Some(value) if !(value.is_finite() && value > 0.0) => {
                Err(self.invalid(name, "a finite number greater than 0"))
            }
            value => Ok(value),
        }
    }

    /// A string that may be left out.
    ///
    /// # Errors
    /// The key is there and no string.
    pub fn opt_str(&self, name: &str) -> Result<Option<&'a str>, GgufError> {
        self.file.metadata().opt_str(&self.key(name))
    }

    /// Booleans, one per layer, that may be left out; any other value is `None`.
    pub fn opt_bools(&self, name: &str) -> Option<&'a [bool]> {
        self.file.metadata().opt_bools(&self.key(name)).ok().flatten()
    }

    /// Accepts a key only with the value that changes nothing, integer or float.
    ///
    /// # Errors
    /// The key is there with another value.
    pub fn neutral(&self, name: &str, value: f64) -> Result<(), GgufError> {
        use crate::gguf::Value;
        let found = match self.file.metadata().get(&self.key(name)) {
            None => return Ok(()),
            Some(Value::F32(f)) => Some(f64::from(*f)),
            Some(Value::F64(f)) => Some(*f),
            Some(Value::Bool(b)) => Some(f64::from(u8::from(*b))),
            Some(other) => other.as_int().map(|i| i as f64),
        };
        if found == Some(value) {
            return Ok(());
        }
        let expected = format_args!("{value}, the only value that is supported for {}", self.architecture);
        Err(self.invalid(name, expected))
    }

    /// A boolean that may be left out.
    ///
    /// # Errors
    /// The key is there and no boolean.
    pub fn opt_bool(&self, name: &str) -> Result<Option<bool>, GgufError> {
        self.file.metadata().opt_bool(&self.key(name))
    }

    /// Refuses what was not read.
    ///
    /// # Errors
    /// [`ModelError::UnsupportedKey`] with the first key, in file order, that nothing has read.
    pub fn refuse_unread(&self) -> Result<(), ModelError> {
        let prefix = format!("{}.", self.architecture);
        let read = self.read.borrow();
        let unread = |(key, _): &(&str, &crate::gguf::Value)| key.starts_with(&prefix) && !read.contains(*key);
        match self.file.metadata().iter().find(unread) {
            None => Ok(()),
            Some((key, value)) => Err(ModelError::UnsupportedKey {
                file: self.file.label().to_owned(),
                architecture: self.architecture,
                key: key.to_owned(),
                found: describe(value),
            }),
        }
    }
}

/// A value for an error message, short.
fn describe(value: &crate::gguf::Value) -> String {
    use crate::gguf::Value;
    match value {
        Value::Str(s) => format!("\"{}\"", crate::gguf::quote(s)),
        Value::F32(f) => f.to_string(),
        Value::F64(f) => f.to_string(),
        Value::Bool(b) => b.to_string(),
        Value::Array(_) => value.describe_type(),
        int => int.as_int().unwrap_or_default().to_string(),
    }
}
