//! What crosses the admin socket: one JSON object per line. A client sends a [`Request`], the host answers with one
//! [`Reply`], or with one per event; then the client may send the next.
//!
//! ```text
//! → {"version":1,"command":"reload","dry_run":true}
//! ← {"version":1,"answer":{"reloaded":{...}}}
//! → {"version":1,"command":"frobnicate"}
//! ← {"version":1,"error":{"kind":"unknown_command","message":"..."}}
//! ```

use playhouse_actors::house::Applied;
use playhouse_actors::inventory::{Device, DeviceId};
use playhouse_actors::policy::placement::Plan;
use playhouse_actors::{HouseStatus, Stamped};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of the protocol. A host answers its own version only: the commands are part of the same binary.
pub const VERSION: u32 = 1;

/// Longest request line, bytes.
pub const REQUEST_BYTES_MAX: usize = 16 << 10;

/// Longest answer line that a client reads, bytes.
pub const ANSWER_BYTES_MAX: usize = 16 << 20;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How everything is.
    Status {},
    /// The devices.
    Devices {},
    /// Read the configuration file again.
    Reload {
        /// Only say what it would do.
        #[serde(default)]
        dry_run: bool,
    },
    /// Take no more requests and wait for the open ones.
    Drain {
        /// For how long; without it, as configured.
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// Take requests again.
    Undrain {},
    /// Restart a model or a device.
    Restart {
        /// Name or alias of a model; UUID, PCI bus id or index of a device.
        target: String,
    },
    /// What happened lately.
    Events {
        /// And what happens from now on, until the client goes.
        #[serde(default)]
        follow: bool,
    },
    /// End the host as SIGTERM does.
    Stop {},
}

/// The commands, for messages; the tags of [`Request`].
const COMMANDS: &[&str] = &["status", "devices", "reload", "drain", "undrain", "restart", "events", "stop"];

impl Request {
    /// The line that asks this, with its line break.
    pub fn to_line(&self) -> String {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        value["version"] = VERSION.into();
        format!("{value}\n")
    }

    /// Reads a line.
    ///
    /// # Errors
    /// [`Failure`] of the kinds `BadRequest`, `Version` or `UnknownCommand`, for the client.
    pub fn parse(line: &str) -> Result<Self, Failure> {
        let bad = |message: String| Failure::new(FailureKind::BadRequest, message);
        let mut value: Value =
            serde_json::from_str(line).map_err(|error| bad(format!("not a JSON object: {error}")))?;
        let object = value.as_object_mut().ok_or_else(|| bad("expected a JSON object".into()))?;
        match object.remove("version") {
            Some(version) if version == VERSION => {}
            Some(version) => {
                let message = format!("protocol version {version}, this host speaks {VERSION}");
                return Err(Failure::new(FailureKind::Version, message));
            }
            None => return Err(bad(format!("`version` is missing; this host speaks {VERSION}"))),
        }
        let Some(command) = object.get("command").and_then(Value::as_str) else {
            return Err(bad("`command` is missing or no text".into()));
        };
        if !COMMANDS.contains(&command) {
            let message = format!("unknown command `{command}`, expected one of {}", COMMANDS.join(", "));
            return Err(Failure::new(FailureKind::UnknownCommand, message));
        }
        let label = format!("command `{command}`");
        serde_json::from_value(value).map_err(|error| bad(format!("{label}: {error}")))
    }
}

/// One line of the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// Of the protocol.
    pub version: u32,
    /// The answer or the error.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What a reply says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done.
    Answer(Box<Answer>),
    /// It was not.
    Error(Failure),
}

impl Reply {
    /// A reply in this version.
    pub fn new(result: Result<Answer, Failure>) -> Self {
        let outcome = match result {
            Ok(answer) => Outcome::Answer(Box::new(answer)),
            Err(failure) => Outcome::Error(failure),
        };
        Self { version: VERSION, outcome }
    }

    /// The line, with its line break.
    pub fn to_line(&self) -> String {
        let mut line = serde_json::to_string(self).unwrap_or_else(|error| {
            let failure = Failure::new(FailureKind::Internal, format!("the answer cannot be written: {error}"));
            // A failure is two texts, which JSON can hold.
            serde_json::to_string(&Self::new(Err(failure))).unwrap_or_default()
        });
        line.push('\n');
        line
    }
}

/// What the host answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To `status`.
    Status {
        /// The process.
        host: HostInfo,
        /// The tree.
        house: HouseStatus,
    },
    /// To `devices`.
    Devices(Vec<Device>),
    /// To `reload`.
    Reloaded(Reloaded),
    /// To `drain`.
    Drained {
        /// Streams that had to be ended.
        ended: u32,
    },
    /// To `undrain`; and to a `drain` that was taken back before it was over.
    Undrained {
        /// Whether requests were refused.
        was_draining: bool,
    },
    /// To `restart`.
    Restarted(Restarted),
    /// To `events`: one of them.
    Event(Stamped),
    /// To `events`: the reader was too slow, and so many are missing here.
    Missed(u64),
    /// To `events` without `follow`: that was all.
    EndOfEvents {},
    /// To `stop`: it has begun.
    Stopping {},
}

