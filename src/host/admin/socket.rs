//! How the admin socket comes to be: one per path, for its owner only from its first moment, never over a living one.
//!
//! 1. The folder is made with mode 0700 if it is missing; one that strangers may write to is refused.
//! 2. `PATH.lock` is locked for as long as the host lives. The kernel gives the lock back when the process ends, however
//!    it ends: who has the lock may replace the socket of a host that died.
//! 3. The socket's mode is set to 0600 before it has a name. Linux gives the name the mode of the socket, so there is no
//!    moment in which others could connect, whatever the umask.

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Longest path of a socket, bytes: 108 with the zero at its end (`sun_path`, unix(7)).
const PATH_BYTES_MAX: usize = 107;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// Why there is no admin socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error("the admin socket's path has {found} bytes, at most {PATH_BYTES_MAX} are possible: {}", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its bytes.
        found: usize,
    },
    /// Another host is there.
    #[error("the admin socket {} belongs to another host{holder}", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
        /// Which, as far as it can be found out.
        holder: String,
    },
    /// Something that is no socket is there.
    #[error("{} exists and is no socket; it was left as it is", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Strangers could put a socket of their own there.
    #[error("everybody may write to {}: an admin socket there could be replaced by anybody", folder.display())]
    OpenFolder {
        /// The folder.
        folder: PathBuf,
    },
    /// No room for a file, or for a name in a folder.
    #[error("no room for the admin socket {}: {what}", path.display())]
    DiskFull {
        /// The path.
        path: PathBuf,
        /// What could not be done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The system refused something else.
    #[error("the admin socket {}: {what}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What could not be done.
        what: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

/// A socket that listens, and what keeps its path ours. Dropped, the path is free again.
#[derive(Debug)]
pub struct BoundSocket {
    listener: Option<UnixListener>,
    path: PathBuf,
    identity: (u64, u64),
    // Held, not read: closing it gives the lock back.
    _lock: File,
}

impl BoundSocket {
    /// Binds and listens.
    ///
    /// # Errors
    /// [`SocketError`]; a host can do without the socket.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let found = path.as_os_str().len();
        if found > PATH_BYTES_MAX {
            return Err(SocketError::PathTooLong { path: path.to_owned(), found });
        }
        make_folder(path)?;
        let lock = lock(path)?;
        remove_stale(path)?;
        let listener = listen(path)?;
        let identity = identity(path).map_err(|source| failed(path, "it cannot be seen", source))?;
        Ok(Self { listener: Some(listener), path: path.to_owned(), identity, _lock: lock })
    }

    /// The listening end, which is not blocking. There is one; it is taken once.
    pub fn take_listener(&mut self) -> Option<UnixListener> {
        self.listener.take()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        // Somebody may have removed it and put another there: that is not ours to remove.
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // If it cannot be removed it is stale, which the next host mends.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn failed(path: &Path, what: &'static str, source: io::Error) -> SocketError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => SocketError::DiskFull { path, what, source },
        _ => SocketError::Io { path, what, source },
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = std::fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

fn make_folder(path: &Path) -> Result<(), SocketError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|source| failed(path, "its folder cannot be made", source))?;
    let found = std::fs::metadata(folder).map_err(|source| failed(path, "its folder cannot be seen", source))?;
    let (others_write, sticky) = (found.mode() & 0o002 != 0, found.mode() & 0o1000 != 0);
    if others_write && !sticky {
        return Err(SocketError::OpenFolder { folder: folder.to_owned() });
    }
    Ok(())
}

fn lock(path: &Path) -> Result<File, SocketError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0))
        .open(&name);
    let file = opened.map_err(|source| failed(path, "its lock file cannot be made", source))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(SocketError::InUse { path: path.to_owned(), holder: holder(path) }),
        Err(errno) => Err(failed(path, "its lock file cannot be locked", errno.into())),
    }
}

/// Removes the socket of a host that died. One that somebody still listens to, without our lock, is left alone.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed(path, "it cannot be seen", source)),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    if !matches!(probe(path), Probe::Nobody) {
        return Err(SocketError::InUse { path: path.to_owned(), holder: holder(path) });
    }
    std::fs::remove_file(path).map_err(|source| failed(path, "the old one cannot be removed", source))
}

/// Whether somebody listens at a path.
enum Probe {
    Nobody,
    /// Somebody, at the other end of this.
    Somebody(OwnedFd),
    /// Somebody whose queue of connections is full: busy, or stopped.
    Full,
}

fn probe(path: &Path) -> Probe {
    let connected = || -> Result<OwnedFd, Errno> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        Ok(socket)
    };
    match connected() {
        Ok(socket) => Probe::Somebody(socket),
        Err(Errno::AGAIN) => Probe::Full,
        Err(_) => Probe::Nobody,
    }
}

/// Who listens there, in words that follow "another host".
fn holder(path: &Path) -> String {
    let Probe::Somebody(socket) = probe(path) else { return String::new() };
    let Ok(peer) = rustix::net::sockopt::socket_peercred(&socket) else { return String::new() };
    let pid = peer.pid.as_raw_nonzero();
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = if name.trim().is_empty() { String::new() } else { format!(", {}", name.trim()) };
    format!(" (process {pid}{name}, user {})", peer.uid.as_raw())
}

fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |what| move |errno: Errno| failed(path, what, errno.into());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(failed("no socket can be made"))?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("its mode cannot be set"))?;
    let address = SocketAddrUnix::new(path).map_err(failed("its path is none"))?;
    rustix::net::bind(&socket, &address).map_err(failed("it cannot be bound"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed("it cannot listen"))?;
    Ok(UnixListener::from(socket))
}
