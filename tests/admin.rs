//! The admin socket: whose it is, what it answers, and that no client can hurt the others.

#[path = "admin/house.rs"]
mod house;

use house::{BAD_CONFIG, FakeHouse};
use playhouse::host::admin::client::News;
use playhouse::host::admin::protocol::{Outcome, REQUEST_BYTES_MAX, Reply};
use playhouse::host::admin::socket::BoundSocket;
use playhouse::host::admin::{
    AdminServer, Answer, Client, ClientError, FailureKind, Options, Request, Restarted, SocketError,
};
use playhouse_actors::inventory::DeviceId;
use playhouse_actors::{Drained, HouseEvent};
use rustix::event::{PollFd, PollFlags};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Longer than anything here takes.
const DEADLINE: Duration = Duration::from_secs(20);

struct Running {
    _folder: tempfile::TempDir,
    path: PathBuf,
    house: Arc<FakeHouse>,
    server: Option<AdminServer>,
}

fn start(house: FakeHouse, options: Options) -> Running {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("playhouse/admin.sock");
    let house = Arc::new(house);
    let server = AdminServer::open(&path, house.clone(), options).expect("it opens");
    Running { _folder: folder, path, house, server: Some(server) }
}

/// Runs a blocking client beside the server.
async fn blocking<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let running = tokio::task::spawn_blocking(what);
    tokio::time::timeout(DEADLINE, running).await.expect("in time").expect("no panic")
}

fn raw(path: &Path) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(path).expect("it listens");
    stream.set_read_timeout(Some(DEADLINE)).expect("settable");
    stream.set_write_timeout(Some(DEADLINE)).expect("settable");
    BufReader::new(stream)
}

/// Sends a line as it is and reads the answer.
fn ask_raw(client: &mut BufReader<UnixStream>, line: &str) -> Outcome {
    client.get_mut().write_all(line.as_bytes()).expect("it reads");
    read_raw(client)
}

fn read_raw(client: &mut BufReader<UnixStream>) -> Outcome {
    let mut answer = String::new();
    client.read_line(&mut answer).expect("it answers");
    serde_json::from_str::<Reply>(&answer).unwrap_or_else(|error| panic!("{answer}: {error}")).outcome
}

fn kind(outcome: Outcome) -> FailureKind {
    match outcome {
        Outcome::Error(failure) => failure.kind,
        Outcome::Answer(answer) => panic!("an answer: {answer:?}"),
    }
}

/// Waits until the other end is closed, and reads nothing.
fn wait_for_hangup(stream: &UnixStream) {
    let mut waited = [PollFd::new(stream, PollFlags::RDHUP)];
    let timeout = DEADLINE.try_into().expect("representable");
    assert_eq!(rustix::event::poll(&mut waited, Some(&timeout)), Ok(1), "it is never hung up");
}

fn released(number: usize) -> HouseEvent {
    HouseEvent::Released { device: DeviceId::gpu(format!("GPU-{number}")) }
}

// --- the socket --------------------------------------------------------------------------------------------------------

#[test]
fn socket_and_folder_are_private_whatever_the_umask() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("made/for/it/admin.sock");
    let before = rustix::process::umask(rustix::fs::Mode::empty());
    let socket = BoundSocket::bind(&path).expect("it binds");
    rustix::process::umask(before);
    assert_eq!(std::fs::metadata(&path).expect("there").mode() & 0o7777, 0o600);
    assert_eq!(std::fs::metadata(path.parent().expect("a folder")).expect("there").mode() & 0o7777, 0o700);
    assert_eq!(std::fs::metadata(path.with_extension("sock.lock")).expect("there").mode() & 0o7777, 0o600);
    drop(socket);
    assert!(!path.exists(), "what was ours is removed");
}

#[test]
fn the_socket_of_a_dead_host_is_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("admin.sock");
    // Closing does not remove the name: this is what `kill -9` leaves.
    drop(UnixListener::bind(&path).expect("free"));
    let stale = std::fs::metadata(&path).expect("left behind").ino();
    let _socket = BoundSocket::bind(&path).expect("it is replaced");
    UnixStream::connect(&path).expect("somebody listens again");
    assert_eq!(std::fs::metadata(&path).expect("there").mode() & 0o777, 0o600, "not inode {stale}");
}

