//! A house does not grow: 100 times a model is loaded and unloaded, 100 times a worker dies and comes back, and memory,
//! descriptors and threads of the host stay where they were. One test, because it looks at the whole process.

mod house_support;

use house_support::*;
use playhouse_actors::HouseEvent;
use rustix::process::Signal;

const CYCLES: u32 = 100;
/// Cycles until everything that is made once has been made.
const WARM_UP: u32 = 10;
/// What allocators and runtimes may still find to keep.
const RSS_BAND_KIB: u64 = 24 << 10;

fn assert_in_band(what: &str, before: Held, after: Held) {
    assert!(after.rss_kib <= before.rss_kib + RSS_BAND_KIB, "{what}: {before:?} -> {after:?}");
    assert!(after.descriptors <= before.descriptors + 2, "{what}: {before:?} -> {after:?}");
    // The runtime's blocking threads come and go.
    assert!(after.threads <= before.threads + 4, "{what}: {before:?} -> {after:?}");
    assert_eq!(after.children, before.children, "{what}: {before:?} -> {after:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_cycles_leave_nothing_behind() {
    let one = format!("{}{}{PATIENT}", basho("basho", 1), devices(2));
    let two = format!("{}{}{}{PATIENT}", basho("basho", 1), basho("guest", 1), devices(2));
    let house = open_ready(&one).await;
    let expected = run(&house, "basho", request(1)).await;

    let mut before = Held::now();
    for cycle in 0..CYCLES {
        within(house.reload(config(&two), false)).await.expect("the second model is taken in");
        within(house.ready()).await.expect("it loads");
        assert_eq!(run(&house, "guest", request(1)).await, expected, "cycle {cycle}");
        within(house.reload(config(&one), false)).await.expect("the second model is put out");
        assert!(house.model("guest").is_err());
        if cycle + 1 == WARM_UP {
            before = Held::now();
        }
    }
    assert_in_band("load and unload", before, Held::now());

    let mut events = house.events();
    let mut before = Held::now();
    for cycle in 0..CYCLES {
        let (replica, pid) = workers(&house).await.remove(0);
        signal(pid, Signal::KILL);
        event(&mut events, |event| {
            matches!(event, HouseEvent::WorkerReady { replica: it, .. } if it == replica).then_some(())
        })
        .await;
        assert_eq!(run(&house, "basho", request(1)).await, expected, "cycle {cycle}");
        if cycle + 1 == WARM_UP {
            before = Held::now();
        }
    }
    assert_in_band("crash and restart", before, Held::now());
    within(house.stop()).await;
    assert_eq!(Held::now().children, 0);
}
