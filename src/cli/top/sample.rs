//! One look at a running host.

use playhouse_actors::HouseStatus;
use playhouse_actors::inventory::Device;

use crate::cli::CliError;
use crate::cli::socket::SocketArgs;
use crate::host::admin::client::News;
use crate::host::admin::{HostInfo, Stamped};

/// Events that are kept for the log.
const EVENTS_MAX: usize = 64;

/// What was seen.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) host: HostInfo,
    pub(super) house: HouseStatus,
    pub(super) devices: Vec<Device>,
    /// The last of them, oldest first.
    pub(super) events: Vec<Stamped>,
}

impl Sample {
    /// Looks, over a connection of its own: a host that was started anew is found again.
    pub(super) fn take(socket: &SocketArgs) -> Result<Self, CliError> {
        let mut client = socket.connect()?;
        let (host, house) = client.status()?;
        let devices = client.devices()?;
        let mut events = Vec::new();
        for news in client.events(false)? {
            if let News::Event(stamped) = news? {
                events.push(stamped);
            }
        }
        events.drain(..events.len().saturating_sub(EVENTS_MAX));
        Ok(Self { host, house, devices, events })
    }
}
