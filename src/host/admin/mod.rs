//! The admin socket: how an operator on the same machine talks to a running host.
//!
//! ```text
//! playhouse ps, top, reload ... ─ client ─► admin.sock (0600, in a folder 0700) ─► server ─► trait House ─► the tree
//!                                one JSON line each way; lines without end for `events`
//! ```
//!
//! Reading order: [`protocol`] is what crosses; [`path`] where; [`socket`] how the socket comes to be and whose it is;
//! [`server`] answers; [`client`] asks. The trait [`House`] is what the server needs of a host; tests have a second one.
//!
//! The socket is for the host's own user and root: its mode says so, and the server asks the kernel who is calling. Nothing
//! here can start a model or read a prompt.

pub mod protocol;
pub mod path;
pub mod socket;
pub mod server;
pub mod client;

pub use client::{Client, ClientError};
pub use path::usual_path;
pub use playhouse_actors::Stamped;
pub use protocol::{Answer, Failure, FailureKind, HostInfo, Reloaded, Request, Restarted};
pub use server::{AdminServer, Options};
pub use socket::SocketError;

use playhouse_actors::inventory::Device;
use playhouse_actors::{Drained, EventLog, HouseStatus};
use std::future::Future;
use std::time::Duration;

/// What the admin socket needs of a running host.
pub trait House: Send + Sync + 'static {
    /// How everything is; `None` once the tree has ended.
    fn status(&self) -> impl Future<Output = Option<HouseStatus>> + Send;

    /// The devices now; empty where there are none or the tree has ended.
    fn devices(&self) -> impl Future<Output = Vec<Device>> + Send;

    /// What happened since its start.
    fn log(&self) -> &EventLog;

    /// Reads the configuration file again and goes over to it, or only says what that would do. A file that is not right
    /// changes nothing.
    ///
    /// # Errors
    /// [`FailureKind::BadConfig`] with the diagnostics as the configuration's own crate renders them,
    /// [`FailureKind::BadModel`], [`FailureKind::NoModelFile`], [`FailureKind::DoesNotFit`], [`FailureKind::NoDevices`], [`FailureKind::NotPossible`]
    /// where the host has no file, [`FailureKind::Ended`].
    fn reload(&self, dry_run: bool) -> impl Future<Output = Result<Reloaded, Failure>> + Send;

    /// Ends the workers of a model (by name or alias) or of a device (by UUID, PCI bus id or index) and starts others; a
    /// device in quarantine is taken back.
    ///
    /// # Errors
    /// [`FailureKind::NoSuchTarget`], [`FailureKind::Ended`].
    fn restart(&self, target: &str) -> impl Future<Output = Result<Restarted, Failure>> + Send;

    /// Takes no more requests and waits until the open ones have ended, or ends them when the time is up; without a time,
    /// the configured one. The host goes on, and takes no requests, until it is stopped or the drain is taken back.
    fn drain(&self, deadline: Option<Duration>) -> impl Future<Output = Drained> + Send;

    /// Takes requests again after a drain, or in the middle of one. Whether there was one.
    ///
    /// # Errors
    /// [`FailureKind::Ended`] if the host was told to stop.
    fn undrain(&self) -> impl Future<Output = Result<bool, Failure>> + Send;

    /// Asks the host to end as SIGTERM does, and returns at once.
    fn stop(&self);
}