/// The process that answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Its id.
    pub pid: u32,
    /// Version of Playhouse.
    pub version: String,
}

impl HostInfo {
    /// This process.
    pub fn this() -> Self {
        Self { pid: std::process::id(), version: env!("CARGO_PKG_VERSION").to_owned() }
    }
}

/// What a reload did or, if only asked, would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// The replicas that stay, start and stop.
    pub applied: Applied,
    /// What is where then.
    pub plan: Plan,
    /// Keys that changed in the file and only take effect when the host is started again.
    pub restart_needed: Vec<String>,
}

/// What was restarted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Restarted {
    /// A model.
    Model {
        /// Its own name.
        model: String,
        /// How many replicas it has.
        replicas: u32,
    },
    /// A device.
    Device {
        /// Which.
        device: DeviceId,
    },
}

/// Why the host did not do what it was asked to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What kind.
    pub kind: FailureKind,
    /// The words for a person.
    pub message: String,
}

impl Failure {
    /// A failure of a kind, with the words for a person.
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The tree has ended.
    pub fn ended() -> Self {
        Self::new(FailureKind::Ended, "the supervision tree has ended")
    }

    /// The host was told to stop.
    pub fn stopping() -> Self {
        Self::new(FailureKind::Ended, "the host is stopping")
    }
}

/// Kinds of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The line is no request.
    BadRequest,
    /// It is one of another version.
    Version,
    /// There is no such command.
    UnknownCommand,
    /// The line is too long.
    TooLong,
    /// Nothing came for too long.
    Timeout,
    /// The caller is neither the host's user nor root.
    Forbidden,
    /// Too many clients.
    Busy,
    /// The configuration file is not right; nothing was changed.
    BadConfig,
    /// A model's file is damaged or not supported; nothing was changed.
    BadModel,
    /// A model's file is missing or may not be read; nothing was changed.
    NoModelFile,
    /// The devices cannot be listed; nothing was changed.
    NoDevices,
    /// The configuration is right and does not fit the devices; nothing was changed.
    DoesNotFit,
    /// There is no such model or device.
    NoSuchTarget,
    /// This host cannot do that, such as reload without a file.
    NotPossible,
    /// The supervision tree has ended, or the host is stopping.
    Ended,
    /// The host is at fault.
    Internal,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(line: &str) -> FailureKind {
        Request::parse(line).expect_err(line).kind
    }

    #[test]
    fn every_request_survives_the_wire() {
        let requests = [
            Request::Status {},
            Request::Devices {},
            Request::Reload { dry_run: true },
            Request::Drain { timeout_ms: Some(1500) },
            Request::Undrain {},
            Request::Restart { target: "qwen".into() },
            Request::Events { follow: true },
            Request::Stop {},
        ];
        assert_eq!(requests.len(), COMMANDS.len());
        for (request, command) in requests.into_iter().zip(COMMANDS) {
            let line = request.to_line();
            assert!(line.contains(&format!("\"command\":\"{command}\"")), "{line}");
            assert_eq!(Request::parse(&line), Ok(request));
        }
        assert_eq!(
            Request::parse(r#"{"version":1,"command":"events"}"#),
            Ok(Request::Events { follow: false }),
            "options may be left out"
        );
    }

    #[test]
    fn what_is_no_request_is_refused_by_kind() {
        assert_eq!(kind("hello"), FailureKind::BadRequest);
        assert_eq!(kind("[1]"), FailureKind::BadRequest);
        assert_eq!(kind("{}"), FailureKind::BadRequest);
        assert_eq!(kind(r#"{"version":2,"command":"status"}"#), FailureKind::Version);
        assert_eq!(kind(r#"{"version":1,"command":"frobnicate"}"#), FailureKind::UnknownCommand);
        assert_eq!(kind(r#"{"version":1,"command":"status","verbose":true}"#), FailureKind::BadRequest);
        assert_eq!(kind(r#"{"version":1,"command":"restart"}"#), FailureKind::BadRequest);
        assert_eq!(kind(r#"{"version":1,"command":"drain","timeout_ms":-1}"#), FailureKind::BadRequest);
    }

    #[test]
    fn replies_survive_the_wire() {
        use playhouse_actors::HouseEvent;
        let event = HouseEvent::Released { device: DeviceId::gpu("GPU-1") };
        let replies = [
            Reply::new(Ok(Answer::Drained { ended: 3 })),
            Reply::new(Ok(Answer::Event(Stamped { number: 7, unix_ms: 1, event }))),
            Reply::new(Err(Failure::new(FailureKind::Busy, "later"))),
        ];
        for reply in replies {
            let line = reply.to_line();
            assert!(line.starts_with(r#"{"version":1,"#) && line.ends_with('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Reply>(&line).expect(&line), reply);
        }
    }
}
