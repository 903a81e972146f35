//! The service manager that listens: where it is, and how it wants to be told.

use super::notifier::Tell;
use sd_notify::NotifyState;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::time::Duration;
use tokio::net::UnixDatagram;

/// The service manager that started us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Its socket, as `NOTIFY_SOCKET` names it: a path, or `@` and an abstract name.
    pub socket: OsString,
    /// It ends us when it hears nothing for so long.
    pub watchdog: Option<Duration>,
}

impl Service {
    /// From `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`; `None` where no service manager listens.
    pub fn from_env() -> Option<Self> {
        Self::from_variables(|name| std::env::var_os(name), std::process::id())
    }

    /// From these variables, for the process `pid`.
    pub fn from_variables(get: impl Fn(&str) -> Option<OsString>, pid: u32) -> Option<Self> {
        let number = |name: &str| get(name).and_then(|text| text.to_str()?.parse::<u64>().ok());
        let socket = get("NOTIFY_SOCKET").filter(|socket| !socket.is_empty())?;
        // Without a process id it is meant for whoever has the variable.
        let ours = get("WATCHDOG_PID").is_none() || number("WATCHDOG_PID") == Some(u64::from(pid));
        let watchdog = number("WATCHDOG_USEC").filter(|usec| ours && *usec > 0).map(Duration::from_micros);
        Some(Self { socket, watchdog })
    }

    pub(super) fn connect(&self) -> io::Result<UnixDatagram> {
        let address = address(&self.socket)?;
        let socket = std::os::unix::net::UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_nonblocking(true)?;
        UnixDatagram::from_std(socket)
    }
}

fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "NOTIFY_SOCKET is neither a path nor an abstract name")),
    }
}

/// What is told at one time, as one message: systemd wants the time of a reload together with it.
pub(super) fn message(tell: &[Tell]) -> io::Result<String> {
    let mut lines = Vec::new();
    for tell in tell {
        lines.push(match tell {
            Tell::Ready => NotifyState::Ready.to_string(),
            Tell::Reloading => format!("{}\n{}", NotifyState::Reloading, NotifyState::monotonic_usec_now()?),
            Tell::Stopping => NotifyState::Stopping.to_string(),
            // A line break would begin another variable.
            Tell::Status(text) => NotifyState::Status(&text.replace('\n', " ")).to_string(),
            Tell::ExtendTimeout(more) => {
                NotifyState::ExtendTimeoutUsec(u32::try_from(more.as_micros()).unwrap_or(u32::MAX)).to_string()
            }
            Tell::Watchdog => NotifyState::Watchdog.to_string(),
        });
    }
    Ok(lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_are_read_as_systemd_writes_them() {
        let read = |variables: &[(&str, &str)]| {
            let get = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into());
            Service::from_variables(get, 42)
        };
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[("NOTIFY_SOCKET", "")]), None);
        let plain = read(&[("NOTIFY_SOCKET", "/run/systemd/notify")]).expect("a service");
        assert_eq!(plain.watchdog, None);
        let usec = ("WATCHDOG_USEC", "3000000");
        let watched = |pid| read(&[("NOTIFY_SOCKET", "@n"), usec, ("WATCHDOG_PID", pid)]).expect("a service").watchdog;
        assert_eq!(watched("42"), Some(Duration::from_secs(3)));
        assert_eq!(watched("43"), None, "meant for another process");
        let without_pid = read(&[("NOTIFY_SOCKET", "@n"), usec]).expect("a service");
        assert_eq!(without_pid.watchdog, Some(Duration::from_secs(3)));
    }

    #[test]
    fn a_message_is_a_line_per_variable() {
        let tell = [
            Tell::Ready,
            Tell::Status("two\nlines".to_owned()),
            Tell::ExtendTimeout(Duration::from_secs(30)),
            Tell::Watchdog,
        ];
        let text = message(&tell).expect("the clock works");
        assert_eq!(text, "READY=1\nSTATUS=two lines\nEXTEND_TIMEOUT_USEC=30000000\nWATCHDOG=1");
        let reload = message(&[Tell::Reloading]).expect("the clock works");
        assert!(reload.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reload}");
    }
}
