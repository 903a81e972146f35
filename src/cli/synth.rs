//! `playhouse synth SHAPE --type TYPE -o FILE`: a model file with random weights at the true shape.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};

use super::{CliError, Exit, RunCommand};
use crate::gguf::GgufFile;
use crate::gguf::writer::GgufWriteError;
use crate::synth::{FileType, Plan, SHAPES, Shape};

/// The arguments of `synth`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model whose sizes and metadata the file gets
    #[arg(value_parser = PossibleValuesParser::new(SHAPES.iter().map(|s| s.name)))]
    shape: String,
    /// The mix of tensor types, as in the names of published files
    #[arg(long = "type", value_name = "TYPE", default_value = "Q8_0", ignore_case = true,
        value_parser = PossibleValuesParser::new(FileType::all().map(FileType::name)))]
    file_type: String,
    /// The file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// A GGUF file whose tokenizer to copy, instead of a made-up vocabulary
    #[arg(long, value_name = "FILE")]
    vocab: Option<PathBuf>,
    /// The same seed gives the same file
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

/// What was written.
#[derive(Debug, serde::Serialize)]
struct Report {
    file: String,
    shape: String,
    #[serde(rename = "type")]
    file_type: &'static str,
    seed: u64,
    bytes: u64,
    seconds: f64,
    mb_per_second: f64,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        // clap has checked both names.
        let shape = Shape::named(&self.shape).ok_or_else(|| CliError::usage("unknown shape"))?;
        let file_type = FileType::named(&self.file_type).ok_or_else(|| CliError::usage("unknown type"))?;
        let vocab = self.vocab.as_deref().map(GgufFile::open).transpose()?;
        let plan = Plan::new(shape, file_type, self.seed, vocab.as_ref().map(GgufFile::metadata))?;
        let start = Instant::now();
        let bytes = write(plan, &self.output)?;
        let seconds = start.elapsed().as_secs_f64();
        let report = Report {
            file: self.output.display().to_string(),
            shape: self.shape,
            file_type: file_type.name(),
            seed: self.seed,
            bytes,
            seconds,
            mb_per_second: bytes as f64 / 1e6 / seconds,
        };
        if self.json {
            return super::print_json(&report);
        }
        super::note(&format!(
            "{}: {:.1} MB in {seconds:.2} s, {:.0} MB/s",
            report.file,
            bytes as f64 / 1e6,
            report.mb_per_second
        ));
        Ok(())
    }
}

/// Writes beside the target and renames, so that an interrupted run leaves no half file under the name asked for.
fn write(plan: Plan, path: &Path) -> Result<u64, CliError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let partial = PathBuf::from(name);
    let file = File::create(&partial).map_err(|e| CliError::io(&partial, e))?;
    let written = write_data(plan, file).and_then(|file| {
        let len = file.metadata().map_err(|e| CliError::io(&partial, e))?.len();
        std::fs::rename(&partial, path).map_err(|e| CliError::io(path, e))?;
        Ok(len)
    });
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&partial);
    }
    written
}

fn write_data(plan: Plan, file: File) -> Result<File, CliError> {
    let bar = ProgressBar::new(plan.data_bytes());
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let written = plan.write(file, &mut |n_bytes| bar.set_position(n_bytes));
    bar.finish_and_clear();
    written.map_err(|e| match e {
        GgufWriteError::Io(_) => CliError::new(Exit::Transient, e),
        other => CliError::new(Exit::Software, other),
    })
}
