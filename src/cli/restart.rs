//! `playhouse restart MODEL|DEVICE`: ends workers of a running host and starts others; takes a device out of quarantine.

use super::socket::SocketArgs;
use super::{CliError, RunCommand};
use crate::host::admin::Restarted;

/// The arguments of `restart`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    /// A model by name or alias, or a device by UUID, PCI bus id or index
    #[arg(value_name = "MODEL|DEVICE")]
    target: String,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let report = match self.socket.connect()?.restart(&self.target)? {
            Restarted::Model { model, replicas: 1 } => format!("{model}: 1 replica restarts\n"),
            Restarted::Model { model, replicas } => format!("{model}: {replicas} replicas restart\n"),
            Restarted::Device { device } => format!("{device}: its replicas restart\n"),
        };
        super::print(&report)
    }
}
