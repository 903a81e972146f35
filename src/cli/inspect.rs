//! `playhouse inspect FILE`: metadata, tensors, types and bytes of a GGUF file of any architecture.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::json;

use super::{CliError, RunCommand};
use crate::gguf::{GgufFile, Value, quote};

/// The arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The GGUF file; of a split one, the first part
    file: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Elements of an array that are shown.
const SHOWN_ELEMS: usize = 8;

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let file = GgufFile::open(&self.file)?;
        if self.json { super::print_json(&document(&file)) } else { super::print(&report(&file)) }
    }
}

/// Tensors and bytes of one type.
#[derive(Debug, Default, serde::Serialize)]
struct TypeTotal {
    tensors: u64,
    elements: u64,
    bytes: u64,
}

fn totals(file: &GgufFile) -> BTreeMap<&'static str, TypeTotal> {
    let mut totals: BTreeMap<_, TypeTotal> = BTreeMap::new();
    for t in file.tensors() {
        let total = totals.entry(t.dtype.name()).or_default();
        total.tensors += 1;
        total.elements += t.n_elems();
        total.bytes += t.n_bytes();
    }
    totals
}

fn document(file: &GgufFile) -> serde_json::Value {
    let metadata: serde_json::Map<_, _> = file.metadata().iter().map(|(k, v)| (k.to_owned(), value_json(v))).collect();
    let tensors: Vec<_> = file
        .tensors()
        .map(|t| {
            json!({"name": t.name, "type": t.dtype.name(), "dims": t.dims, "bytes": t.n_bytes(),
                "offset": t.offset(), "part": t.shard_idx()})
        })
        .collect();
    json!({
        "file": file.label(),
        "version": file.version(),
        "alignment": file.alignment(),
        "parts": file.n_shards(),
        "metadata": metadata,
        "tensors": tensors,
        "types": totals(file),
    })
}

/// A value with its type; of a long array the first elements.
fn value_json(value: &Value) -> serde_json::Value {
    match value {
        Value::Array(a) => {
            let shown: Vec<_> =
                (0..a.len().min(SHOWN_ELEMS)).filter_map(|i| a.get(i)).map(|v| scalar_json(&v)).collect();
            json!({"type": "array", "elements": a.elem_type().name(), "length": a.len(), "first": shown})
        }
        scalar => json!({"type": scalar.value_type().name(), "value": scalar_json(scalar)}),
    }
}

fn scalar_json(value: &Value) -> serde_json::Value {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        // JSON has no infinities: those are written as strings.
        Value::F32(v) if v.is_finite() => json!(v),
        Value::F64(v) if v.is_finite() => json!(v),
        Value::F32(v) => json!(v.to_string()),
        Value::F64(v) => json!(v.to_string()),
        Value::Bool(v) => json!(v),
        Value::Str(v) => json!(v),
        Value::Array(_) => value_json(value),
    }
}

fn report(file: &GgufFile) -> String {
    let mut out = String::new();
    let parts = if file.n_shards() == 1 { String::new() } else { format!(", {} parts", file.n_shards()) };
    let (version, alignment) = (file.version(), file.alignment());
    // Writing to a String does not fail.
    let _ = writeln!(out, "{}: GGUF version {version}, alignment {alignment}{parts}", file.label());
    let _ = writeln!(out, "\nmetadata: {} entries", file.metadata().len());
    for (key, value) in file.metadata().iter() {
        let _ = writeln!(out, "  {:<44} {:<20} {}", quote(key), value.describe_type(), short(value));
    }
    let _ = writeln!(out, "\ntensors: {}", file.tensors().len());
    for t in file.tensors() {
        let dims = t.dims.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        let _ = writeln!(out, "  {:<44} {:<8} {:<24} {:>14}", quote(&t.name), t.dtype.name(), dims, t.n_bytes());
    }
    let _ = writeln!(out, "\ntypes:");
    for (name, total) in totals(file) {
        let _ = writeln!(
            out,
            "  {name:<8} {:>6} tensors {:>16} elements {:>16} bytes",
            total.tensors, total.elements, total.bytes
        );
    }
    out
}

/// A value on one line.
fn short(value: &Value) -> String {
    match value {
        Value::Array(a) => {
            let shown = (0..a.len().min(SHOWN_ELEMS)).filter_map(|i| a.get(i)).map(|v| short(&v)).collect::<Vec<_>>();
            let more = if a.len() > SHOWN_ELEMS { ", ..." } else { "" };
            format!("[{}{more}]", shown.join(", "))
        }
        Value::Str(s) => format!("\"{}\"", quote(s)),
        Value::F32(v) => v.to_string(),
        Value::F64(v) => v.to_string(),
        Value::Bool(v) => v.to_string(),
        int => int.as_int().unwrap_or_default().to_string(),
    }
}
