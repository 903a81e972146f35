//! `playhouse worker`: one replica's engine, started by the host over a socket. Not for people, and hidden from them.

use super::{CliError, RunCommand};
use crate::worker;

/// A worker has no flags: the host's first frame says everything.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        worker::run_if_worker();
        Err(CliError::usage(
            "`playhouse worker` is started by `playhouse serve`, over a socket; there is nothing to type",
        ))
    }
}
