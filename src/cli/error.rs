//! Why a command failed, and the exit code that says so.

use crate::text::TextError;
use std::error::Error;
use std::process::ExitCode;

use playhouse_config::ConfigError;

use crate::gguf::{GgufError, GgufErrorKind};

/// The exit codes, most of them from BSD `sysexits.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The command did what it was asked to, or was asked to stop.
    Success = 0,
    /// The command line makes no sense.
    Usage = 2,
    /// The model file is damaged or of a kind that we do not run.
    BadModel = 65,
    /// A file is missing or may not be read.
    MissingFile = 66,
    /// There is no usable GPU.
    NoDevice = 69,
    /// The supervisor gave up, or the program is at fault.
    Software = 70,
    /// A condition that may pass: out of memory, a full disk.
    Transient = 75,
    /// The configuration or the placement is wrong.
    BadConfig = 78,
}

/// The last lines of `--help`.
pub(super) const EXIT_CODES: &str = "Exit codes: 0 done, 2 usage, 65 bad model file, 66 missing file, 69 no usable \
GPU, 70 supervisor gave up, 75 transient, 78 bad config or placement";

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A command's failure: a cause and an exit code.
#[derive(Debug)]
pub struct CliError {
    exit: Exit,
    cause: Box<dyn Error + Send + Sync>,
    closed_pipe: bool,
}

impl CliError {
    /// A failure with its cause, which may be an error or a message.
    pub fn new(exit: Exit, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { exit, cause: cause.into(), closed_pipe: false }
    }

    /// A contradiction in the command line that clap cannot see.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message.into())
    }

    /// A failure to read or write the file `path`.
    pub fn io(path: &std::path::Path, source: std::io::Error) -> Self {
        use std::io::ErrorKind::{NotFound, OutOfMemory, PermissionDenied, StorageFull};
        let exit = match source.kind() {
            NotFound | PermissionDenied => Exit::MissingFile,
            OutOfMemory | StorageFull => Exit::Transient,
            _ => Exit::Software,
        };
        Self::new(exit, FileError { path: path.display().to_string(), source })
    }

    pub(super) fn stdout(source: std::io::Error) -> Self {
        let closed_pipe = source.kind() == std::io::ErrorKind::BrokenPipe;
        Self { closed_pipe, ..Self::new(Exit::Transient, FileError { path: "stdout".to_owned(), source }) }
    }

    /// The exit code.
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// Whether the reader of our stdout went away, which is its right.
    pub(super) fn is_closed_pipe(&self) -> bool {
        self.closed_pipe
    }

    /// `error: ` and a line per cause.
    pub fn chain(&self) -> String {
        let cause = self.cause.to_string();
        // Diagnostics of a configuration say so themselves, each of them.
        let mut text = if cause.starts_with("error: ") { cause } else { format!("error: {cause}") };
        let mut source = self.cause.source();
        while let Some(e) = source {
            text.push_str(&format!("\n  caused by: {e}"));
            source = e.source();
        }
        text
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{path}: reading or writing failed")]
struct FileError {
    path: String,
    source: std::io::Error,
}

impl From<ConfigError> for CliError {
    fn from(e: ConfigError) -> Self {
        match e {
            ConfigError::Read { path, source } => Self::io(&path, source),
            ConfigError::Invalid { .. } => Self::new(Exit::BadConfig, e),
        }
    }
}

/// The exit code of a file that cannot be used.
pub(super) fn gguf_exit(error: &GgufError) -> Exit {
    match error.kind() {
        GgufErrorKind::NotFound | GgufErrorKind::MissingShard => Exit::MissingFile,
        GgufErrorKind::Io | GgufErrorKind::Changed => Exit::Transient,
        _ => Exit::BadModel,
    }
}

impl From<GgufError> for CliError {
    fn from(e: GgufError) -> Self {
        Self::new(gguf_exit(&e), e)
    }
}

impl From<TextError> for CliError {
    fn from(e: TextError) -> Self {
        match e {
            TextError::Metadata(e) => e.into(),
            TextError::Read { path, source } => CliError::io(&path, source),
            TextError::TooLong { .. } | TextError::NoToken { .. } => CliError::new(Exit::Usage, e),
            _ => CliError::new(Exit::BadModel, e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn diagnostics_are_shown_as_they_are() {
        let e = playhouse_config::Config::from_text("a.toml", "nope = 1", &playhouse_config::Overrides::none());
        let e = CliError::from(e.expect_err("no such key"));
        assert_eq!(e.exit(), Exit::BadConfig);
        assert!(e.chain().starts_with("error: unknown key `nope`"), "{}", e.chain());
    }

    #[test]
    fn the_chain_has_a_line_per_cause() {
        let e = CliError::io(std::path::Path::new("a/b"), std::io::Error::from(std::io::ErrorKind::NotFound));
        assert_eq!(e.exit(), Exit::MissingFile);
        assert_eq!(e.chain(), "error: a/b: reading or writing failed\n  caused by: entity not found");
    }
}
