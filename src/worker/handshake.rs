//! The first frame in each direction: who speaks, which version, and what is to be done.
//!
//! ```text
//! host   -> worker   "PLAYWORK" | u32 LE: protocol | u8: n | n bytes: build | Hello   (postcard)
//! worker -> host     "PLAYWORK" | u32 LE: protocol | u8: n | n bytes: build | Welcome (postcard)
//! ```
//!
//! Everything before `Hello` and `Welcome` keeps its form in all versions, so that two that do not fit can still say
//! who they are. What follows is read only if protocol and build are the same: the encoding names no fields, so another
//! build may mean something else by the same bytes.

use super::frame::{FrameError, append, decode};
use playhouse_actors::inventory::DeviceId;
use playhouse_actors::messages::WorkerSpec;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The first bytes of either side.
pub const MAGIC: [u8; 8] = *b"PLAYWORK";
/// Counts the changes of what follows the greetings.
pub const PROTOCOL: u32 = 1;

/// Which protocol, of which build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// See [`PROTOCOL`].
    pub protocol: u32,
    /// The package's version.
    pub build: String,
}

impl Version {
    /// This program's.
    pub fn ours() -> Self {
        Self { protocol: PROTOCOL, build: env!("CARGO_PKG_VERSION").to_owned() }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "protocol {} of build {}", self.protocol, self.build)
    }
}

/// What the host begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The host's process: a worker that has another parent has lost its host.
    pub host_pid: u32,
    /// Threads that the worker should use on the CPU. The text does not depend on it.
    pub threads: u32,
    /// The task.
    pub spec: WorkerSpec,
}

/// What the worker answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Its process.
    pub pid: u32,
    /// What it runs on.
    pub device: Opened,
}

/// What came of opening the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Opened {
    /// This one was opened; the host compares it with the one it asked for.
    Device(DeviceId),
    /// None, and why; the worker ends.
    Refused(String),
}

/// Why two processes do not work together.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// Whoever is there is no worker, or no host.
    #[error(
        "the first bytes are {found:02x?}, expected {MAGIC:02x?}: this is no worker of playhouse; a host app that is its own \
         worker calls `playhouse::worker::run_if_worker()` first in its main"
    )]
    Magic {
        /// What came.
        found: Vec<u8>,
    },
    /// Versions differ.
    #[error("we speak {ours}, the other side {theirs}: host and worker must be the same build")]
    Version {
        /// This side's.
        ours: Version,
        /// The other's.
        theirs: Version,
    },
    /// The socket was closed instead.
    #[error("the socket was closed before the other side had greeted")]
    Closed,
    /// No frame, or not such a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// Appends the payload of a greeting.
///
/// # Errors
/// [`FrameError::Encode`], such as for a path that is not UTF-8.
pub fn append_greeting<T: Serialize>(version: &Version, body: &T, payload: &mut Vec<u8>) -> Result<(), FrameError> {
    payload.extend_from_slice(&MAGIC);
    payload.extend_from_slice(&version.protocol.to_le_bytes());
    let too_long = |_| FrameError::Encode { what: "build", why: "its name is longer than 255 bytes".to_owned() };
    payload.push(u8::try_from(version.build.len()).map_err(too_long)?);
    payload.extend_from_slice(version.build.as_bytes());
    append(body, payload)
}

/// Reads the payload of a greeting.
///
/// # Errors
/// [`HandshakeError`]; versions are compared before the rest is read.
pub fn read_greeting<T: DeserializeOwned>(ours: &Version, payload: &[u8]) -> Result<T, HandshakeError> {
    let Some(rest) = payload.strip_prefix(&MAGIC) else {
        return Err(HandshakeError::Magic { found: payload[..payload.len().min(MAGIC.len())].to_vec() });
    };
    let short = || FrameError::Malformed {
        expected: "a version",
        bytes: payload.len(),
        why: "it ends within the version".to_owned(),
    };
    let (protocol, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let (n_build, rest) = rest.split_first().ok_or_else(short)?;
    let (build, body) = rest.split_at_checked(usize::from(*n_build)).ok_or_else(short)?;
    let build = String::from_utf8_lossy(build).into_owned();
    let theirs = Version { protocol: u32::from_le_bytes(*protocol), build };
    if theirs != *ours {
        return Err(HandshakeError::Version { ours: ours.clone(), theirs });
    }
    Ok(decode(body)?)
}
