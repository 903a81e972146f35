//! The parts of a file: memory, a single file, or `-00001-of-0000N.gguf` and its sisters.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use super::bytes::Backing;
use super::error::{GgufError, GgufErrorKind as Kind, Subject};
use super::limits::{MAX_SHARDS, MAX_TENSORS};
use super::table::{self, Table};

const SPLIT_COUNT: &str = "split.count";
const SPLIT_NO: &str = "split.no";
const SPLIT_TENSORS: &str = "split.tensors.count";

/// Read buffer for the metadata of a file.
const BUFFER_BYTES: usize = 128 * 1024;

/// One part: where its tensor data comes from.
#[derive(Debug)]
pub(super) struct Shard {
    label: Arc<str>,
    data: ShardData,
}

#[derive(Debug)]
enum ShardData {
    Memory(Arc<Backing>),
    /// Mapped when the first tensor is asked for.
    File {
        path: PathBuf,
        file: File,
        stamp: Stamp,
        map: Mutex<Option<Arc<Backing>>>,
    },
}

/// What tells that somebody changed a file. Without a modification time, the length has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(file: &File) -> std::io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { len: meta.len(), modified: meta.modified().ok() })
    }
}

fn file_error(kind: Kind, label: &Arc<str>, expected: &str, found: impl std::fmt::Display) -> GgufError {
    GgufError::new(kind, label.clone(), 0, Subject::File, expected, found)
}

impl Shard {
    pub(super) fn memory(label: Arc<str>, backing: Backing) -> Self {
        Self { label, data: ShardData::Memory(Arc::new(backing)) }
    }

    pub(super) fn label(&self) -> &Arc<str> {
        &self.label
    }

    /// Opens one file and reads all but its tensor data.
    fn open(path: &Path) -> Result<(Self, Table), GgufError> {
        let label: Arc<str> = path.display().to_string().into();
        let cannot = |e: std::io::Error| {
            let found = format!("{}", e.kind());
            file_error(Kind::NotFound, &label, "a readable file", found).with_source(e)
        };
        // Asked before opening, because opening a pipe waits for its writer.
        let meta = std::fs::metadata(path).map_err(cannot)?;
        if !meta.is_file() {
            let found = if meta.is_dir() { "a directory" } else { "a pipe, socket or device" };
            return Err(file_error(Kind::NotAFile, &label, "a regular file", found));
        }
        let file = File::open(path).map_err(cannot)?;
        let stamp = stamp(&file, &label)?;
        let table = table::read_table(BufReader::with_capacity(BUFFER_BYTES, &file), stamp.len, &label)?;
        let shard = Self { label, data: ShardData::File { path: path.to_owned(), file, stamp, map: Mutex::new(None) } };
        shard.check_unchanged()?;
        Ok((shard, table))
    }

    /// Compares length and modification time with those at opening.
    fn check_unchanged(&self) -> Result<(), GgufError> {
        let ShardData::File { file, stamp: before, .. } = &self.data else { return Ok(()) };
        let now = stamp(file, &self.label)?;
        if now == *before {
            return Ok(());
        }
        let found = if now.len == before.len {
            "a later modification time".to_owned()
        } else {
            format!("{} bytes instead of {}", now.len, before.len)
        };
        Err(file_error(Kind::Changed, &self.label, "the file as it was when opened", found))
    }

    /// The part's bytes; maps the file on first use.
    pub(super) fn backing(&self) -> Result<Arc<Backing>, GgufError> {
        let (path, file, map) = match &self.data {
            ShardData::Memory(backing) => return Ok(backing.clone()),
            ShardData::File { path, file, map, .. } => (path, file, map),
        };
        // A panic while the lock was held leaves `None` or a finished map.
        let mut map = map.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backing) = &*map {
            return Ok(backing.clone());
        }
        self.check_unchanged()?;
        let backing = Backing::map(file, path)
            .map_err(|e| file_error(Kind::Io, &self.label, "a memory map", "an mmap error").with_source(e))?;
        self.check_unchanged()?;
        Ok(map.insert(Arc::new(backing)).clone())
    }
}

fn stamp(file: &File, label: &Arc<str>) -> Result<Stamp, GgufError> {
    Stamp::of(file).map_err(|e| file_error(Kind::Io, label, "a readable file", "an fstat error").with_source(e))
}

/// Opens `path` and, where its metadata says that it is the first of several parts, the others.
pub(super) fn open(path: &Path) -> Result<(Vec<Shard>, Table), GgufError> {
    let (first, mut table) = Shard::open(path)?;
    let n_shards = match table.metadata.opt_u32(SPLIT_COUNT)? {
        None | Some(0 | 1) => return Ok((vec![first], table)),
        Some(n) if n <= MAX_SHARDS.into() => n,
        Some(_) => return Err(table.metadata.invalid(SPLIT_COUNT, format_args!("at most {MAX_SHARDS} parts"))),
    };
    let name = ShardName::of_first(path, &first, &table, n_shards)?;
    let n_tensors = table.metadata.u64(SPLIT_TENSORS)?;
    let mut shards = vec![first];
    for no in 1..n_shards {
        let (shard, part) = open_part(&name, no, n_shards, &shards[0])?;
        append(&mut table, part, &shard, shards.len())?;
        shards.push(shard);
    }
    if table.tensors.len() as u64 != n_tensors {
        let expected = format_args!("the number of tensors in all parts, {}", table.tensors.len());
        return Err(table.metadata.invalid(SPLIT_TENSORS, expected));
    }
    Ok((shards, table))
}

