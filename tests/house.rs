//! What happens when: each fault with a real worker process, seen from a client of the house.

mod house_support;

use house_support::*;
use playhouse::client::{Event, GenerateRequest, Outcome, Prompt, RequestError};
use playhouse::host::{NotReady, Parts, Playhouse, ReloadError};
use playhouse::worker::Workers;
use playhouse_actors::messages::{Failure, Phase, Refusal, StreamEvent};
use playhouse_actors::policy::ladder::{Rung, RungCounts};
use playhouse_actors::policy::outcome::WorkerEnd;
use playhouse_actors::{Generate, HouseEvent};
use rustix::process::Signal;
use std::sync::Arc;

/// A house whose workers have faults on command.
async fn open_faulty(text: &str, faults: &str) -> Playhouse {
    let workers = Workers::new(Some(env!("CARGO_BIN_EXE_playhouse").into())).env("PLAYHOUSE_FAULTS", faults);
    let parts = Parts { factory: Some(Arc::new(workers)), ..Parts::default() };
    Playhouse::open_with(config(text), parts).await.expect("the house opens")
}

fn one() -> String {
    format!("{}{}{PATIENT}", basho("basho", 1), devices(1))
}

/// What a request gives while nothing happens.
async fn undisturbed(request: GenerateRequest) -> Exact {
    let house = open_ready(&one()).await;
    let expected = run(&house, "basho", request).await;
    within(house.stop()).await;
    expected
}

/// How the next worker ends.
async fn next_end(events: &mut tokio::sync::broadcast::Receiver<HouseEvent>) -> WorkerEnd {
    event(events, |event| match event {
        HouseEvent::WorkerEnded { end, .. } => Some(end),
        _ => None,
    })
    .await
}

/// Runs a request and does something to the worker after its third token.
async fn run_and(house: &Playhouse, request: GenerateRequest, hit: impl FnOnce(u32)) -> Exact {
    let pid = workers(house).await[0].1;
    let model = house.model("basho").expect("configured");
    let mut stream = within(model.generate(request)).await.expect("accepted");
    let (mut hit, mut text, mut tokens) = (Some(hit), String::new(), Vec::new());
    while let Some(event) = within(stream.next()).await {
        match event {
            Event::Token(token) => {
                text.push_str(&token.text);
                tokens.push(token);
            }
            Event::End(end) => {
                text.push_str(&end.text);
                return exact(&playhouse::client::Collected { text, tokens, end });
            }
        }
        if tokens.len() == 3
            && let Some(hit) = hit.take()
        {
            hit(pid);
        }
    }
    panic!("a stream ends with an end");
}

#[tokio::test]
async fn a_killed_worker_comes_back_under_its_stream() {
    let expected = undisturbed(request(5)).await;
    let house = open_ready(&one()).await;
    let mut events = house.events();
    let found = run_and(&house, request(5), |pid| signal(pid, Signal::KILL)).await;
    assert_eq!(found, expected);
    assert_eq!(next_end(&mut events).await, WorkerEnd::Signalled(9));
    within(house.stop()).await;
}

#[tokio::test]
async fn a_stopped_worker_is_a_hang_and_is_replaced() {
    let expected = undisturbed(request(6)).await;
    let text = one().replace("heartbeat = \"100ms\"", "heartbeat = \"100ms\"\nstep_timeout = \"1s\"");
    let house = open_ready(&text).await;
    let mut events = house.events();
    let found = run_and(&house, request(6), |pid| {
        signal(pid, Signal::STOP);
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(state.is_empty() || !state.contains(") Z"), "the worker was alive when it was stopped: {state}");
    })
    .await;
    assert_eq!(found, expected);
    assert_eq!(next_end(&mut events).await, WorkerEnd::Hung);
    within(house.stop()).await;
}

