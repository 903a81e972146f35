//! `playhouse inspect FILE`: metadata, tensors, types and bytes of a GGUF file of any architecture, and for those
//! that Playhouse runs, the memory that takes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::json;

use super::{CliError, RunCommand};
use crate::backend::{KvDtype, MemoryUse};
use crate::engine::{RunnerLimits, vram_usage};
use crate::gguf::{GgufFile, Value, quote};
use crate::models::{self, ModelSpec};

/// The arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The GGUF file; of a split one, the first part
    file: PathBuf,
    /// Tokens per sequence to count memory for; at most the model's context [default: 4096, or the model's context]
    #[arg(long, value_name = "TOKENS")]
    ctx: Option<usize>,
    /// Sequences that run at once, to count memory for
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    sequences: u32,
    /// How keys and values are stored
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = ["f32", "f16", "q8_0"])]
    kv: String,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// Context that is counted where the user names none.
const DEFAULT_CTX: usize = 4096;

/// Elements of an array that are shown.
const SHOWN_ELEMS: usize = 8;

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let file = GgufFile::open(&self.file)?;
        let memory = self.memory(&file)?;
        if self.json {
            let mut document = document(&file);
            document["memory"] = memory.document();
            super::print_json(&document)
        } else {
            super::print(&(report(&file) + &memory.report()))
        }
    }
}

/// The memory that running the file takes, or why it cannot be run.
enum Memory {
    Runs { n_ctx: usize, n_sequences: usize, kv: KvDtype, used: MemoryUse },
    Refused(String),
}

impl Args {
    fn memory(&self, file: &GgufFile) -> Result<Memory, CliError> {
        // A file that we cannot run, such as a vocabulary, can still be looked at.
        let spec = match models::describe(file) {
            Ok(spec) => spec,
            Err(e) => return Ok(Memory::Refused(e.to_string())),
        };
        let n_ctx = self.n_ctx(&spec)?;
        let kv = match self.kv.as_str() {
            "f32" => KvDtype::F32,
            "q8_0" => KvDtype::Q8_0,
            _ => KvDtype::F16,
        };
        let n_sequences = self.sequences as usize;
        let used = vram_usage(&spec, &RunnerLimits::new(n_ctx, n_sequences, kv));
        Ok(Memory::Runs { n_ctx, n_sequences, kv, used })
    }

    fn n_ctx(&self, spec: &ModelSpec) -> Result<usize, CliError> {
        let max = spec.n_ctx_train;
        match self.ctx {
            None => Ok(DEFAULT_CTX.min(max)),
            Some(n) if (1..=max).contains(&n) => Ok(n),
            Some(n) => Err(CliError::usage(format!("--ctx: expected 1 to {max}, the model's context, found {n}"))),
        }
    }
}

impl Memory {
    fn document(&self) -> serde_json::Value {
        match self {
            Self::Refused(why) => json!({"runs": false, "why": why}),
            Self::Runs { n_ctx, n_sequences, kv, used } => json!({
                "runs": true, "ctx": n_ctx, "sequences": n_sequences, "kv_type": kv, "weights_bytes": used.weights,
                "kv_bytes": used.kv, "scratch_bytes": used.scratch, "total_bytes": total(used),
            }),
        }
    }

    fn report(&self) -> String {
        match self {
            Self::Refused(why) => format!("\nnot a model that Playhouse runs: {why}\n"),
            Self::Runs { n_ctx, n_sequences, kv, used } => {
                let row = |name, bytes: u64| format!("  {name:<8} {bytes:>16} bytes  {:>8.2} GiB\n", gib(bytes));
                format!(
                    "\nmemory to run {n_sequences} x {n_ctx} tokens, keys and values as {kv:?}:\n{}{}{}{}",
                    row("weights", used.weights),
                    row("kv", used.kv),
                    row("scratch", used.scratch),
                    row("total", total(used))
                )
            }
        }
    }
}

fn total(used: &MemoryUse) -> u64 {
    used.weights + used.kv + used.scratch
}

fn gib(n_bytes: u64) -> f64 {
    n_bytes as f64 / f64::from(1 << 30)
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
