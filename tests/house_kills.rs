//! Streams survive their workers: 200 kills at random moments under 32 streams on 4 simulated devices, with real
//! processes. Nothing is lost, repeated or changed, and the log probabilities are equal to the bit.

mod house_support;

use house_support::*;
use playhouse::client::Event;
use playhouse_actors::HouseEvent;
use playhouse_actors::policy::outcome::WorkerEnd;
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::Notify;

const KILLS: u32 = 200;
const STREAMS: u64 = 32;
/// Requests that streams draw from.
const SEEDS: u64 = 48;

/// Counts tokens of all streams, and wakes who waits for more.
#[derive(Default)]
struct Progress {
    tokens: AtomicU64,
    more: Notify,
    over: AtomicBool,
}

impl Progress {
    async fn wait_for(&self, tokens: u64) {
        loop {
            let more = self.more.notified();
            if self.tokens.load(Ordering::Relaxed) >= tokens {
                return;
            }
            more.await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_kills_change_no_token() {
    let house = open_ready(&format!("{}{}{PATIENT}", basho("basho", 4), devices(4))).await;
    let mut quiet = BTreeMap::new();
    for seed in 0..SEEDS {
        quiet.insert(seed, run(&house, "basho", request(seed)).await);
    }

    let progress = Arc::new(Progress::default());
    let mut ends = house.events();
    let streams: Vec<_> = (0..STREAMS)
        .map(|stream| {
            let (house, progress, quiet) = (house.clone(), progress.clone(), quiet.clone());
            tokio::spawn(async move {
                let model = house.model("basho").expect("configured");
                let mut n = 0;
                while !progress.over.load(Ordering::Relaxed) {
                    let seed = (stream * 7 + n * 5) % SEEDS;
                    let mut tokens = within(model.generate(request(seed))).await.expect("accepted");
                    let (mut text, mut ids, mut logprobs) = (String::new(), Vec::new(), Vec::new());
                    while let Some(event) = within(tokens.next()).await {
                        match event {
                            Event::Token(token) => {
                                assert_eq!(token.index as usize, ids.len(), "no gap and no repeat");
                                text.push_str(&token.text);
                                ids.push(token.id);
                                logprobs.extend(token.logprobs);
                                progress.tokens.fetch_add(1, Ordering::Relaxed);
                                progress.more.notify_waiters();
                            }
                            Event::End(end) => {
                                text.push_str(&end.text);
                                let how = format!("{:?} {} {}", end.outcome, end.prompt_tokens, end.completion_tokens);
                                assert_eq!(
                                    (text.clone(), ids.clone(), logprobs.clone(), how),
                                    quiet[&seed],
                                    "seed {seed}"
                                );
                            }
                        }
                    }
                    n += 1;
                }
                n
            })
        })
        .collect();

    let mut random = Random(20_261_121);
    let mut hits = 0;
    while hits < KILLS {
        let from = progress.tokens.load(Ordering::Relaxed);
        within(progress.wait_for(from + random.below(120))).await;
        let alive = workers(&house).await;
        if alive.is_empty() {
            continue;
        }
        let (replica, pid) = &alive[usize::try_from(random.below(alive.len() as u64)).expect("small")];
        signal(*pid, Signal::KILL);
        // A fault that did not take effect proves nothing: only deaths that were seen count.
        let end = event(&mut ends, |event| match event {
            HouseEvent::WorkerEnded { replica: ended, end, .. } if ended == *replica => Some(end),
            _ => None,
        })
        .await;
        assert_eq!(end, WorkerEnd::Signalled(9));
        hits += 1;
    }
    progress.over.store(true, Ordering::Relaxed);
    let mut finished = 0;
    for stream in streams {
        finished += within(stream).await.expect("no stream lost, repeated or changed a token");
    }
    let requests = within(house.status()).await.expect("running").router.expect("running").requests;
    assert_eq!(requests.accepted, requests.completed, "{requests:?}");
    assert_eq!(requests.completed, finished + SEEDS, "{requests:?}");
    assert!(requests.resumed > 0, "kills hit streams: {requests:?}");
    within(house.stop()).await;
    assert_eq!(Held::now().children, 0, "no worker is left");
}