fn open_part(name: &ShardName, no: u32, n_shards: u32, first: &Shard) -> Result<(Shard, Table), GgufError> {
    let path = name.path(no);
    let (shard, part) = Shard::open(&path).map_err(|e| match e.kind() {
        Kind::NotFound => {
            let expected = format_args!("part {} of {n_shards} at {}", no + 1, path.display());
            GgufError::new(Kind::MissingShard, first.label.clone(), 0, Subject::File, expected, e.found())
        }
        _ => e,
    })?;
    if part.metadata.u32(SPLIT_NO)? != no {
        return Err(part.metadata.invalid(SPLIT_NO, format_args!("{no}, as the file name says")));
    }
    if part.metadata.u32(SPLIT_COUNT)? != n_shards {
        return Err(part.metadata.invalid(SPLIT_COUNT, format_args!("{n_shards}, as in the first part")));
    }
    Ok((shard, part))
}

/// Adds the tensors of a later part. Its metadata only says which part it is, and is dropped.
fn append(table: &mut Table, part: Table, shard: &Shard, shard_idx: usize) -> Result<(), GgufError> {
    for mut info in part.tensors {
        let subject = || Subject::Tensor(info.name.clone());
        let error = |kind, expected: &str, found: &str| {
            GgufError::new(kind, shard.label.clone(), info.field_offset, subject(), expected, found)
        };
        if table.tensors.len() as u64 >= MAX_TENSORS {
            return Err(error(Kind::TooLarge, &format!("at most {MAX_TENSORS} tensors in all parts"), "one more"));
        }
        if let Some(&other) = table.by_name.get(&info.name) {
            let found = format!("one in part {} too", table.tensors[other].shard_idx + 1);
            return Err(error(Kind::DuplicateTensor, "one tensor with this name", &found));
        }
        info.shard_idx = shard_idx;
        table.by_name.insert(info.name.clone(), table.tensors.len());
        table.tensors.push(info);
    }
    Ok(())
}

/// `PREFIX-00001-of-00003.gguf` without its number.
#[derive(Debug)]
struct ShardName {
    prefix: PathBuf,
    n_shards: u32,
}

impl ShardName {
    /// The names of all parts from the first one's, which must be the one that was opened.
    fn of_first(path: &Path, shard: &Shard, table: &Table, n_shards: u32) -> Result<Self, GgufError> {
        let no = table.metadata.u32(SPLIT_NO)?;
        let refuse = |kind, expected: String, found: String| {
            let offset = table.metadata.offset_of(SPLIT_NO);
            Err(GgufError::new(kind, shard.label.clone(), offset, Subject::Key(SPLIT_NO.to_owned()), expected, found))
        };
        let file_name = path.file_name().unwrap_or_default().to_string_lossy();
        let parsed = split_file_name(&file_name);
        if no != 0 {
            let first = parsed.map_or_else(
                || "the first part".to_owned(),
                |(stem, _, _)| format!("the first part, {stem}-00001-of-{n_shards:05}.gguf"),
            );
            return refuse(Kind::BadSplit, first, format!("part {} of {n_shards}", no.saturating_add(1)));
        }
        match parsed {
            Some((stem, 1, count)) if count == n_shards => Ok(Self { prefix: path.with_file_name(stem), n_shards }),
            _ => {
                let expected = format!("a file name that ends in -00001-of-{n_shards:05}.gguf");
                refuse(Kind::BadSplit, expected, format!("`{}`", super::error::quote(&file_name)))
            }
        }
    }

    fn path(&self, no: u32) -> PathBuf {
        let mut name = self.prefix.clone().into_os_string();
        name.push(format!("-{:05}-of-{:05}.gguf", no + 1, self.n_shards));
        name.into()
    }
}

/// Stem, number and count of `STEM-00001-of-00003.gguf`.
fn split_file_name(name: &str) -> Option<(&str, u32, u32)> {
    let rest = name.strip_suffix(".gguf")?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (stem, no) = rest.rsplit_once('-')?;
    let number = |s: &str| if s.len() == 5 { s.parse::<u32>().ok() } else { None };
    Some((stem, number(no)?, number(count)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_of_parts_are_parsed() {
        assert_eq!(split_file_name("a-b-00002-of-00013.gguf"), Some(("a-b", 2, 13)));
        for name in ["a.gguf", "a-1-of-3.gguf", "a-00001-of-00003.bin", "a-0000x-of-00003.gguf", "-of-.gguf"] {
            assert_eq!(split_file_name(name), None, "{name}");
        }
    }
}
