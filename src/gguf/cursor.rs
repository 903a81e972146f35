//! Bounded little-endian reads: nothing is allocated before it is known that the file holds it.

use std::io::{BufRead, Seek, SeekFrom};
use std::sync::Arc;

use super::error::{GgufError, GgufErrorKind as Kind, Subject};
use super::limits::{MAX_ARRAY_LEN, MAX_METADATA_BYTES, MAX_STRING_BYTES};
use super::value::{Array, StrArray, Value, ValueType};

// Numeric arrays and tensor data are read in place.
#[cfg(target_endian = "big")]
compile_error!("GGUF files are little-endian and so is every machine we run on");

/// What is being read, for errors; becomes a [`Subject`] only when one is made.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    Header(&'static str),
    KeyIndex(u64),
    Key(&'a str),
    TensorIndex(u64),
    Tensor(&'a str),
}

impl Place<'_> {
    fn subject(self) -> Subject {
        match self {
            Self::Header(field) => Subject::Header(field),
            Self::KeyIndex(i) => Subject::KeyIndex(i),
            Self::Key(key) => Subject::Key(key.to_owned()),
            Self::TensorIndex(i) => Subject::TensorIndex(i),
            Self::Tensor(name) => Subject::Tensor(name.to_owned()),
        }
    }
}

/// Whether a name may be empty, and how long a string may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct StrRule {
    pub(super) max_bytes: u64,
    pub(super) is_name: bool,
}

/// A string value: anything up to [`MAX_STRING_BYTES`].
const VALUE_STRING: StrRule = StrRule { max_bytes: MAX_STRING_BYTES, is_name: false };

/// A reader that knows its position and where the file ends.
pub(super) struct Cursor<R> {
    reader: R,
    pos: u64,
    file_len: u64,
    file: Arc<str>,
}

/// A number that can be read in place from little-endian bytes.
trait Number: bytemuck::Pod {}
impl<T: bytemuck::Pod> Number for T {}

impl<R: BufRead + Seek> Cursor<R> {
    /// Reads from the start of a file of `file_len` bytes.
    pub(super) fn new(reader: R, file_len: u64, file: Arc<str>) -> Self {
        Self { reader, pos: 0, file_len, file }
    }

    /// Bytes from the start of the file to the next read.
    pub(super) fn pos(&self) -> u64 {
        self.pos
    }

    /// Bytes of the whole file.
    pub(super) fn file_len(&self) -> u64 {
        self.file_len
    }

    /// Bytes from here to the end of the file.
    pub(super) fn remaining(&self) -> u64 {
        self.file_len.saturating_sub(self.pos)
    }

    /// An error at `offset`.
    pub(super) fn error(
        &self,
        kind: Kind,
        place: Place<'_>,
        offset: u64,
        expected: impl std::fmt::Display,
        found: impl std::fmt::Display,
    ) -> GgufError {
        GgufError::new(kind, self.file.clone(), offset, place.subject(), expected, found)
    }

    fn io_error(&self, place: Place<'_>, source: std::io::Error) -> GgufError {
        let kind = match source.kind() {
            std::io::ErrorKind::UnexpectedEof => Kind::Changed,
            _ => Kind::Io,
        };
        let expected = format_args!("{} readable bytes", self.file_len);
        self.error(kind, place, self.pos, expected, "a read error").with_source(source)
    }

    /// Checks that `n_bytes` more bytes of `what` lie in the file and below the cap on metadata.
    fn need(&self, place: Place<'_>, n_bytes: u64, what: &str) -> Result<(), GgufError> {
        if n_bytes > self.remaining() {
            let expected = format_args!("{n_bytes} bytes of {what}");
            let found = format_args!("{} bytes to the end of the file", self.remaining());
            return Err(self.error(Kind::Truncated, place, self.pos, expected, found));
        }
        // Neither side overflows: pos + n_bytes is at most file_len.
        if self.pos + n_bytes > MAX_METADATA_BYTES {
            let expected = format_args!("at most {MAX_METADATA_BYTES} bytes before the tensor data");
            let found = format_args!("{what} that ends at byte {}", self.pos + n_bytes);
            return Err(self.error(Kind::TooLarge, place, self.pos, expected, found));
        }
        Ok(())
    }

    /// Fills `out`, whose length was checked with [`Cursor::need`].
    fn fill(&mut self, place: Place<'_>, out: &mut [u8]) -> Result<(), GgufError> {
        self.reader.read_exact(out).map_err(|e| self.io_error(place, e))?;
        self.pos += out.len() as u64;
        Ok(())
    }

    /// `N` bytes.
    pub(super) fn bytes<const N: usize>(&mut self, place: Place<'_>, what: &str) -> Result<[u8; N], GgufError> {
        self.need(place, N as u64, what)?;
        let mut out = [0; N];
        self.fill(place, &mut out)?;
        Ok(out)
    }

