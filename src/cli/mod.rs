//! The commands of the `playhouse` binary: one table, one file per command.
//!
//! To add a command: a file with `pub(crate) struct Args` (clap derive) that implements `RunCommand`, and a row in
//! the `commands!` table. Results go to stdout through `print` and `print_json`; progress and summaries go to
//! stderr through `note`.

mod error;
mod load;
mod sampling;
mod generate;
mod run;
mod chat;
mod bench;
mod perplexity;
mod inspect;
mod tokenize;
mod synth;
mod worker;
mod serve;
mod plan;
mod socket;
mod show;
mod ps;
mod top;
mod reload;
mod drain;
mod undrain;
mod restart;
mod events;
mod check;
mod devices;

use std::io::Write;
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::Parser;

use crate::http::BuildInfo;

pub use error::{CliError, Exit};

/// What a command does with its arguments.
pub(crate) trait RunCommand {
    /// Runs the command to its end.
    fn run(self) -> Result<(), CliError>;
}

/// The table: a row's doc comment is the command's line in `--help`.
macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident => $module:ident,)*) => {
        #[derive(Debug, clap::Subcommand)]
        enum Command {
            $($(#[$doc])* $name($module::Args),)*
        }

        impl RunCommand for Command {
            fn run(self) -> Result<(), CliError> {
                match self {
                    $(Self::$name(args) => args.run(),)*
                }
            }
        }
    };
}

commands! {
    /// Write text that goes on from a prompt, or hold a conversation
    Run => run,
    /// Show what is in a GGUF file: metadata, tensors, types, bytes, and the memory it takes to run
    Inspect => inspect,
    /// Show the tokens of a text; works on vocabulary-only files of any architecture
    Tokenize => tokenize,
    /// Write a model file with random weights at the true shape of a real model
    Synth => synth,
    /// Measure prefill and decode beside what the machine's memory and arithmetic allow
    Bench => bench,
    /// Measure how well a model predicts a text
    Perplexity => perplexity,
    #[command(hide = true)]
    /// Run one replica's engine for a host; started by it
    Worker => worker,
    /// Run models under supervision until told to stop
    Serve => serve,
    /// Show what would go on which device, and with how much memory, without touching a GPU
    Plan => plan,
    /// Show what a running host has on which device
    Ps => ps,
    /// Watch a running host live: devices, replicas, tokens/s, events
    Top => top,
    /// Have a running host read its configuration again; what did not change goes on undisturbed
    Reload => reload,
    /// Have a running host take no more requests and finish the open ones
    Drain => drain,
    #[command(visible_alias = "uncordon")]
    /// Have a running host take requests again after a drain
    Undrain => undrain,
    /// Restart a model's or a device's workers in a running host
    Restart => restart,
    /// Show what happened in a running host
    Events => events,
    /// Judge a configuration file without starting anything
    Check => check,
    /// List the GPUs of this box
    Devices => devices,
}

/// Runs language models from GGUF files. The same request with the same seed gives the same bytes.
#[derive(Debug, clap::Parser)]
#[command(name = "playhouse", version = BUILD.as_str(), about, after_help = error::EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The version, what it was built from, and for which GPUs.
static BUILD: LazyLock<String> = LazyLock::new(|| {
    let BuildInfo { version, commit } = BuildInfo::default();
    let commit = commit.map(|commit| format!(" ({commit})")).unwrap_or_default();
    let kernels = match playhouse_cuda::kernels::built() {
        Ok(()) => format!("kernels for sm_{}", playhouse_cuda::kernels::ARCHS.replace(',', ", sm_")),
        Err(_) => "no GPU kernels".to_owned(),
    };
    format!("{version}{commit}\n{kernels}")
});

/// The grammar of the command line, for whoever checks or completes commands.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Parses the command line, runs the command and returns its exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are no errors: clap prints them on stdout and says 0. Usage errors are 2.
        Err(e) => {
            let code = if e.use_stderr() { Exit::Usage } else { Exit::Success };
            // A closed stdout or stderr leaves nothing to tell.
            let _ = e.print();
            return code.into();
        }
    };
    match cli.command.run() {
        Ok(()) => Exit::Success.into(),
        Err(e) if e.is_closed_pipe() => Exit::Success.into(),
        Err(e) => {
            note(&e.chain());
            e.exit().into()
        }
    }
}

/// Prints a line to stderr. A closed stderr is no reason to fail.
pub(crate) fn note(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Prints text to stdout as it is and flushes it, so that a reader sees every piece of a stream at once.
///
/// # Errors
/// Where stdout fails; a closed pipe (`playhouse ... | head`) ends the program with exit code 0.
pub(crate) fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(CliError::stdout)
}

/// Prints one JSON document and a line break to stdout.
///
/// # Errors
/// As [`print`].
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), CliError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| CliError::new(Exit::Software, e))?;
    text.push('\n');
    print(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_table_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
