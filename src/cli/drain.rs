//! `playhouse drain`: has a running host take no more requests and finish the open ones, and stop then if asked to.

use std::time::Duration;

use playhouse_actors::Drained;

use super::socket::SocketArgs;
use super::{CliError, Exit, RunCommand};

/// The arguments of `drain`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    /// How long open streams may finish, such as `90s`; what is open then is ended [default: the host's `drain`]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// Stop the host afterwards
    #[arg(long)]
    stop: bool,
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    playhouse_config::units::parse_duration(text).map_err(|error| error.to_string())
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let mut client = self.socket.connect()?;
        let report = match client.drain(self.timeout)? {
            Drained::Empty { ended: 0 } => "drained: every stream finished\n".to_owned(),
            Drained::Empty { ended: 1 } => "drained: 1 stream had to be ended\n".to_owned(),
            Drained::Empty { ended } => format!("drained: {ended} streams had to be ended\n"),
            Drained::Undone => {
                let words = "the drain was taken back before it was over: the host takes requests";
                return Err(CliError::new(Exit::Transient, words));
            }
        };
        super::print(&report)?;
        if self.stop { Ok(client.stop()?) } else { Ok(()) }
    }
}
