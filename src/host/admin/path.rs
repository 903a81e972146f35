//! Where the admin socket is when the configuration does not say: one answer for the host and for those who ask it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The socket's name in its folder.
const NAME: &str = "admin.sock";

/// What the place depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// The effective user.
    pub uid: u32,
    /// `RUNTIME_DIRECTORY`, which systemd sets for a service that has one; several are separated by colons.
    pub runtime_directory: Option<OsString>,
    /// `XDG_RUNTIME_DIR`, which a login session has.
    pub xdg_runtime_dir: Option<OsString>,
}

impl Surroundings {
    /// Those of this process.
    pub fn of_process() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            runtime_directory: std::env::var_os("RUNTIME_DIRECTORY"),
            xdg_runtime_dir: std::env::var_os("XDG_RUNTIME_DIR"),
        }
    }
}

/// The usual path: in the runtime directory of a systemd service; for root `/run/playhouse/admin.sock`; for others
/// `$XDG_RUNTIME_DIR/playhouse/admin.sock`, and without that variable the folder it usually names, `/run/user/UID`.
pub fn usual_path(surroundings: &Surroundings) -> PathBuf {
    let service = surroundings.runtime_directory.as_ref().and_then(first_absolute);
    if let Some(folder) = service {
        return folder.join(NAME);
    }
    if surroundings.uid == 0 {
        return Path::new("/run/playhouse").join(NAME);
    }
    let session = surroundings.xdg_runtime_dir.as_ref().map(PathBuf::from).filter(|folder| folder.is_absolute());
    let session = session.unwrap_or_else(|| PathBuf::from(format!("/run/user/{}", surroundings.uid)));
    session.join("playhouse").join(NAME)
}

fn first_absolute(list: &OsString) -> Option<PathBuf> {
    std::env::split_paths(list).find(|folder| folder.is_absolute())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(uid: u32, runtime: Option<&str>, xdg: Option<&str>, expected: &str) {
        let surroundings = Surroundings {
            uid,
            runtime_directory: runtime.map(OsString::from),
            xdg_runtime_dir: xdg.map(OsString::from),
        };
        assert_eq!(usual_path(&surroundings), Path::new(expected), "{surroundings:?}");
    }

    #[test]
    fn root_has_run_and_users_have_their_session() {
        check(0, None, None, "/run/playhouse/admin.sock");
        check(0, None, Some("/run/user/0"), "/run/playhouse/admin.sock");
        check(1000, None, Some("/run/user/1000"), "/run/user/1000/playhouse/admin.sock");
        check(1000, None, Some("/tmp/x"), "/tmp/x/playhouse/admin.sock");
        check(1000, None, None, "/run/user/1000/playhouse/admin.sock");
        // A relative path must be ignored (XDG Base Directory Specification).
        check(1000, None, Some("relative"), "/run/user/1000/playhouse/admin.sock");
    }

    #[test]
    fn a_service_has_its_runtime_directory() {
        check(990, Some("/run/playhouse"), None, "/run/playhouse/admin.sock");
        check(990, Some("/run/playhouse:/run/other"), Some("/run/user/990"), "/run/playhouse/admin.sock");
        check(990, Some(""), Some("/run/user/990"), "/run/user/990/playhouse/admin.sock");
    }
}
