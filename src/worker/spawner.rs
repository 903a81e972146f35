//! Starts processes from one thread that never ends while this program runs.
//!
//! A worker asks the kernel to kill it when its parent dies (PDEATHSIG), and to the kernel the parent is the *thread* that
//! started it. Started from a thread of some pool, a worker would be killed when the pool shrinks.

use crossbeam_channel::{Sender, bounded, unbounded};
use std::io;
use std::process::{Child, Command};
use std::sync::{Mutex, PoisonError};

struct Order {
    command: Command,
    done: Sender<io::Result<Child>>,
}

/// The one thread's orders. Bounded by who waits: each has at most one.
static SPAWNER: Mutex<Option<Sender<Order>>> = Mutex::new(None);

/// Starts a process. What the command holds, such as the other end of a socket, is closed in this process then.
///
/// # Errors
/// As [`Command::spawn`].
pub(super) fn spawn(command: Command) -> io::Result<Child> {
    let (done, child) = bounded(1);
    let gone = || io::Error::other("the thread that starts processes is gone");
    spawner()?.send(Order { command, done }).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}

fn spawner() -> io::Result<Sender<Order>> {
    let mut spawner = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(orders) = &*spawner {
        return Ok(orders.clone());
    }
    let (sender, orders) = unbounded::<Order>();
    std::thread::Builder::new().name("spawner".into()).spawn(move || {
        for Order { mut command, done } in orders {
            let child = command.spawn();
            drop(command);
            // Who ordered waits; if its thread was killed, the child is nobody's and its socket is closed.
            let _ = done.send(child);
        }
    })?;
    *spawner = Some(sender.clone());
    Ok(sender)
}