    /// A `u32`.
    pub(super) fn u32(&mut self, place: Place<'_>, what: &str) -> Result<u32, GgufError> {
        self.bytes(place, what).map(u32::from_le_bytes)
    }

    /// A `u64`.
    pub(super) fn u64(&mut self, place: Place<'_>, what: &str) -> Result<u64, GgufError> {
        self.bytes(place, what).map(u64::from_le_bytes)
    }

    /// A count that is at most `max` and whose items, at `min_bytes` each, fit into the rest of the file.
    pub(super) fn count(&mut self, place: Place<'_>, what: &str, max: u64, min_bytes: u64) -> Result<u64, GgufError> {
        let offset = self.pos;
        let count = self.u64(place, what)?;
        if count > max {
            let expected = format_args!("a {what} of at most {max}");
            return Err(self.error(Kind::TooLarge, place, offset, expected, count));
        }
        let room = self.remaining() / min_bytes;
        if count > room {
            let expected = format_args!("a {what} of at most {room}, which the rest of the file could hold");
            return Err(self.error(Kind::Truncated, place, offset, expected, count));
        }
        Ok(count)
    }

    /// A string's length, checked against `rule` and the file.
    fn str_len(&mut self, place: Place<'_>, rule: StrRule, what: &str) -> Result<u64, GgufError> {
        let offset = self.pos;
        let len = self.u64(place, what)?;
        if len > self.remaining() {
            let expected = format_args!("a length of {what} of at most {} to the end of the file", self.remaining());
            return Err(self.error(Kind::Truncated, place, offset, expected, len));
        }
        if len == 0 && rule.is_name {
            return Err(self.error(Kind::EmptyName, place, offset, format_args!("a non-empty {what}"), "length 0"));
        }
        if len > rule.max_bytes {
            let kind = if rule.is_name { Kind::NameTooLong } else { Kind::TooLarge };
            let expected = format_args!("a {what} of at most {} bytes", rule.max_bytes);
            return Err(self.error(kind, place, offset, expected, format_args!("{len} bytes")));
        }
        self.need(place, len, what)?;
        Ok(len)
    }

    /// A length-prefixed UTF-8 string.
    pub(super) fn string(&mut self, place: Place<'_>, rule: StrRule, what: &str) -> Result<String, GgufError> {
        let len = self.str_len(place, rule, what)?;
        let start = self.pos;
        let mut bytes = self.alloc::<u8>(place, len)?;
        self.fill(place, &mut bytes)?;
        String::from_utf8(bytes).map_err(|e| self.utf8_error(place, start, &e.utf8_error(), e.as_bytes(), what))
    }

    fn utf8_error(
        &self,
        place: Place<'_>,
        start: u64,
        error: &std::str::Utf8Error,
        bytes: &[u8],
        what: &str,
    ) -> GgufError {
        let valid = error.valid_up_to();
        let byte = bytes.get(valid).copied().unwrap_or_default();
        let expected = format_args!("UTF-8 in {what}");
        self.error(Kind::InvalidUtf8, place, start + valid as u64, expected, format_args!("byte 0x{byte:02x}"))
    }

    /// `len` zeroed elements, whose bytes were checked against the file's length.
    fn alloc<T: Number>(&self, place: Place<'_>, len: u64) -> Result<Vec<T>, GgufError> {
        let mut out = Vec::new();
        let len = len as usize;
        if out.try_reserve_exact(len).is_err() {
            let expected = format_args!("memory for {} bytes", len.saturating_mul(size_of::<T>()));
            return Err(self.error(Kind::TooLarge, place, self.pos, expected, "an allocation failure"));
        }
        out.resize(len, T::zeroed());
        Ok(out)
    }

    fn numbers<T: Number>(&mut self, place: Place<'_>, len: u64) -> Result<Vec<T>, GgufError> {
        // `count` has checked that len * size_of::<T>() fits the file, hence 64 bits.
        self.need(place, len * size_of::<T>() as u64, "array")?;
        let mut out = self.alloc::<T>(place, len)?;
        self.fill(place, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }

    fn bool_from(&self, place: Place<'_>, offset: u64, byte: u8) -> Result<bool, GgufError> {
        match byte {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.error(Kind::BadBool, place, offset, "0 or 1", other)),
        }
    }

    fn bools(&mut self, place: Place<'_>, len: u64) -> Result<Vec<bool>, GgufError> {
        let start = self.pos;
        let bytes = self.numbers::<u8>(place, len)?;
        match bytes.iter().position(|&b| b > 1) {
            Some(i) => Err(self.bool_from(place, start + i as u64, bytes[i]).expect_err("not 0 or 1")),
            // Collects in place: u8 and bool have the same size.
            None => Ok(bytes.into_iter().map(|b| b == 1).collect()),
        }
    }