#[test]
fn the_socket_of_a_living_host_is_left_and_its_holder_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("admin.sock");
    let first = BoundSocket::bind(&path).expect("it binds");
    let error = BoundSocket::bind(&path).expect_err("it is taken");
    assert!(matches!(error, SocketError::InUse { .. }), "{error:?}");
    let pid = format!("process {}", std::process::id());
    assert!(error.to_string().contains(&pid), "{error}");
    UnixStream::connect(&path).expect("the first still listens");
    drop(first);
    BoundSocket::bind(&path).expect("it is free again");
}

#[test]
fn a_living_socket_of_somebody_else_is_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("admin.sock");
    let _other = UnixListener::bind(&path).expect("free");
    assert!(matches!(BoundSocket::bind(&path), Err(SocketError::InUse { .. })));
    UnixStream::connect(&path).expect("the other still listens");
}

#[test]
fn what_is_no_socket_is_left() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("admin.sock");
    std::fs::write(&path, "precious").expect("writable");
    assert!(matches!(BoundSocket::bind(&path), Err(SocketError::NotASocket { .. })));
    assert_eq!(std::fs::read_to_string(&path).expect("there"), "precious");
}

#[test]
fn a_path_that_does_not_fit_is_refused_with_its_length() {
    let path = Path::new("/tmp").join("x".repeat(200)).join("admin.sock");
    let error = BoundSocket::bind(&path).expect_err("107 bytes at most");
    assert!(error.to_string().contains("216 bytes, at most 107"), "{error}");
    assert!(!path.parent().expect("a folder").exists(), "nothing was made");
}

#[test]
fn a_folder_that_everybody_may_write_to_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let open = folder.path().join("open");
    std::fs::create_dir(&open).expect("makeable");
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).expect("settable");
    assert!(matches!(BoundSocket::bind(&open.join("admin.sock")), Err(SocketError::OpenFolder { .. })));
    // As /tmp: names of others cannot be replaced there.
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o1777)).expect("settable");
    BoundSocket::bind(&open.join("admin.sock")).expect("sticky folders will do");
}

/// Needs the right to mount; without it there is no disk to fill, and the test says so.
#[test]
fn a_full_disk_is_said_and_no_more() {
    let folder = tempfile::tempdir().expect("a folder");
    let full = folder.path().to_owned();
    let thread = std::thread::spawn(move || {
        // SAFETY: this thread's view of the mounts becomes its own; no descriptor of another thread is concerned.
        let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) };
        let mount = |arguments: &[&str]| {
            let output = std::process::Command::new("mount").args(arguments).arg(&full).output();
            output.is_ok_and(|output| output.status.success())
        };
        let private = std::process::Command::new("mount").args(["--make-rprivate", "/"]).output();
        if unshared.is_err() || !private.is_ok_and(|output| output.status.success()) {
            return None;
        }
        // One inode is the folder itself, the other the lock file's: the socket's name is one too many.
        let refused = mount(&["-t", "tmpfs", "-o", "nr_inodes=2", "none"])
            .then(|| BoundSocket::bind(&full.join("admin.sock")).expect_err("no room for the socket"));
        let no_room = mount(&["-t", "tmpfs", "-o", "nr_inodes=1", "none"])
            .then(|| BoundSocket::bind(&full.join("admin.sock")).expect_err("no room for anything"));
        Some([refused, no_room])
    });
    match thread.join().expect("no panic") {
        Some(errors) => {
            for error in errors {
                let error = error.expect("mounting works here");
                assert!(matches!(error, SocketError::DiskFull { .. }), "{error:?}");
                assert!(error.to_string().starts_with("no room for the admin socket"), "{error}");
            }
        }
        None => println!("this user may not mount: not tested"),
    }
}

