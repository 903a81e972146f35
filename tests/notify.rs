//! The service manager is told, over a real datagram socket.

#[path = "admin/house.rs"]
mod house;

use house::FakeHouse;
use playhouse::host::notify::{Notify, Service};
use playhouse_actors::HouseStatus;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(20);

/// The service manager's end.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn new(socket: UnixDatagram) -> Self {
        socket.set_read_timeout(Some(DEADLINE)).expect("settable");
        Self { socket }
    }

    /// The next message as variables.
    fn message(&self) -> io::Result<BTreeMap<String, String>> {
        let mut buffer = [0; 4096];
        let n_bytes = loop {
            match self.socket.recv(&mut buffer) {
                // A signal: with a timeout the call is not begun again by itself.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => break received?,
            }
        };
        let text = std::str::from_utf8(&buffer[..n_bytes]).expect("text");
        let variable = |line: &str| line.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
        Ok(text.lines().map(|line| variable(line).expect("NAME=VALUE")).collect())
    }

    /// Waits for a message with this variable.
    fn wait_for(&self, name: &str) -> BTreeMap<String, String> {
        let begun = Instant::now();
        loop {
            let message = self.message().unwrap_or_else(|error| panic!("no {name}: {error}"));
            if message.contains_key(name) {
                return message;
            }
            assert!(begun.elapsed() < DEADLINE, "no {name}");
        }
    }
}

fn manager_at_path() -> (tempfile::TempDir, Manager, OsString) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("notify");
    let manager = Manager::new(UnixDatagram::bind(&path).expect("free"));
    (folder, manager, path.into_os_string())
}

async fn blocking<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(what).await.expect("no panic")
}

fn ready() -> HouseStatus {
    house::status()
}

fn loading() -> HouseStatus {
    let mut status = house::status();
    if let Some(router) = &mut status.router {
        router.services.iter_mut().for_each(|service| service.ready = 0);
    }
    status
}

fn set(house: &FakeHouse, status: Option<HouseStatus>) {
    *house.status.lock().expect("no panics") = status;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_a_service_is_told() {
    let (_folder, manager, socket) = manager_at_path();
    let house = Arc::new(FakeHouse::new());
    set(&house, Some(loading()));
    let service = Service { socket, watchdog: Some(Duration::from_millis(400)) };
    let notify = Notify::start(house.clone(), Some(service));
    blocking(move || {
        let first = manager.wait_for("STATUS");
        assert!(first["STATUS"].starts_with("not ready: "), "{first:?}");
        assert!(!first.contains_key("READY") && first.contains_key("EXTEND_TIMEOUT_USEC"), "{first:?}");
        assert_eq!(manager.wait_for("WATCHDOG")["WATCHDOG"], "1");

        set(&house, Some(ready()));
        assert_eq!(manager.wait_for("READY")["READY"], "1");

        notify.reloading();
        notify.reloaded();
        let reloading = manager.wait_for("RELOADING");
        assert!(reloading["MONOTONIC_USEC"].parse::<u64>().is_ok_and(|usec| usec > 0), "{reloading:?}");
        manager.wait_for("READY");

        notify.stopping();
        manager.wait_for("STOPPING");
        manager.wait_for("WATCHDOG");

        drop(notify);
        let begun = Instant::now();
        manager.socket.set_read_timeout(Some(Duration::from_millis(800))).expect("settable");
        while manager.message().is_ok() {
            assert!(begun.elapsed() < DEADLINE, "it goes on after it was dropped");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_starves_while_the_supervisor_is_silent() {
    let (_folder, manager, socket) = manager_at_path();
    let house = Arc::new(FakeHouse::new());
    let service = Service { socket, watchdog: Some(Duration::from_millis(200)) };
    let _notify = Notify::start(house.clone(), Some(service));
    blocking(move || {
        manager.wait_for("WATCHDOG");
        set(&house, None);
        // One more may have been on its way; then four intervals of silence.
        manager.socket.set_read_timeout(Some(Duration::from_millis(800))).expect("settable");
        let begun = Instant::now();
        while manager.message().is_ok() {
            assert!(begun.elapsed() < DEADLINE, "the watchdog is fed for a supervisor that is gone");
        }
        set(&house, Some(ready()));
        manager.socket.set_read_timeout(Some(DEADLINE)).expect("settable");
        manager.wait_for("WATCHDOG");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn abstract_sockets_are_reached() {
    let name = format!("playhouse-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).expect("a name");
    let manager = Manager::new(UnixDatagram::bind_addr(&address).expect("free"));
    let service = Service { socket: format!("@{name}").into(), watchdog: None };
    let _notify = Notify::start(Arc::new(FakeHouse::new()), Some(service));
    blocking(move || manager.wait_for("READY")).await;
}

#[tokio::test]
async fn without_a_service_manager_nothing_is_told_and_nothing_fails() {
    let missing = Service { socket: "/nowhere/notify".into(), watchdog: None };
    for service in [None, Some(missing)] {
        let notify = Notify::start(Arc::new(FakeHouse::new()), service);
        notify.reloading();
        notify.stopping();
    }
}