    /// Strings in two passes: the first sums the lengths, so that the second allocates exactly once.
    fn strings(&mut self, place: Place<'_>, len: u64) -> Result<StrArray, GgufError> {
        let start = self.pos;
        let mut ends = Vec::new();
        let mut text_len = 0u64;
        if ends.try_reserve_exact(len as usize).is_err() {
            let expected = format_args!("memory for {len} strings");
            return Err(self.error(Kind::TooLarge, place, start, expected, "an allocation failure"));
        }
        for _ in 0..len {
            let n = self.str_len(place, VALUE_STRING, "array element")?;
            self.skip(place, n)?;
            // At most the file's length.
            text_len += n;
            ends.push(text_len);
        }
        let end = self.pos;
        self.seek(place, start)?;
        let mut text = self.alloc::<u8>(place, text_len)?;
        let mut from = 0;
        for &to in &ends {
            let n = self.u64(place, "array element")?;
            if n != to - from {
                return Err(self.error(Kind::Changed, place, self.pos, format_args!("length {}", to - from), n));
            }
            let at = self.pos;
            let (from_idx, to_idx) = (from as usize, to as usize);
            self.fill(place, &mut text[from_idx..to_idx])?;
            // Each on its own: two broken strings may make a valid one together.
            let part = &text[from_idx..to_idx];
            std::str::from_utf8(part).map_err(|e| self.utf8_error(place, at, &e, part, "array element"))?;
            from = to;
        }
        debug_assert_eq!(self.pos, end);
        let text = String::from_utf8(text).expect("made of valid strings");
        Ok(StrArray::with_parts(text, ends))
    }

    fn skip(&mut self, place: Place<'_>, n_bytes: u64) -> Result<(), GgufError> {
        // `need` keeps n_bytes below MAX_METADATA_BYTES.
        self.reader.seek_relative(n_bytes as i64).map_err(|e| self.io_error(place, e))?;
        self.pos += n_bytes;
        Ok(())
    }

    fn seek(&mut self, place: Place<'_>, pos: u64) -> Result<(), GgufError> {
        self.reader.seek(SeekFrom::Start(pos)).map_err(|e| self.io_error(place, e))?;
        self.pos = pos;
        Ok(())
    }

    /// A type id of a value or of an array's elements.
    fn value_type(&mut self, place: Place<'_>, what: &str) -> Result<ValueType, GgufError> {
        let offset = self.pos;
        let id = self.u32(place, what)?;
        ValueType::from_id(id)
            .ok_or_else(|| self.error(Kind::UnknownValueType, place, offset, format_args!("a {what} of 0 to 12"), id))
    }

    /// A metadata value with its type.
    pub(super) fn value(&mut self, place: Place<'_>) -> Result<Value, GgufError> {
        let ty = self.value_type(place, "value type")?;
        Ok(match ty {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::U64 => Value::U64(u64::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.bytes(place, "value")?)),
            ValueType::Bool => {
                let offset = self.pos;
                let [byte] = self.bytes(place, "value")?;
                Value::Bool(self.bool_from(place, offset, byte)?)
            }
            ValueType::Str => Value::Str(self.string(place, VALUE_STRING, "value")?),
            ValueType::Array => Value::Array(self.array(place)?),
        })
    }

    fn array(&mut self, place: Place<'_>) -> Result<Array, GgufError> {
        let offset = self.pos;
        let ty = self.value_type(place, "element type")?;
        if ty == ValueType::Array {
            let expected = "elements that are not arrays themselves";
            return Err(self.error(Kind::NestedArray, place, offset, expected, "element type 9 (array)"));
        }
        let len = self.count(place, "array length", MAX_ARRAY_LEN, ty.min_bytes())?;
        Ok(match ty {
            ValueType::U8 => Array::U8(self.numbers(place, len)?),
            ValueType::I8 => Array::I8(self.numbers(place, len)?),
            ValueType::U16 => Array::U16(self.numbers(place, len)?),
            ValueType::I16 => Array::I16(self.numbers(place, len)?),
            ValueType::U32 => Array::U32(self.numbers(place, len)?),
            ValueType::I32 => Array::I32(self.numbers(place, len)?),
            ValueType::F32 => Array::F32(self.numbers(place, len)?),
            ValueType::U64 => Array::U64(self.numbers(place, len)?),
            ValueType::I64 => Array::I64(self.numbers(place, len)?),
            ValueType::F64 => Array::F64(self.numbers(place, len)?),
            ValueType::Bool => Array::Bool(self.bools(place, len)?),
            ValueType::Str | ValueType::Array => Array::Str(self.strings(place, len)?),
        })
    }
}
