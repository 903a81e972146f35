//! `gpu CHECK FILE...`: whole models on a GPU, held against what we promise. `run.sh` beside it runs all of it.
//!
//! | check | what it holds |
//! |---|---|
//! | `parity` | each position's distribution against the CPU oracle |
//! | `determinism` | the same tokens and bits: again, in company, in other chunks, in another process |
//! | `memory` | what is planned against what NVML sees; `memory --limit 24GB --context 4096` under a limit |
//! | `start` | a worker's way from its start to its first token, against the limit of the bus |
//! | `table` | results of `playhouse bench --json` in a folder, as a table beside what must and what should be reached |
//!
//! Each line of a result begins with PASS or FAIL; the exit status is 1 if one failed. Workers are processes of this program.

mod parity;
mod worker;
mod determinism;
mod memory;
mod start;
mod table;

use std::path::Path;
use std::process::ExitCode;

/// What a check says: each line with its verdict.
#[derive(Debug, Default)]
pub(crate) struct Verdicts {
    n_failed: usize,
}

impl Verdicts {
    /// Prints a line, PASS or FAIL.
    pub(crate) fn line(&mut self, holds: bool, text: &str) {
        println!("{} {text}", if holds { "PASS" } else { "FAIL" });
        self.n_failed += usize::from(!holds);
    }

    /// Prints a line for a figure that falls short of what must be reached: it is no fault of the answers.
    pub(crate) fn figure(&mut self, reached: bool, text: &str) {
        println!("{} {text}", if reached { "PASS" } else { "SHORT" });
    }
}

/// Anything that keeps a check from looking.
pub(crate) type Trouble = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    // A worker of a check is this program again, and does not come back from here.
    playhouse::worker::run_if_worker();
    let mut args = std::env::args().skip(1);
    let (check, rest) = (args.next().unwrap_or_default(), args.collect::<Vec<String>>());
    let mut verdicts = Verdicts::default();
    let result = match check.as_str() {
        "parity" => each(&rest, &mut verdicts, parity::check),
        "determinism" => each(&rest, &mut verdicts, determinism::check),
        "start" => each(&rest, &mut verdicts, start::check),
        "memory" => memory::Settings::parse(&rest).and_then(|(settings, files)| {
            each(&files, &mut verdicts, |file, verdicts| memory::check(file, &settings, verdicts))
        }),
        "table" => rest.first().ok_or_else(|| "a folder is missing".into()).and_then(|f| table::print(f.as_ref())),
        _ => Err("gpu parity|determinism|memory|start FILE..., or gpu table FOLDER".into()),
    };
    if let Err(trouble) = result {
        verdicts.line(false, &format!("{check}: {trouble}"));
    }
    ExitCode::from(u8::from(verdicts.n_failed > 0))
}

/// Runs a check on each file; one that cannot be looked at does not keep the others from it.
fn each(
    files: &[String],
    verdicts: &mut Verdicts,
    mut check: impl FnMut(&Path, &mut Verdicts) -> Result<(), Trouble>,
) -> Result<(), Trouble> {
    if files.is_empty() {
        return Err("a model file is missing".into());
    }
    for file in files {
        if let Err(trouble) = check(Path::new(file), verdicts) {
            verdicts.line(false, &format!("{file}: {trouble}"));
        }
    }
    Ok(())
}

/// A file's name without folder and ending.
pub(crate) fn name_of(file: &Path) -> String {
    file.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned())
}

/// The value in the middle.
pub(crate) fn middle(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}
