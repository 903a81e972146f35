//! `playhouse undrain`: has a running host take requests again after a drain.

use super::socket::SocketArgs;
use super::{CliError, RunCommand};

/// The arguments of `undrain`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    socket: SocketArgs,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let report = match self.socket.connect()?.undrain()? {
            true => "undrained: the host takes requests again\n",
            false => "the host was not draining: it takes requests\n",
        };
        super::print(report)
    }
}
