//! The key-value table of a file, with getters that name key and file when a value is absent or of another type.

use std::sync::Arc;

use indexmap::IndexMap;

use super::error::{GgufError, GgufErrorKind, Subject};
use super::value::{Array, StrArray, Value};

/// The metadata of a file in file order.
///
/// `u32(key)` and its sisters are for required keys; `opt_u32(key)` gives `None` where the key is absent. A key that
/// is present with another type is an error for both. Scalars of the eight integer types convert into each other
/// where the value fits, because converters disagree on widths; arrays must have exactly the element type.
#[derive(Debug, Clone)]
pub struct Metadata {
    label: Arc<str>,
    entries: IndexMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    value: Value,
    /// Where the value's type stands in the file.
    offset: u64,
}

/// A required getter and its optional sister.
macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident, $opt:ident -> $ty:ty = $expected:literal, $convert:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// [`GgufErrorKind::MissingKey`] or [`GgufErrorKind::WrongType`], naming key and file.
        pub fn $name(&self, key: &str) -> Result<$ty, GgufError> {
            self.$opt(key)?.ok_or_else(|| self.missing(key, $expected))
        }

        #[doc = concat!("Like [`Metadata::", stringify!($name), "`], `None` where the key is absent.")]
        ///
        /// # Errors
        /// [`GgufErrorKind::WrongType`], naming key and file.
        pub fn $opt(&self, key: &str) -> Result<Option<$ty>, GgufError> {
            self.convert(key, $expected, $convert)
        }
    )*};
}

impl Metadata {
    /// An empty table; `label` is the file's name in errors.
    pub fn new(label: &str) -> Self {
        Self { label: label.into(), entries: IndexMap::new() }
    }

    /// Adds or replaces a value.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.insert(key.into(), value.into(), 0);
    }

    pub(super) fn insert(&mut self, key: String, value: Value, offset: u64) {
        self.entries.insert(key, Entry { value, offset });
    }

    /// The file's name in errors.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the key is present.
    pub fn contains(&self, key: &str) -> bool {
        self.entries.contains_key(key)
    }

    /// The value of a key, whatever its type.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key).map(|e| &e.value)
    }

    /// Keys and values in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> + '_ {
        self.entries.iter().map(|(k, e)| (k.as_str(), &e.value))
    }

    /// Bytes from the start of the file to a key's value; 0 for tables made in memory.
    pub fn offset_of(&self, key: &str) -> u64 {
        self.entries.get(key).map_or(0, |e| e.offset)
    }

    getters! {
        /// An integer that fits `u32`.
        u32, opt_u32 -> u32 = "an integer from 0 to 4294967295", |v| v.as_int()?.try_into().ok();
        /// An integer that fits `u64`.
        u64, opt_u64 -> u64 = "a non-negative 64-bit integer", |v| v.as_int()?.try_into().ok();
        /// An integer that fits `i32`.
        i32, opt_i32 -> i32 = "an integer from -2147483648 to 2147483647", |v| v.as_int()?.try_into().ok();
        /// A 32-bit float.
        f32, opt_f32 -> f32 = "an f32", |v| match v { Value::F32(f) => Some(*f), _ => None };
        /// A boolean.
        bool, opt_bool -> bool = "a bool", |v| match v { Value::Bool(b) => Some(*b), _ => None };
        /// A string.
        str, opt_str -> &str = "a string", |v| match v { Value::Str(s) => Some(s.as_str()), _ => None };
        /// An array of strings.
        strs, opt_strs -> &StrArray = "an array of string", |v| match v { Value::Array(Array::Str(a)) => Some(a), _ => None };
        /// An array of 32-bit floats.
        f32s, opt_f32s -> &[f32] = "an array of f32", |v| match v { Value::Array(Array::F32(a)) => Some(&a[..]), _ => None };
        /// An array of signed 32-bit integers.
        i32s, opt_i32s -> &[i32] = "an array of i32", |v| match v { Value::Array(Array::I32(a)) => Some(&a[..]), _ => None };
        /// An array of unsigned 32-bit integers.
        u32s, opt_u32s -> &[u32] = "an array of u32", |v| match v { Value::Array(Array::U32(a)) => Some(&a[..]), _ => None };
        /// An array of bytes.
        u8s, opt_u8s -> &[u8] = "an array of u8", |v| match v { Value::Array(Array::U8(a)) => Some(&a[..]), _ => None };
        /// An array of booleans.
        bools, opt_bools -> &[bool] = "an array of bool", |v| match v { Value::Array(Array::Bool(a)) => Some(&a[..]), _ => None };
    }

    /// An error about the value of `key` for checks that are not about its type, such as a range.
    pub fn invalid(&self, key: &str, expected: impl std::fmt::Display) -> GgufError {
        match self.get(key) {
            Some(value) => self.refuse(GgufErrorKind::BadValue, key, value, expected),
            None => self.missing(key, expected),
        }
    }

    fn convert<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| self.refuse(GgufErrorKind::WrongType, key, value, expected))
    }

    fn refuse(&self, kind: GgufErrorKind, key: &str, value: &Value, expected: impl std::fmt::Display) -> GgufError {
        let found = match value {
            Value::Array(_) => value.describe_type(),
            Value::Str(s) => format!("string \"{}\"", super::error::quote(s)),
            Value::F32(f) => format!("f32 {f}"),
            Value::F64(f) => format!("f64 {f}"),
            Value::Bool(b) => format!("bool {b}"),
            int => format!("{} {}", int.describe_type(), int.as_int().unwrap_or_default()),
        };
        let subject = Subject::Key(key.to_owned());
        let offset = self.offset_of(key);
        GgufError::new(kind, self.label.clone(), offset, subject, expected, found)
    }

    fn missing(&self, key: &str, expected: impl std::fmt::Display) -> GgufError {
        let subject = Subject::Key(key.to_owned());
        GgufError::new(GgufErrorKind::MissingKey, self.label.clone(), 0, subject, expected, "no such key")
    }
}
