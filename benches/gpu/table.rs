//! The results of `playhouse bench --json` as a table, beside what must and what should be reached.
//!
//! `run.sh` writes `MODEL.one.json` and `MODEL.many.json`; a figure that is in neither is left out. The figures of others are of the
//! same machine and the same shapes: llama.cpp (ggml 0.25.3) on the same file types, vLLM 0.24.0 on bf16.

use crate::Trouble;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// What is measured: test, and how many sequences or tokens of prompt.
type What = (&'static str, u64);

/// One figure: model, what, llama.cpp, must, aim; tokens a second.
type Target = (&'static str, What, u32, u32, u32);

const ONE: What = ("decode", 1);
const B64: What = ("decode", 64);
const B256: What = ("decode", 256);
const P512: What = ("prefill", 512);
const P4096: What = ("prefill", 4096);

/// 0 where there is no such figure.
const TARGETS: &[Target] = &[
    ("qwen2.5-0.5b-F16", ONE, 731, 1_200, 1_700),
    ("qwen2.5-0.5b-Q8_0", ONE, 916, 1_400, 2_100),
    ("qwen2.5-0.5b-Q4_K_M", ONE, 869, 1_400, 2_200),
    ("phi-3-mini-F16", ONE, 245, 330, 410),
    ("phi-3-mini-Q4_K_M", ONE, 341, 600, 900),
    ("llama-3-8b-F16", ONE, 206, 215, 235),
    ("llama-3-8b-Q4_K_M", ONE, 276, 400, 600),
    ("gpt-oss-20b-MXFP4", ONE, 320, 500, 800),
    ("qwen2.5-0.5b-F16", B64, 15_175, 20_000, 50_000),
    ("qwen2.5-0.5b-F16", B256, 20_377, 35_000, 130_000),
    ("phi-3-mini-F16", B64, 2_259, 6_300, 8_000),
    ("phi-3-mini-F16", B256, 2_681, 7_700, 9_500),
    ("llama-3-8b-Q4_K_M", B64, 4_110, 8_000, 12_000),
    ("llama-3-8b-Q4_K_M", B256, 5_347, 15_000, 20_000),
    ("gpt-oss-20b-MXFP4", B64, 2_209, 5_000, 12_000),
    ("gpt-oss-20b-MXFP4", B256, 4_493, 12_000, 30_000),
    ("qwen2.5-0.5b-F16", P512, 58_000, 60_000, 0),
    ("qwen2.5-0.5b-F16", P4096, 45_000, 120_000, 0),
    ("phi-3-mini-F16", P512, 28_000, 30_000, 0),
    ("phi-3-mini-F16", P4096, 24_000, 50_000, 0),
    ("phi-3-mini-Q4_K_M", P512, 15_000, 20_000, 0),
    ("phi-3-mini-Q4_K_M", P4096, 13_000, 35_000, 0),
    ("llama-3-8b-Q4_K_M", P512, 8_900, 15_000, 0),
    ("llama-3-8b-Q4_K_M", P4096, 9_800, 25_000, 0),
    ("llama-3-8b-F16", P512, 21_000, 22_000, 0),
    ("llama-3-8b-F16", P4096, 24_000, 30_000, 0),
    ("gpt-oss-20b-MXFP4", P512, 9_600, 12_000, 0),
    ("gpt-oss-20b-MXFP4", P4096, 10_400, 20_000, 0),
];

/// Median, slowest, fastest, limit and what it is bound by.
struct Figure {
    median: f64,
    slowest: f64,
    fastest: f64,
    limit: f64,
    by: &'static str,
    runs: u64,
}

pub(crate) fn print(folder: &Path) -> Result<(), Trouble> {
    let figures = read(folder)?;
    println!("| model | test | reached | slowest to fastest | must | aim | llama.cpp | limit | of it |");
    println!("|---|---|---|---|---|---|---|---|---|");
    let mut n_short = 0;
    for (model, what, llama, must, aim) in TARGETS {
        let Some(found) = figures.get(&((*model).to_owned(), what.0.to_owned(), what.1)) else { continue };
        let Figure { median, slowest, fastest, limit, by, .. } = found;
        let is_short = *median < f64::from(*must);
        n_short += usize::from(is_short);
        let median = if is_short { format!("{median:.0} (short)") } else { format!("**{median:.0}**") };
        let aim = if *aim == 0 { "-".to_owned() } else { aim.to_string() };
        println!(
            "| {model} | {} | {median} | {slowest:.0} to {fastest:.0} | {must} | {aim} | {llama} | {limit:.0} ({by}) | {:.0} % |",
            name(*what),
            100.0 * found.median / limit
        );
    }
    let n = figures.len();
    let runs = figures.values().map(|f| f.runs).min().unwrap_or(0);
    println!("\n{n} figures, each the median of {runs} runs or more; {n_short} below what must be reached.");
    Ok(())
}

fn name((test, n): What) -> String {
    match (test, n) {
        ("decode", 1) => "1 sequence".into(),
        ("decode", n) => format!("{n} sequences @ 512"),
        (_, n) => format!("prompt of {n}"),
    }
}

type Key = (String, String, u64);

fn read(folder: &Path) -> Result<BTreeMap<Key, Figure>, Trouble> {
    let mut figures = BTreeMap::new();
    let mut paths: Vec<_> =
        std::fs::read_dir(folder)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    paths.sort();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|e| e == "json")) {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let Some(model) = stem.strip_suffix(".one").or(stem.strip_suffix(".many")) else { continue };
        let report: Value = serde_json::from_str(&std::fs::read_to_string(path)?)
            .map_err(|error| format!("{}: {error}", path.display()))?;
        for result in report["results"].as_array().into_iter().flatten() {
            let test = result["test"].as_str().unwrap_or_default();
            let n = if test == "decode" { &result["n_sequences"] } else { &result["n_tokens"] };
            let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
            let (memory, arithmetic) = (number(&result["limit"]["memory"]), number(&result["limit"]["arithmetic"]));
            let figure = Figure {
                median: number(&result["median"]),
                slowest: number(&result["slowest"]),
                fastest: number(&result["fastest"]),
                limit: memory.min(arithmetic),
                by: if memory < arithmetic { "memory" } else { "arithmetic" },
                runs: result["runs"].as_u64().unwrap_or(0),
            };
            figures.insert((model.to_owned(), test.to_owned(), n.as_u64().unwrap_or(0)), figure);
        }
    }
    Ok(figures)
}
