//! Files with a sound structure, in which fields take the values at which checks go wrong: the fuzzer decides which.

#![no_main]

extern crate self as playhouse;

#[path = "../../../src/dtype/mod.rs"]
pub mod dtype;
#[path = "../../../src/gguf/mod.rs"]
pub mod gguf;
#[path = "../../gguf_support/mod.rs"]
mod gguf_support;

use arbitrary::Arbitrary;
use gguf_support::{EDGES, Mutation, RawFile, RawTensor, RawValue, check_any_bytes, mutate, type_bytes, valid};

/// A file and what is done to it.
#[derive(Debug, Arbitrary)]
struct Input {
    base: Base,
    changes: Vec<Change>,
}

#[derive(Debug, Arbitrary)]
enum Base {
    /// The file that the tests break.
    Valid,
    /// One of the fuzzer's own.
    Own { is_version_2: bool, keys: Vec<(Name, OwnValue)>, tensors: Vec<OwnTensor>, n_data: u16 },
}

/// Names that occur, names that mean something, and any other.
#[derive(Debug, Arbitrary)]
enum Name {
    Nth(u8),
    Architecture,
    Alignment,
    SplitCount,
    Tokens,
    Any(Vec<u8>),
}

#[derive(Debug, Arbitrary)]
enum Number {
    Edge(u8),
    Small(u8),
    Any(u64),
}

#[derive(Debug, Arbitrary)]
enum OwnValue {
    Scalar { id: u8, bits: Number },
    Text(Vec<u8>),
    Texts(Vec<Vec<u8>>),
    Array { id: u8, claimed: Option<Number>, elems: Vec<u8> },
}

#[derive(Debug, Arbitrary)]
struct OwnTensor {
    name: Name,
    dims: Vec<Number>,
    type_id: u8,
    /// In units of 32 bytes.
    offset: u16,
}

#[derive(Debug, Arbitrary)]
enum Change {
    Byte(u16, u8),
    Field(u16, Number),
    CopyField(u16, u16),
    Truncate(u16),
    Remove(u16, u8),
    Repeat(u16, u8),
}

impl Number {
    fn get(&self) -> u64 {
        match self {
            Self::Edge(i) => EDGES[usize::from(*i) % EDGES.len()],
            Self::Small(n) => u64::from(*n),
            Self::Any(n) => *n,
        }
    }
}

impl Name {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Nth(n) => format!("key.{n}").into_bytes(),
            Self::Architecture => b"general.architecture".to_vec(),
            Self::Alignment => b"general.alignment".to_vec(),
            Self::SplitCount => b"split.count".to_vec(),
            Self::Tokens => b"tokenizer.ggml.tokens".to_vec(),
            Self::Any(bytes) => bytes.clone(),
        }
    }
}

impl OwnValue {
    fn raw(&self) -> RawValue {
        match self {
            Self::Scalar { id, bits } => {
                let id = u32::from(id % 13);
                RawValue::Scalar(id, bits.get().to_le_bytes()[..type_bytes(id).min(8)].to_vec())
            }
            Self::Text(text) => RawValue::Str(text.clone()),
            Self::Texts(texts) => RawValue::Strs(texts.clone()),
            Self::Array { id, claimed, elems } => {
                let id = u32::from(id % 13);
                let n = claimed.as_ref().map_or((elems.len() / type_bytes(id)) as u64, Number::get);
                RawValue::Array(id, n, elems.clone())
            }
        }
    }
}

impl Base {
    fn file(&self) -> RawFile {
        match self {
            Self::Valid => valid(),
            Self::Own { is_version_2, keys, tensors, n_data } => RawFile {
                version: if *is_version_2 { 2 } else { 3 },
                keys: keys.iter().map(|(name, value)| (name.bytes(), value.raw())).collect(),
                tensors: tensors.iter().map(OwnTensor::raw).collect(),
                ..RawFile::default()
            }
            .data(usize::from(*n_data)),
        }
    }
}

impl OwnTensor {
    fn raw(&self) -> RawTensor {
        RawTensor {
            name: self.name.bytes(),
            dims: self.dims.iter().take(6).map(Number::get).collect(),
            type_id: u32::from(self.type_id % 48),
            offset: u64::from(self.offset) * 32,
        }
    }
}

impl Change {
    fn mutation(&self) -> Mutation {
        match self {
            Self::Byte(at, v) => Mutation::Byte((*at).into(), *v),
            Self::Field(at, v) => Mutation::Field((*at).into(), v.get()),
            Self::CopyField(from, to) => Mutation::CopyField((*from).into(), (*to).into()),
            Self::Truncate(at) => Mutation::Truncate((*at).into()),
            Self::Remove(at, n) => Mutation::Remove((*at).into(), (*n).into()),
            Self::Repeat(at, n) => Mutation::Repeat((*at).into(), (*n).into()),
        }
    }
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    let changes: Vec<Mutation> = input.changes.iter().take(16).map(Change::mutation).collect();
    check_any_bytes(&mutate(&input.base.file().build(), &changes));
});
