//! `playhouse reload`: has a running host read its configuration file again.

use std::fmt::Write as _;

use playhouse_actors::messages::ReplicaId;

use super::socket::SocketArgs;
use super::{CliError, RunCommand};
use crate::host::admin::Reloaded;

/// The arguments of `reload`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    /// Only say what it would do
    #[arg(long)]
    dry_run: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let reloaded = self.socket.connect()?.reload(self.dry_run)?;
        if self.json { super::print_json(&reloaded) } else { super::print(&report(&reloaded, self.dry_run)) }
    }
}

fn report(reloaded: &Reloaded, dry_run: bool) -> String {
    let applied = &reloaded.applied;
    let words = if dry_run { ["would keep", "would stop", "would start"] } else { ["kept", "stopped", "started"] };
    let lists = [&applied.kept, &applied.stopped, &applied.started];
    let mut text = String::new();
    for (word, list) in words.into_iter().zip(lists) {
        let names: Vec<String> = list.iter().map(ReplicaId::to_string).collect();
        let names = if names.is_empty() { "nothing".to_owned() } else { names.join(" ") };
        // Writing to a String does not fail.
        let _ = writeln!(text, "{word:<12} {names}");
    }
    if !reloaded.restart_needed.is_empty() {
        let _ = writeln!(
            text,
            "changed, and in effect when the host is started again: {}",
            reloaded.restart_needed.join(", ")
        );
    }
    text
}
