//! Header, metadata and tensor descriptions of one file, in the order of the file.

use std::collections::HashMap;
use std::io::{BufRead, Seek};
use std::sync::Arc;

use super::cursor::{Cursor, Place, StrRule};
use super::error::{GgufError, GgufErrorKind as Kind};
use super::limits::*;
use super::metadata::Metadata;
use super::tensors::{self, TensorInfo};
use super::value::Value;

/// The key that sets the alignment of tensor data.
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";

/// Everything of a file but its tensor data.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) version: u32,
    pub(super) alignment: u32,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) by_name: HashMap<String, usize>,
}

/// Reads and checks everything but the tensor data of a file of `file_len` bytes.
pub(super) fn read_table<R: BufRead + Seek>(reader: R, file_len: u64, label: &Arc<str>) -> Result<Table, GgufError> {
    let mut cur = Cursor::new(reader, file_len, label.clone());
    read_magic(&mut cur)?;
    let version = read_version(&mut cur)?;
    let n_tensors = cur.count(Place::Header("n_tensors"), "tensor count", MAX_TENSORS, MIN_TENSOR_ENTRY_BYTES)?;
    let n_keys = cur.count(Place::Header("n_kv"), "metadata count", MAX_KEYS, MIN_KEY_ENTRY_BYTES)?;
    let mut metadata = Metadata::new(label);
    for idx in 0..n_keys {
        read_entry(&mut cur, &mut metadata, idx)?;
    }
    let alignment = alignment(&cur, &metadata)?;
    let (mut tensors, by_name) = read_tensors(&mut cur, n_tensors)?;
    // The position is below MAX_METADATA_BYTES.
    let data_start = cur.pos().next_multiple_of(alignment.into());
    tensors::place_data(&cur, &mut tensors, data_start, alignment.into())?;
    Ok(Table { version, alignment, metadata, tensors, by_name })
}

fn read_magic<R: BufRead + Seek>(cur: &mut Cursor<R>) -> Result<(), GgufError> {
    let place = Place::Header("magic");
    let magic: [u8; 4] = cur.bytes(place, "magic")?;
    if magic == *b"GGUF" {
        return Ok(());
    }
    let looks_like = match &magic {
        b"lmgg" | b"fmgg" | b"tjgg" | b"algg" => " (a GGML file from before GGUF)",
        b"PK\x03\x04" => " (a zip archive, such as a PyTorch checkpoint)",
        b"vers" => " (a Git LFS pointer: run `git lfs pull`)",
        b"<!DO" | b"<!do" | b"<htm" => " (a web page)",
        [_, _, 0, 0] => " (perhaps a safetensors file)",
        _ => "",
    };
    let found = format_args!("\"{}\"{looks_like}", magic.escape_ascii());
    Err(cur.error(Kind::BadMagic, place, 0, "\"GGUF\"", found))
}

fn read_version<R: BufRead + Seek>(cur: &mut Cursor<R>) -> Result<u32, GgufError> {
    let place = Place::Header("version");
    let offset = cur.pos();
    let version = cur.u32(place, "version")?;
    match version {
        2 | 3 => Ok(version),
        // A small number written in the other byte order.
        v if v != 0 && v & 0xffff == 0 => {
            let found = format_args!("version {} in big-endian byte order", v.swap_bytes());
            Err(cur.error(Kind::BigEndian, place, offset, "version 2 or 3 in little-endian byte order", found))
        }
        v => Err(cur.error(Kind::BadVersion, place, offset, "version 2 or 3", v)),
    }
}

fn read_entry<R: BufRead + Seek>(cur: &mut Cursor<R>, metadata: &mut Metadata, idx: u64) -> Result<(), GgufError> {
    let start = cur.pos();
    let rule = StrRule { max_bytes: MAX_KEY_BYTES, is_name: true };
    let key = cur.string(Place::KeyIndex(idx), rule, "key")?;
    if metadata.contains(&key) {
        let found = format_args!("a second one; the first is at byte {}", metadata.offset_of(&key));
        return Err(cur.error(Kind::DuplicateKey, Place::Key(&key), start, "one entry with this key", found));
    }
    let offset = cur.pos();
    let value = cur.value(Place::Key(&key))?;
    metadata.insert(key, value, offset);
    Ok(())
}

fn alignment<R: BufRead + Seek>(cur: &Cursor<R>, metadata: &Metadata) -> Result<u32, GgufError> {
    let found = match metadata.get(ALIGNMENT_KEY) {
        None => return Ok(DEFAULT_ALIGNMENT),
        Some(&Value::U32(a)) if a.is_power_of_two() && (MIN_ALIGNMENT..=MAX_ALIGNMENT).contains(&a) => return Ok(a),
        Some(Value::U32(a)) => format!("u32 {a}"),
        Some(other) => other.describe_type(),
    };
    let offset = metadata.offset_of(ALIGNMENT_KEY);
    let expected = format_args!("a u32 that is a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}");
    Err(cur.error(Kind::BadAlignment, Place::Key(ALIGNMENT_KEY), offset, expected, found))
}

type NamedTensors = (Vec<TensorInfo>, HashMap<String, usize>);

fn read_tensors<R: BufRead + Seek>(cur: &mut Cursor<R>, n_tensors: u64) -> Result<NamedTensors, GgufError> {
    let mut tensors: Vec<TensorInfo> = Vec::new();
    let mut by_name = HashMap::new();
    for idx in 0..n_tensors {
        let start = cur.pos();
        let info = tensors::read_info(cur, idx)?;
        if by_name.insert(info.name.clone(), tensors.len()).is_some() {
            let place = Place::Tensor(&info.name);
            return Err(cur.error(Kind::DuplicateTensor, place, start, "one tensor with this name", "a second one"));
        }
        tensors.push(info);
    }
    Ok((tensors, by_name))
}