// --- the protocol ------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn every_request_reaches_the_house_and_its_answer_the_client() {
    let running = start(FakeHouse::new(), Options::default());
    let path = running.path.clone();
    blocking(move || {
        let mut client = Client::connect(&path).expect("it listens");
        let (host, status) = client.status().expect("a status");
        assert_eq!((host.pid, status), (std::process::id(), house::status()));
        assert_eq!(client.devices().expect("devices"), house::devices());
        let reloaded = client.reload(true).expect("reloaded");
        assert_eq!(
            (reloaded.applied.kept.len(), reloaded.restart_needed.as_slice()),
            (2, &["host.address".into()][..])
        );
        assert_eq!(client.drain(Some(Duration::from_millis(1500))).expect("drained"), Drained::Empty { ended: 3 });
        assert!(client.undrain().expect("undrained"));
        let restarted = client.restart("qwen").expect("restarted");
        assert_eq!(restarted, Restarted::Model { model: "qwen".into(), replicas: 2 });
        let error = client.restart("nobody").expect_err("no such model");
        assert!(
            matches!(&error, ClientError::Refused(failure) if failure.kind == FailureKind::NoSuchTarget),
            "{error:?}"
        );
        client.stop().expect("stopping");
    })
    .await;
    let asked = ["reload dry_run=true", "drain Some(1.5s)", "undrain", "restart qwen", "restart nobody", "stop"];
    assert_eq!(running.house.asked(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_configuration_comes_back_as_it_was_rendered() {
    let running = start(FakeHouse { bad_config: true, ..FakeHouse::new() }, Options::default());
    let path = running.path.clone();
    let error = blocking(move || Client::connect(&path).expect("it listens").reload(false).expect_err("bad")).await;
    let ClientError::Refused(failure) = error else { panic!("{error:?}") };
    assert_eq!((failure.kind, failure.message.as_str()), (FailureKind::BadConfig, BAD_CONFIG));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ended_tree_is_a_typed_failure() {
    let running = start(FakeHouse::new(), Options::default());
    *running.house.status.lock().expect("no panics") = None;
    let path = running.path.clone();
    let error = blocking(move || Client::connect(&path).expect("it listens").status().expect_err("ended")).await;
    assert!(matches!(&error, ClientError::Refused(failure) if failure.kind == FailureKind::Ended), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_is_refused_and_the_connection_goes_on() {
    let running = start(FakeHouse::new(), Options::default());
    let path = running.path.clone();
    blocking(move || {
        let mut client = raw(&path);
        let frobnicate = "{\"version\":1,\"command\":\"frobnicate\"}\n";
        assert_eq!(kind(ask_raw(&mut client, "hello\n")), FailureKind::BadRequest);
        assert_eq!(kind(ask_raw(&mut client, frobnicate)), FailureKind::UnknownCommand);
        assert_eq!(kind(ask_raw(&mut client, "\n")), FailureKind::BadRequest);
        assert_eq!(kind(ask_raw(&mut client, "{\"version\":9,\"command\":\"status\"}\n")), FailureKind::Version);
        client.get_mut().write_all(b"\xff\xfe\n").expect("it reads");
        assert_eq!(kind(read_raw(&mut client)), FailureKind::BadRequest);
        let devices = ask_raw(&mut client, &Request::Devices {}.to_line());
        assert_eq!(devices, Outcome::Answer(Box::new(Answer::Devices(house::devices()))));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_without_end_is_cut_off() {
    let running = start(FakeHouse::new(), Options::default());
    let path = running.path.clone();
    blocking(move || {
        let mut client = raw(&path);
        let long = "x".repeat(REQUEST_BYTES_MAX + 1);
        assert_eq!(kind(ask_raw(&mut client, &long)), FailureKind::TooLong);
        // What was not read makes the end a reset.
        let end = client.read(&mut [0; 1]);
        assert!(!matches!(end, Ok(1)), "it hangs up: {end:?}");
    })
    .await;
}

// --- clients beside each other -----------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_client_is_told_and_hurts_nobody() {
    let options = Options { read_timeout: Duration::from_millis(300), ..Options::default() };
    let running = start(FakeHouse::new(), options);
    let path = running.path.clone();
    blocking(move || {
        let mut silent = raw(&path);
        silent.get_mut().write_all(b"{\"version\":1,").expect("it reads");
        Client::connect(&path).expect("it listens").status().expect("served meanwhile");
        assert_eq!(kind(read_raw(&mut silent)), FailureKind::Timeout);
        assert_eq!(silent.read(&mut [0; 1]).expect("closed"), 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_at_once() {
    let running = start(FakeHouse::new(), Options::default());
    let path = running.path.clone();
    blocking(move || {
        std::thread::scope(|scope| {
            for _ in 0..32 {
                scope.spawn(|| {
                    let mut client = Client::connect(&path).expect("it listens");
                    for _ in 0..10 {
                        assert_eq!(client.status().expect("a status").1, house::status());
                    }
                });
            }
        });
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_too_many_is_told_so() {
    let options = Options { clients_max: 2, ..Options::default() };
    let running = start(FakeHouse::new(), options);
    let path = running.path.clone();
    blocking(move || {
        let mut kept: Vec<Client> = Vec::new();
        for _ in 0..2 {
            let mut client = Client::connect(&path).expect("it listens");
            client.status().expect("a status");
            kept.push(client);
        }
        let error = Client::connect(&path).expect("it listens").status().expect_err("one too many");
        assert!(matches!(&error, ClientError::Refused(failure) if failure.kind == FailureKind::Busy), "{error:?}");
        kept[0].status().expect("the others are served");
        drop(kept);
        // The server sees their end at some time; until then it says busy.
        let begun = std::time::Instant::now();
        while Client::connect(&path).expect("it listens").status().is_err() {
            assert!(begun.elapsed() < DEADLINE, "their places are never free");
            std::thread::yield_now();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_does_not_read_hurts_nobody() {
    let options = Options { write_timeout: Duration::from_millis(200), ..Options::default() };
    let running = start(FakeHouse::new(), options);
    let (path, house) = (running.path.clone(), running.house.clone());
    blocking(move || {
        let mut slow = raw(&path);
        slow.get_mut().write_all(Request::Events { follow: true }.to_line().as_bytes()).expect("it reads");
        house.tell(released(0));
        assert!(matches!(read_raw(&mut slow), Outcome::Answer(_)), "it follows");
        // More than the socket's buffers hold.
        let reason = "x".repeat(4096);
        for number in 0..2000 {
            house.tell(HouseEvent::Quarantined {
                device: DeviceId::gpu(format!("GPU-{number}")),
                reason: reason.clone(),
            });
            if number % 200 == 0 {
                Client::connect(&path).expect("it listens").status().expect("served meanwhile");
            }
        }
        // It is cut off without having read a byte; what the buffers held can still be read, then comes the end.
        wait_for_hangup(slow.get_ref());
        let mut rest = Vec::new();
        let read = slow.read_to_end(&mut rest);
        assert!(read.is_ok() || !rest.is_empty(), "{read:?}");
        assert!(rest.len() < 2000 * 4096, "it was written to for ever");
        Client::connect(&path).expect("it listens").status().expect("served afterwards");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_kept_and_followed() {
    let mut running = start(FakeHouse::new(), Options::default());
    let (path, house) = (running.path.clone(), running.house.clone());
    let numbers = |items: &[News]| -> Vec<u64> {
        let number = |item: &News| match item {
            News::Event(stamped) => stamped.number,
            News::Missed(n_missed) => panic!("{n_missed} missed"),
        };
        items.iter().map(number).collect()
    };
    let (told, heard) = std::sync::mpsc::channel();
    house.tell(released(0));
    house.tell(released(1));
    let follower = tokio::task::spawn_blocking(move || {
        let mut followed = Client::connect(&path).expect("it listens").events(true).expect("asked");
        let first: Vec<News> = followed.by_ref().take(2).map(|item| item.expect("an event")).collect();
        told.send(()).expect("waited for");
        let second: Vec<News> = followed.by_ref().take(1).map(|item| item.expect("an event")).collect();
        let kept = Client::connect(&path).expect("it listens").events(false).expect("asked");
        let kept: Vec<News> = kept.map(|item| item.expect("an event")).collect();
        told.send(()).expect("waited for");
        assert_eq!(followed.next().map(|item| item.is_ok()), None, "the end of the host ends it");
        (first, second, kept)
    });
    let heard = blocking(move || {
        heard.recv_timeout(DEADLINE).expect("two events");
        heard
    })
    .await;
    house.tell(released(2));
    blocking(move || heard.recv_timeout(DEADLINE).expect("the third")).await;
    running.server = None;
    let (first, second, kept) = tokio::time::timeout(DEADLINE, follower).await.expect("in time").expect("no panic");
    assert_eq!((numbers(&first), numbers(&second), numbers(&kept)), (vec![0, 1], vec![2], vec![0, 1, 2]));
    assert!(matches!(&second[0], News::Event(stamped) if stamped.event == released(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_waits_while_others_are_served() {
    let running = start(FakeHouse { drained: tokio::sync::Semaphore::new(0), ..FakeHouse::new() }, Options::default());
    let (path, house) = (running.path.clone(), running.house.clone());
    let drain = tokio::task::spawn_blocking({
        let path = path.clone();
        move || Client::connect(&path).expect("it listens").drain(None).expect("drained")
    });
    blocking(move || Client::connect(&path).expect("it listens").status().expect("served meanwhile")).await;
    house.drained.add_permits(1);
    assert_eq!(
        tokio::time::timeout(DEADLINE, drain).await.expect("in time").expect("no panic"),
        Drained::Empty { ended: 3 }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_server_frees_the_path() {
    let mut running = start(FakeHouse::new(), Options::default());
    let path = running.path.clone();
    running.server = None;
    assert!(!path.exists());
    let error = blocking(move || Client::connect(&path).expect_err("nobody is there")).await;
    assert!(matches!(error, ClientError::NoHost { .. }), "{error:?}");
}