#[tokio::test]
async fn a_worker_that_exits_or_panics_or_loses_its_device_is_replaced() {
    let expected = undisturbed(request(7)).await;
    for (fault, is_expected) in [
        ("exit-at-step=4:3#1", (|end| matches!(end, WorkerEnd::Exited(3))) as fn(&WorkerEnd) -> bool),
        ("panic-at-step=4#1", |end| matches!(end, WorkerEnd::Exited(_) | WorkerEnd::Signalled(_))),
        ("device-lost-at-step=4#1", |end| matches!(end, WorkerEnd::DeviceLost(_))),
    ] {
        let house = open_faulty(&one(), fault).await;
        let mut events = house.events();
        within(house.ready()).await.expect("the first worker loads");
        assert_eq!(run(&house, "basho", request(7)).await, expected, "{fault}");
        let end = next_end(&mut events).await;
        assert!(is_expected(&end), "{fault}: {end}");
        within(house.stop()).await;
    }
}

#[tokio::test]
async fn out_of_memory_in_a_step_restarts_nothing() {
    let expected = undisturbed(request(8)).await;
    let house = open_faulty(&one(), "oom-at-step=4").await;
    within(house.ready()).await.expect("it loads");
    assert_eq!(run(&house, "basho", request(8)).await, expected);
    let status = within(house.status()).await.expect("running");
    assert_eq!(status.replicas().next().expect("one replica").incarnation, 1);
    // Told with the next heartbeat, which may have been before this.
    within(async {
        while house.tree().log().recent().iter().all(|stamped| !is_rung(&stamped.event, Rung::DropPrefixCache)) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let status = within(house.status()).await.expect("running");
    assert_eq!(status.devices[0].oom, RungCounts { drop_prefix_cache: 1, ..RungCounts::default() });
    within(house.stop()).await;
}

fn is_rung(event: &HouseEvent, wanted: Rung) -> bool {
    matches!(event, HouseEvent::OutOfMemory { rung, .. } if *rung == wanted)
}

#[tokio::test]
async fn out_of_memory_in_steps_is_counted_by_what_was_given_up() {
    let house = open_faulty(&one(), "oom-from-step=6#1").await;
    within(house.ready()).await.expect("it loads");
    let model = house.model("basho").expect("configured");
    let mut streams = Vec::new();
    for seed in 0..3 {
        streams.push(
            within(model.generate(GenerateRequest { ignore_eos: true, ..request(seed) })).await.expect("accepted"),
        );
    }
    let mut n_refused = 0;
    for stream in streams {
        let choices = within(stream.collect()).await.expect("it ends");
        n_refused += u64::from(matches!(choices[0].end.outcome, Outcome::Failed(Failure::Request(_))));
    }
    let status = within(house.status()).await.expect("running");
    let expected = RungCounts { drop_prefix_cache: 1, refuse: n_refused, shrink_kv: 1, ..RungCounts::default() };
    assert_eq!(status.devices[0].oom, expected, "the worker's own rungs, and then the supervisor's");
    within(house.stop()).await;
}

#[tokio::test]
async fn out_of_memory_at_load_goes_down_the_ladder_and_comes_back() {
    let house = open_faulty(&one(), "oom-at-load#1;oom-at-load#2").await;
    let mut events = house.events();
    within(house.ready()).await.expect("the third worker finds memory");
    let end = next_end(&mut events).await;
    assert!(matches!(end, WorkerEnd::OutOfMemory { .. }), "{end}");
    let status = within(house.status()).await.expect("running");
    assert_eq!(status.replicas().next().expect("one replica").incarnation, 3);
    within(house.stop()).await;
}

#[tokio::test]
async fn a_worker_that_never_gets_ready_is_given_up() {
    let limits = "[supervision]\nmax_restarts = 2\nload_timeout = \"1s\"\nbackoff = { min = \"1ms\", max = \"2ms\" }\n";
    let house = open_faulty(&format!("{}{}{limits}", basho("basho", 1), devices(1)), "never-ready").await;
    let mut events = house.events();
    let not_ready = within(house.ready()).await.expect_err("no worker gets ready");
    assert!(matches!(&not_ready, NotReady::Model { model, .. } if model == "basho"), "{not_ready}");
    event(&mut events, |event| matches!(event, HouseEvent::GaveUp { .. }).then_some(())).await;
    let status = within(house.status()).await.expect("the tree is there to ask");
    assert_eq!(status.replicas().next().expect("one replica").phase, Phase::Quarantined);
    let model = house.model("basho").expect("configured");
    let refused = within(model.generate(request(1))).await.expect_err("nobody can serve it");
    assert!(matches!(refused, RequestError::Refused(Refusal::Unavailable { .. })), "{refused}");
    within(house.stop()).await;
}

#[tokio::test]
async fn a_request_in_flight_at_two_deaths_is_poison_and_others_go_on() {
    let poison = "[supervision]\nmax_restarts = 1000\npoison_deaths = 2\nbackoff = { min = \"1ms\", max = \"2ms\" }\n";
    let house =
        open_faulty(&format!("{}{}{poison}", basho("basho", 1), devices(1)), "exit-at-step=3:1#1;exit-at-step=3:1#2")
            .await;
    within(house.ready()).await.expect("it loads");
    let model = house.model("basho").expect("configured");
    let ended = within(within(model.generate(request(1))).await.expect("accepted").collect()).await.expect("it ends");
    assert_eq!(ended[0].end.outcome, Outcome::Failed(Failure::Poison { deaths: 2 }));
    let expected = undisturbed(request(2)).await;
    assert_eq!(run(&house, "basho", request(2)).await, expected);
    within(house.stop()).await;
}

#[tokio::test]
async fn a_bad_configuration_changes_nothing_and_a_good_one_as_little_as_it_can() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("house.toml");
    let text = format!("{}{}{}{PATIENT}", basho("basho", 1), basho("other", 1), devices(2));
    std::fs::write(&path, &text).expect("written");
    let read = playhouse_config::Config::open(Some(&path), &playhouse_config::Overrides::none()).expect("it is right");
    let parts = Parts { worker_exe: Some(env!("CARGO_BIN_EXE_playhouse").into()), ..Parts::default() };
    let house = Playhouse::open_with(read, parts).await.expect("it opens");
    within(house.ready()).await.expect("it loads");
    let before = workers(&house).await;
    let expected = run(&house, "basho", request(3)).await;

    std::fs::write(&path, text.replace("replicas = 1", "replica = 1")).expect("written");
    let error = within(house.reload_file(false)).await.expect_err("a key is misspelt");
    assert!(matches!(&error, ReloadError::Config(_)), "{error}");
    let words = error.to_string();
    assert!(words.contains("house.toml:4:1") && words.contains("did you mean `replicas`"), "{words}");
    std::fs::write(
        &path,
        text.replace(
            "embedded:basho\"\nreplicas = 1\nisolation = \"process\"\n[[model]]\nname = \"other\"",
            "/nowhere.gguf\"\nreplicas = 1\n[[model]]\nname = \"other\"",
        ),
    )
    .expect("written");
    let error = within(house.reload_file(false)).await.expect_err("a file is missing");
    assert!(matches!(&error, ReloadError::Plan(_)), "{error}");
    assert_eq!(workers(&house).await, before, "nothing changed");

    // A stream of `basho` runs while `other` is changed; its worker is the same before and after.
    let model = house.model("basho").expect("configured");
    let mut stream = within(model.generate(request(3))).await.expect("accepted");
    let first = within(stream.next()).await.expect("a token");
    std::fs::write(&path, text.replace("name = \"other\"", "name = \"third\"")).expect("written");
    let dry = within(house.reload_file(true)).await.expect("it is right");
    assert_eq!((dry.applied.kept.len(), dry.applied.started.len(), dry.applied.stopped.len()), (1, 1, 1), "{dry:?}");
    assert_eq!(workers(&house).await, before, "a dry run changes nothing");
    let done = within(house.reload_file(false)).await.expect("it is right");
    assert_eq!(done.applied, dry.applied);
    within(house.ready()).await.expect("the new model loads");
    assert!(house.model("other").is_err() && house.model("third").is_ok());
    assert!(workers(&house).await.contains(&before[0]), "the worker of what did not change is the same");
    let (mut text, mut tokens) = (String::new(), Vec::new());
    let mut next = Some(first);
    while let Some(event) = next {
        match event {
            Event::Token(token) => {
                text.push_str(&token.text);
                tokens.push(token);
            }
            Event::End(end) => {
                text.push_str(&end.text);
                assert_eq!(
                    exact(&playhouse::client::Collected { text: text.clone(), tokens: tokens.clone(), end }),
                    expected
                );
            }
        }
        next = within(stream.next()).await;
    }
    within(house.stop()).await;
}

#[tokio::test]
async fn a_dropped_stream_gives_its_memory_back() {
    let house = open_faulty(&one(), "slow-step=5").await;
    within(house.ready()).await.expect("it loads");
    let model = house.model("basho").expect("configured");
    let endless = GenerateRequest { ignore_eos: true, ..request(1) }.max_tokens(100_000);
    let mut stream = within(model.generate(endless)).await.expect("accepted");
    within(stream.next()).await.expect("a token");
    drop(stream);
    let idle = async {
        loop {
            let status = house.status().await.expect("running");
            let replica = status.replicas().next().expect("one replica").clone();
            let requests = status.router.expect("running").requests;
            if let Some(stats) = replica.stats
                && requests.cancelled == 1
                && stats.steps > 0
                && stats.running == 0
                && stats.kv_blocks_used == stats.kv_blocks_cached
            {
                break;
            }
            tokio::task::yield_now().await;
        }
    };
    within(idle).await;
    within(house.stop()).await;
}

#[tokio::test]
async fn a_thread_says_the_same_as_a_process() {
    let expected = undisturbed(request(9)).await;
    let text = format!("{}{PATIENT}", basho("basho", 1).replace("\"process\"", "\"thread\"\ndevices = \"cpu\""));
    let house = open_ready(&text).await;
    assert_eq!(run(&house, "basho", request(9)).await, expected);
    assert!(workers(&house).await.is_empty(), "a thread has no process of its own");
    within(house.stop()).await;
}

#[tokio::test]
async fn embeddings_and_constraints_reach_the_worker() {
    let house = open_ready(&one()).await;
    let model = house.model("basho").expect("configured");
    let moon = within(model.embed(Prompt::Text("autumn moon".into()))).await.expect("it has one");
    assert_eq!(moon.values.len(), model.card().spec.hidden_dim);
    let length: f64 = moon.values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    assert!((length - 1.0).abs() < 1e-5, "{length}");
    assert_eq!(within(model.embed(Prompt::Text("autumn moon".into()))).await.expect("again"), moon);
    assert_ne!(within(model.embed(Prompt::Text("spring rain".into()))).await.expect("another"), moon);

    let constraint = playhouse_actors::engine::Constraint::Regex("(rain|snow) (falls|stops)".into());
    let held = request(4).constraint(constraint);
    let held = GenerateRequest { stop: Vec::new(), ..held };
    let (text, _, _, how) = run(&house, "basho", held).await;
    assert!(["rain falls", "rain stops", "snow falls", "snow stops"].contains(&text.trim_start()), "{text} {how}");
    let bad = request(4).constraint(playhouse_actors::engine::Constraint::JsonSchema("{".into()));
    assert!(matches!(within(model.generate(bad)).await, Err(RequestError::Constraint(_))));
    within(house.stop()).await;
}

#[tokio::test]
async fn raw_messages_work_on_a_model_actor() {
    let house = open_ready(&one()).await;
    let (replica, actor) = within(house.tree().replicas("basho")).await.remove(0);
    assert_eq!(replica.to_string(), "basho/0");
    let model = house.model("basho").expect("configured");
    let prompt =
        within(model.tokenize("winter river\n".into(), playhouse::text::EncodeOptions::PROMPT)).await.expect("text");
    let generate = Generate {
        model: "basho".into(),
        task: playhouse_actors::engine::Task::Generate,
        prompt,
        sampling: playhouse_actors::engine::SamplingParams::greedy(),
        max_tokens: 5,
        min_tokens: 0,
        stop_ids: Vec::new(),
        logprobs: None,
        constraint: None,
        priority: 0,
        timeout: None,
    };
    let asked = ractor::call!(actor, playhouse_actors::model::ModelMsg::Generate, generate).expect("the actor answers");
    let mut stream = asked.expect("the request is accepted");
    let mut n_tokens = 0;
    while let Some(event) = within(stream.next()).await {
        n_tokens += u32::from(matches!(event, StreamEvent::Token(_)));
    }
    assert_eq!(n_tokens, 5);
    within(house.stop()).await;
}
