//! What clients see of silence, of failures and of deaths, theirs and the workers'.

use crate::http_support::client::{chunks_of, events_of, get, post};
use crate::http_support::{PATIENCE, Setup};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_cancels_its_request() {
    let (setup, gate, counts) = Setup::gated();
    let house = setup.start().await;
    for stream in [true, false] {
        let before = counts.cancelled.load(Ordering::SeqCst);
        let body = json!({"model": "basho", "prompt": "a", "max_tokens": 1000, "stream": stream});
        let call = post(house.address, "/v1/completions", &body);
        if stream {
            gate.give(3);
            let mut response = call.open().await;
            assert!(response.frame().await.is_some());
            drop(response);
        } else {
            // An answer that is not streamed has nothing to show yet: the client hangs up while it waits.
            let waiting = tokio::spawn(call.open());
            house
                .wait("running", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 1))
                .await;
            waiting.abort();
        }
        house.wait("free", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 0)).await;
        let is_cancelled = || counts.cancelled.load(Ordering::SeqCst) == before + 1;
        house.wait("idle", |_| is_cancelled() && counts.running.load(Ordering::SeqCst) == 0).await;
    }
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_filled_with_comments_and_a_death_with_patience() {
    let (mut setup, gate, _) = Setup::gated();
    setup.settings.keep_alive = Duration::from_millis(50);
    let house = setup.start().await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 4, "stream": true});
    gate.give(1);
    let mut response = post(house.address, "/v1/completions", &body).open().await;
    let mut text = String::new();
    let mut killed = false;
    while let Some(frame) = tokio::time::timeout(PATIENCE, response.frame()).await.expect("in time") {
        text.push_str(
            std::str::from_utf8(frame.expect("whole").data_ref().expect("data")).expect("no character is cut"),
        );
        if text.contains(": ping\n\n") && !killed {
            killed = true;
            house.kill_worker();
            gate.give(100);
        }
    }
    let chunks = chunks_of(&events_of(&text));
    let n_texts =
        chunks.iter().filter(|chunk| chunk["choices"][0]["text"].as_str().is_some_and(|t| !t.is_empty())).count();
    assert!(killed && n_texts > 0, "{text}");
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    assert_eq!(house.started.load(Ordering::SeqCst), 2, "a second worker went on");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_their_status_before_the_stream_and_an_event_in_it() {
    let (mut setup, gate, _) = Setup::gated();
    setup.config.host.limits.request_timeout = Duration::from_millis(300);
    let house = setup.start().await;
    let body = |stream: bool| json!({"model": "basho", "prompt": "a", "max_tokens": 100, "stream": stream});
    for stream in [false, true] {
        let late = post(house.address, "/v1/completions", &body(stream)).send().await;
        assert_eq!((late.status, late.error("code")), (504, json!("deadline_exceeded")), "stream: {stream}");
    }
    gate.give(2);
    let events = post(house.address, "/v1/completions", &body(true)).events().await;
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    let error: Value = serde_json::from_str(&events[events.len() - 2]).expect("JSON");
    assert_eq!(error["error"]["code"], "deadline_exceeded");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_at_two_deaths_is_poison() {
    let (setup, ..) = Setup::gated();
    let house = setup.start().await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 10});
    let asked = tokio::spawn(post(house.address, "/v1/completions", &body).send());
    for death in 1..=2 {
        house
            .wait("asked", |status| {
                let replica = &status.devices[0].replicas[0];
                replica.incarnation == death && status.is_ready() && replica.running == 1
            })
            .await;
        house.kill_worker();
    }
    let poisoned = asked.await.expect("no panic");
    assert_eq!((poisoned.status, poisoned.error("code")), (422, json!("poison_request")));
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_loading_and_draining_say_when_to_come_back() {
    let (mut setup, gate, _) = Setup::gated();
    setup.config.host.limits.queued_requests = 1;
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let (inner, opened) = (setup.loader.clone(), std::sync::Mutex::new(opened));
    setup.loader = Arc::new(move |spec| {
        let _ = opened.lock().expect("not poisoned").recv_timeout(PATIENCE);
        inner(spec)
    });
    let house = setup.start_unready().await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 10});
    let loading = post(house.address, "/v1/completions", &body).send().await;
    assert_eq!((loading.status, loading.error("type")), (503, json!("unavailable_error")));
    assert!(loading.header("retry-after").is_some_and(|after| after.parse::<u64>().is_ok_and(|s| s >= 1)));
    assert_eq!(get(house.address, "/health").send().await.status, 503);
    assert_eq!(get(house.address, "/health/live").send().await.status, 200);
    assert_eq!(get(house.address, "/models").send().await.json()["data"][0]["status"]["value"], "loading");
    open.send(()).expect("the loader waits");
    house.wait_ready().await;
    let first = tokio::spawn(post(house.address, "/v1/completions", &body).send());
    house.wait("busy", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 1)).await;
    let busy = post(house.address, "/v1/completions", &body).send().await;
    assert_eq!((busy.status, busy.error("type")), (429, json!("rate_limit_error")));
    assert!(busy.header("retry-after").is_some());
    gate.give(100);
    assert_eq!(first.await.expect("no panic").status, 200);
    house.client.tree().drain(Duration::ZERO).await;
    let draining = post(house.address, "/v1/completions", &body).send().await;
    assert_eq!((draining.status, draining.error("code")), (503, json!("draining")));
    assert_eq!(get(house.address, "/health/ready").send().await.status, 503);
    house.shut_down().await;
}
