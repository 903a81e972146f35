//! `playhouse tokenize --model FILE [TEXT|-]`: the token ids of a text.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::{CliError, Exit, RunCommand};
use crate::gguf::GgufFile;
use crate::text::{EncodeOptions, Tokenizer};

/// The arguments of `tokenize`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A GGUF file with a vocabulary, or a tokenizer.json
    #[arg(long, short)]
    model: PathBuf,
    /// Print a JSON array of ids
    #[arg(long)]
    json: bool,
    /// Add no BOS or EOS, and read the text of special tokens as plain text
    #[arg(long)]
    no_special: bool,
    /// The text; `-` or nothing reads it from stdin
    #[arg(allow_hyphen_values = true)]
    text: Option<String>,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let tokenizer = open(&self.model)?;
        let text = match self.text {
            Some(text) if text != "-" => text,
            _ => from_stdin()?,
        };
        let options = if self.no_special { EncodeOptions::PLAIN } else { EncodeOptions::PROMPT };
        let ids = tokenizer.encode(&text, options)?;
        if self.json {
            let array = serde_json::to_string(&ids).map_err(|e| CliError::new(Exit::Software, e))?;
            return super::print(&(array + "\n"));
        }
        super::print(&table(&tokenizer, &ids))
    }
}

fn open(path: &Path) -> Result<Tokenizer, CliError> {
    if path.extension().is_some_and(|ext| ext == "json") {
        return Ok(Tokenizer::from_json_file(path)?);
    }
    Ok(Tokenizer::from_gguf(&GgufFile::open(path)?)?)
}

fn from_stdin() -> Result<String, CliError> {
    let mut text = String::new();
    std::io::stdin().lock().read_to_string(&mut text).map_err(|e| match e.kind() {
        std::io::ErrorKind::InvalidData => CliError::usage("stdin is not UTF-8 text"),
        _ => CliError::io(Path::new("stdin"), e),
    })?;
    Ok(text)
}

/// A line per token: its id and its bytes, with those that are no printable text escaped.
fn table(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut out = String::new();
    for &id in ids {
        let _ = write!(out, "{id:>7}  ");
        for chunk in tokenizer.token_bytes(id).utf8_chunks() {
            let _ = write!(out, "{}", chunk.valid().escape_debug());
            for byte in chunk.invalid() {
                let _ = write!(out, "\\x{byte:02x}");
            }
        }
        out.push('\n');
    }
    out
}
