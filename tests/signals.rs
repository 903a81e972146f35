//! Real signals reach the host. A test binary of its own: signals are for the whole process.

use playhouse::host::signals::{Asked, Signals};
use rustix::process::{Signal, getpid, kill_process};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(20);

async fn after(signals: &mut Signals, raised: Signal) -> Asked {
    kill_process(getpid(), raised).expect("a process may signal itself");
    tokio::time::timeout(DEADLINE, signals.next()).await.expect("it is heard")
}

#[tokio::test]
async fn hangup_reloads_the_first_stop_drains_the_second_is_now() {
    let mut signals = Signals::listen().expect("listening");
    assert_eq!(after(&mut signals, Signal::HUP).await, Asked::Reload);
    assert_eq!(after(&mut signals, Signal::HUP).await, Asked::Reload);
    assert_eq!(after(&mut signals, Signal::TERM).await, Asked::Drain);
    // It is ignored now: what is heard next is the interrupt.
    kill_process(getpid(), Signal::HUP).expect("a process may signal itself");
    assert_eq!(after(&mut signals, Signal::INT).await, Asked::Now);
    assert_eq!(after(&mut signals, Signal::TERM).await, Asked::Now);
}
