//! `playhouse worker`: one replica's engine, started by the host over a socket. Not for people, and hidden from them: a
//! worker never comes here, `main` turns it into one before any command line is read.

use super::{CliError, RunCommand};

/// A worker has no flags: the host's first frame says everything.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        Err(CliError::usage(
            "`playhouse worker` is started by `playhouse serve`, over a socket; there is nothing to type",
        ))
    }
}
