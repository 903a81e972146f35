//! `playhouse events`: what happened in a running host lately, and what happens from now on.

use super::socket::SocketArgs;
use super::{CliError, RunCommand, show};
use crate::host::admin::client::News;

/// The arguments of `events`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    /// Go on with each event as it happens, until the host ends
    #[arg(long, short)]
    follow: bool,
    /// Print one JSON document per line
    #[arg(long)]
    json: bool,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        for news in self.socket.connect()?.events(self.follow)? {
            let line = match news? {
                News::Event(stamped) if self.json => {
                    serde_json::to_string(&stamped).map_err(|error| CliError::new(super::Exit::Software, error))?
                }
                News::Event(stamped) => format!("{} {}", show::timestamp(stamped.unix_ms), show::event(&stamped.event)),
                News::Missed(n_missed) if self.json => serde_json::json!({ "missed": n_missed }).to_string(),
                News::Missed(n_missed) => format!("({n_missed} events are missing: they came too fast)"),
            };
            super::print(&format!("{line}\n"))?;
        }
        Ok(())
    }
}
