//! Writes GGUF version 3: metadata first, then tensors whose bytes are streamed in the order of their declaration.
//!
//! What it writes, the reader accepts: names, counts and shapes are held to the same [`super::limits`].

use std::io::Write;

use indexmap::IndexMap;

use super::limits::*;
use super::table::ALIGNMENT_KEY;
use super::tensors::tensor_size;
use super::value::{Array, StrArray, Value, ValueType};
use crate::dtype::DType;

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum GgufWriteError {
    #[error("writing failed")]
    Io(#[from] std::io::Error),
    #[error("{what} `{name}` has {found} bytes, expected 1 to {max}")]
    NameLength { what: &'static str, name: String, found: usize, max: u64 },
    #[error("{what}: expected at most {max}, found {found}")]
    TooMany { what: String, max: u64, found: u64 },
    #[error("tensor `{name}` is declared twice")]
    DuplicateTensor { name: String },
    #[error("tensor `{name}`: {} {dims:?} is no shape: expected 1 to 4 dimensions of at least 1, whole blocks per row and less than 2^63 bytes", dtype.name())]
    BadShape { name: String, dims: Vec<u64>, dtype: DType },
    #[error("`general.alignment` must be a u32 that is a power of two from 8 to 4096")]
    BadAlignment,
    #[error("tensor `{name}`: expected {expected} bytes, found {found}")]
    WrongLength { name: String, expected: u64, found: u64 },
    #[error("expected the data of tensor `{expected}`, found that of `{found}`")]
    WrongOrder { expected: String, found: String },
    #[error("all declared tensors are written, there is none for {found} more bytes")]
    Surplus { found: u64 },
}

/// The header of a file to be written.
///
/// ```
/// use playhouse::dtype::DType;
/// use playhouse::gguf::{GgufFile, writer::GgufWriter};
///
/// let mut writer = GgufWriter::new();
/// writer.set("general.architecture", "llama").tensor("w", &[2, 2], DType::F32);
/// let bytes = writer.to_vec(&[&[0; 16]]).unwrap();
/// let file = GgufFile::from_vec("example", bytes).unwrap();
/// assert_eq!(file.metadata().str("general.architecture").unwrap(), "llama");
/// ```
#[derive(Debug, Clone, Default)]
pub struct GgufWriter {
    metadata: IndexMap<String, Value>,
    tensors: Vec<Declared>,
}

#[derive(Debug, Clone)]
struct Declared {
    name: String,
    dims: Vec<u64>,
    dtype: DType,
}

impl GgufWriter {
    /// A header without keys and tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a key; a second value for the same key replaces the first in its place.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<Value>) -> &mut Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// The value of a key that was set.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Declares a tensor; `dims[0]` is the length of a row.
    pub fn tensor(&mut self, name: impl Into<String>, dims: &[u64], dtype: DType) -> &mut Self {
        self.tensors.push(Declared { name: name.into(), dims: dims.to_vec(), dtype });
        self
    }

    /// Checks and writes the header; the sink that it returns takes the data.
    ///
    /// # Errors
    /// Where the reader would refuse the header, or where `out` fails.
    pub fn begin<W: Write>(self, mut out: W) -> Result<TensorSink<W>, GgufWriteError> {
        let alignment = self.alignment()?;
        let (header, tensors, data_bytes) = self.header(alignment)?;
        out.write_all(&header)?;
        Ok(TensorSink { out, tensors, next: 0, written: 0, alignment, data_bytes })
    }

    /// The whole file in memory; `data` has one slice per tensor in the order of declaration.
    ///
    /// # Errors
    /// As [`GgufWriter::begin`] and [`TensorSink::write`].
    pub fn to_vec(self, data: &[&[u8]]) -> Result<Vec<u8>, GgufWriteError> {
        let mut sink = self.begin(Vec::new())?;
        for bytes in data {
            sink.write(bytes)?;
        }
        sink.finish()
    }

    fn alignment(&self) -> Result<u64, GgufWriteError> {
        match self.metadata.get(ALIGNMENT_KEY) {
            None => Ok(DEFAULT_ALIGNMENT.into()),
            Some(&Value::U32(a)) if a.is_power_of_two() && (MIN_ALIGNMENT..=MAX_ALIGNMENT).contains(&a) => Ok(a.into()),
            Some(_) => Err(GgufWriteError::BadAlignment),
        }
    }

    /// The padded header, the size of each tensor, and the bytes of all data with padding.
    fn header(self, alignment: u64) -> Result<(Vec<u8>, Vec<Pending>, u64), GgufWriteError> {
        at_most("metadata entries", MAX_KEYS, self.metadata.len())?;
        at_most("tensors", MAX_TENSORS, self.tensors.len())?;
        let mut out = Vec::new();
        out.extend_from_slice(b"GGUF");
        out.extend_from_slice(&3u32.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&(self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_name(&mut out, "key", key, MAX_KEY_BYTES)?;
            put_value(&mut out, key, value)?;
        }
        let mut sized = Vec::with_capacity(self.tensors.len());
        let mut names = std::collections::HashSet::new();
        let mut offset = 0u64;
        for t in self.tensors {
            let bad_shape = || GgufWriteError::BadShape { name: t.name.clone(), dims: t.dims.clone(), dtype: t.dtype };
            if !(1..=MAX_DIMS as usize).contains(&t.dims.len()) {
                return Err(bad_shape());
            }
            let (_, n_bytes) = tensor_size(&t.dims, t.dtype).map_err(|_| bad_shape())?;
            put_name(&mut out, "tensor", &t.name, MAX_TENSOR_NAME_BYTES)?;
            out.extend_from_slice(&(t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend_from_slice(&d.to_le_bytes()));
            out.extend_from_slice(&t.dtype.id().to_le_bytes());
            out.extend_from_slice(&offset.to_le_bytes());
            let next = offset.checked_add(n_bytes).and_then(|end| end.checked_next_multiple_of(alignment));
            offset = next.ok_or_else(bad_shape)?;
            if !names.insert(t.name.clone()) {
                return Err(GgufWriteError::DuplicateTensor { name: t.name });
            }
            sized.push(Pending { name: t.name, n_bytes });
        }
        at_most("bytes before the tensor data", MAX_METADATA_BYTES, out.len())?;
        let padded = out.len().next_multiple_of(alignment as usize);
        out.resize(padded, 0);
        Ok((out, sized, offset))
    }
}

/// A declared tensor that waits for its bytes.
#[derive(Debug)]
struct Pending {
    name: String,
    n_bytes: u64,
}

/// Takes the data of the declared tensors in order, in pieces of any size, and pads each tensor.
#[derive(Debug)]
pub struct TensorSink<W> {
    out: W,
    tensors: Vec<Pending>,
    /// The tensor whose bytes come next.
    next: usize,
    /// Bytes of that tensor so far.
    written: u64,
    alignment: u64,
    data_bytes: u64,
}

impl<W: Write> TensorSink<W> {
    /// Bytes of all tensors with their padding, for a progress bar.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// The tensor whose bytes come next, and how many of them are missing.
    pub fn expects(&self) -> Option<(&str, u64)> {
        self.tensors.get(self.next).map(|t| (t.name.as_str(), t.n_bytes - self.written))
    }

    /// Writes all bytes of the next tensor, whose name must be `name`.
    ///
    /// # Errors
    /// [`GgufWriteError::WrongOrder`], or as [`TensorSink::write`].
    pub fn write_named(&mut self, name: &str, bytes: &[u8]) -> Result<(), GgufWriteError> {
        match self.expects() {
            Some((expected, _)) if expected != name => {
                Err(GgufWriteError::WrongOrder { expected: expected.to_owned(), found: name.to_owned() })
            }
            _ => self.write(bytes),
        }
    }

    /// Writes all bytes of the next tensor.
    ///
    /// # Errors
    /// [`GgufWriteError::WrongLength`] where they are not exactly the tensor's, or as [`TensorSink::write_part`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), GgufWriteError> {
        match self.expects() {
            Some((name, expected)) if expected != bytes.len() as u64 => {
                Err(GgufWriteError::WrongLength { name: name.to_owned(), expected, found: bytes.len() as u64 })
            }
            _ => self.write_part(bytes),
        }
    }

    /// Writes some bytes of the next tensor, at most as many as are missing.
    ///
    /// # Errors
    /// [`GgufWriteError::WrongLength`] or [`GgufWriteError::Surplus`] where there are too many, or the writer's error.
    pub fn write_part(&mut self, bytes: &[u8]) -> Result<(), GgufWriteError> {
        let found = bytes.len() as u64;
        let Some((name, missing)) = self.expects() else { return Err(GgufWriteError::Surplus { found }) };
        if found > missing {
            return Err(GgufWriteError::WrongLength { name: name.to_owned(), expected: missing, found });
        }
        self.out.write_all(bytes)?;
        self.written += found;
        if found == missing {
            let padding = self.written.next_multiple_of(self.alignment) - self.written;
            self.out.write_all(&[0; MAX_ALIGNMENT as usize][..padding as usize])?;
            self.next += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Ends the file.
    ///
    /// # Errors
    /// [`GgufWriteError::WrongLength`] where a tensor has too few bytes, or the writer's error.
    pub fn finish(mut self) -> Result<W, GgufWriteError> {
        if let Some(t) = self.tensors.get(self.next) {
            let name = t.name.clone();
            return Err(GgufWriteError::WrongLength { name, expected: t.n_bytes, found: self.written });
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

fn at_most(what: impl Into<String>, max: u64, found: usize) -> Result<(), GgufWriteError> {
    let found = found as u64;
    if found > max { Err(GgufWriteError::TooMany { what: what.into(), max, found }) } else { Ok(()) }
}

fn put_name(out: &mut Vec<u8>, what: &'static str, name: &str, max: u64) -> Result<(), GgufWriteError> {
    if name.is_empty() || name.len() as u64 > max {
        return Err(GgufWriteError::NameLength { what, name: super::quote(name), found: name.len(), max });
    }
    put_str(out, name);
    Ok(())
}

fn put_str(out: &mut Vec<u8>, s: &str) {
    out.extend_from_slice(&(s.len() as u64).to_le_bytes());
    out.extend_from_slice(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, key: &str, value: &Value) -> Result<(), GgufWriteError> {
    out.extend_from_slice(&(value.value_type() as u32).to_le_bytes());
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I16(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F32(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::U64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::I64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::F64(v) => out.extend_from_slice(&v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::Str(v) => {
            at_most(format!("bytes of `{}`", super::quote(key)), MAX_STRING_BYTES, v.len())?;
            put_str(out, v);
        }
        Value::Array(v) => put_array(out, key, v)?,
    }
    Ok(())
}

fn put_array(out: &mut Vec<u8>, key: &str, array: &Array) -> Result<(), GgufWriteError> {
    at_most(format!("elements of `{}`", super::quote(key)), MAX_ARRAY_LEN, array.len())?;
    let ty: ValueType = array.elem_type();
    out.extend_from_slice(&(ty as u32).to_le_bytes());
    out.extend_from_slice(&(array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend_from_slice(v),
        Array::I8(v) => out.extend_from_slice(bytemuck::cast_slice(v)),
        Array::U16(v) => out.extend_from_slice(bytemuck::cast_slice(v)),
        Array::I16(v) => out.extend_from_slice(bytemuck::cast_slice(v)),
        Array::U32(v) => out.extend_from_slice(bytemuck::cast_slice(v)),
        Array::I32(v) => out.extend_from_slice(bytemuck::cast_slice(v)),
        Array::F32(v) => out.extend_from_slice(bytemuck::cast_slice(v)),
        Array::U64(v) => out.extend_from_slice(bytemuck::cast_slice(v)),
        Array::I64(v) => out.extend_from_slice(bytemuck::cast_slice(v)),
        Array::F64(v) => out.extend_from_slice(bytemuck::cast_slice(v)),
        Array::Bool(v) => out.extend(v.iter().map(|&b| u8::from(b))),
        Array::Str(v) => put_strings(out, key, v)?,
    }
    Ok(())
}

fn put_strings(out: &mut Vec<u8>, key: &str, strings: &StrArray) -> Result<(), GgufWriteError> {
    for s in strings.iter() {
        at_most(format!("bytes of an element of `{}`", super::quote(key)), MAX_STRING_BYTES, s.len())?;
        put_str(out, s);
    }
    Ok(())
}
