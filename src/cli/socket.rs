//! How commands find a running host, and what its refusals mean for the exit code.

use std::path::PathBuf;

use super::{CliError, Exit};
use crate::host::admin::path::Surroundings;
use crate::host::admin::{Client, ClientError, FailureKind, usual_path};

/// The flag that says where the host is.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct SocketArgs {
    /// The host's admin socket [default: that of this user's host]
    #[arg(long, visible_alias = "admin-socket", value_name = "PATH", env = "PLAYHOUSE_HOST_ADMIN_SOCKET")]
    socket: Option<PathBuf>,
}

impl SocketArgs {
    /// Connects to the host.
    pub(crate) fn connect(&self) -> Result<Client, CliError> {
        let path = self.socket.clone().unwrap_or_else(|| usual_path(&Surroundings::of_process()));
        Ok(Client::connect(&path)?)
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let exit = match &error {
            // A host can be started, and one that starts soon answers.
            ClientError::NoHost { .. } | ClientError::Silent { .. } | ClientError::HungUp { .. } => Exit::Transient,
            ClientError::Denied { .. } => Exit::MissingFile,
            ClientError::Protocol { .. } => Exit::Software,
            ClientError::Refused(failure) => match failure.kind {
                FailureKind::BadConfig | FailureKind::DoesNotFit => Exit::BadConfig,
                FailureKind::BadModel => Exit::BadModel,
                FailureKind::NoModelFile => Exit::MissingFile,
                FailureKind::NoDevices => Exit::NoDevice,
                FailureKind::NoSuchTarget | FailureKind::NotPossible => Exit::Usage,
                FailureKind::Busy | FailureKind::Ended | FailureKind::Timeout => Exit::Transient,
                FailureKind::Forbidden => Exit::MissingFile,
                FailureKind::BadRequest
                | FailureKind::Version
                | FailureKind::UnknownCommand
                | FailureKind::TooLong
                | FailureKind::Internal => Exit::Software,
            },
        };
        Self::new(exit, error)
    }
}
