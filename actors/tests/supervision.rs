//! One test per row of the failure table in `docs/src/supervision.md`: the real actors on a paused clock, simulated workers
//! that fail where the test says, and what the client sees. `simulation.rs` does the same at random.
//!
//! Every stream is compared, token for token, with what an undisturbed run gives.

#[path = "supervision/stage.rs"]
mod stage;

use playhouse_actors::device_supervisor::DeviceMsg;
use playhouse_actors::inventory::{DeviceId, HealthKind};
use playhouse_actors::messages::{Failure, Phase, ReplicaId, WorkerCommand, WorkerSpec};
use playhouse_actors::policy::ladder::{Rung, RungCounts};
use playhouse_actors::policy::outcome::WorkerEnd;
use playhouse_actors::sim::{SIM_BLOCK_BYTES, Verdict};
use playhouse_actors::{Drained, Generate, HouseEvent, HouseStatus, Refusal, Terminal};
use playhouse_config::{Config, Replicas};
use ractor::ActorRef;
use stage::{DEADLINE, KV_MIN_BLOCKS, Script, Stage, model, one_model, plan, request};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::{Instant, timeout};

fn ended(event: &HouseEvent) -> Option<WorkerEnd> {
    match event {
        HouseEvent::WorkerEnded { end, .. } => Some(end.clone()),
        _ => None,
    }
}

fn quarantined(event: &HouseEvent) -> Option<(DeviceId, String)> {
    match event {
        HouseEvent::Quarantined { device, reason } => Some((device.clone(), reason.clone())),
        _ => None,
    }
}

fn actor_restarted(event: &HouseEvent) -> Option<String> {
    match event {
        HouseEvent::ActorRestarted { actor, .. } => Some(actor.clone()),
        _ => None,
    }
}

// --- memory ------------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn kv_pressure_is_a_pause_for_the_youngest() {
    let mut config = one_model(1);
    config.models[0].kv_budget_bytes = Some(KV_MIN_BLOCKS * SIM_BLOCK_BYTES);
    let stage = Stage::ready(1, config, Script::default()).await;
    // Four sequences of 8 blocks at their end, on 17.
    let mut streams = Vec::new();
    for seed in 1..=4 {
        streams.push(stage.stream("m", seed, 110).await);
    }
    let clients: Vec<_> = streams.into_iter().map(|stream| tokio::spawn(stream.completes())).collect();
    for client in clients {
        client.await.expect("every token arrived");
    }
    let status = stage.seen("told", |status| {
        status.replicas().filter_map(|replica| replica.stats).any(|stats| stats.preemptions > 0)
    });
    let status = status.await;
    assert_eq!(status.replicas().next().expect("one").incarnation, 1, "nothing was restarted");
    let counted = stage.seen("counted", |status| status.devices[0].oom.preempt > 0).await.devices[0].oom;
    assert!(counted.taken().all(|(rung, _)| rung == Rung::Preempt), "{counted:?}");
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn out_of_memory_at_load_restarts_with_less_kv() {
    let load = |spec: &WorkerSpec| if spec.incarnation == 1 { Verdict::OutOfMemory } else { Verdict::Pass };
    let mut stage = Stage::set(1, one_model(1), Script { load, ..Script::default() }).await;
    assert!(matches!(stage.until(ended).await, WorkerEnd::OutOfMemory { .. }));
    stage.all_ready().await;
    let replica = stage.replica("m/0").await;
    assert_eq!((replica.incarnation, replica.kv_bytes), (2, 48 * SIM_BLOCK_BYTES), "three quarters of 64 blocks");
    assert_eq!(stage.status().await.devices[0].oom, RungCounts { shrink_kv: 1, ..RungCounts::default() });
    stage.stream("m", 1, 50).await.completes().await;
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn out_of_memory_in_a_step_restarts_with_less_kv_and_the_stream_goes_on() {
    let step = |spec: &WorkerSpec, n: u32| {
        if spec.incarnation == 1 && n == 5 { Verdict::OutOfMemory } else { Verdict::Pass }
    };
    let mut stage = Stage::ready(1, one_model(1), Script { step, ..Script::default() }).await;
    let stream = stage.stream("m", 1, 50).await;
    assert!(matches!(stage.until(ended).await, WorkerEnd::OutOfMemory { .. }));
    stream.completes().await;
    assert_eq!(stage.replica("m/0").await.kv_bytes, 48 * SIM_BLOCK_BYTES);
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn out_of_memory_with_the_least_kv_quarantines_the_device() {
    let mut config = one_model(1);
    config.models[0].kv_budget_bytes = Some(KV_MIN_BLOCKS * SIM_BLOCK_BYTES);
    let script = Script { load: |_| Verdict::OutOfMemory, ..Script::default() };
    let mut stage = Stage::set(1, config, script).await;
    let (device, reason) = stage.until(quarantined).await;
    assert_eq!((device.as_str(), reason.as_str()), ("SIM-0", "out of memory with the least memory for KV"));
    let refused = stage.house.generate(request("m", 1, 5)).await.expect_err("nobody can serve it");
    assert_eq!(refused, Refusal::Unavailable { model: "m".into() });
    assert_eq!(stage.status().await.devices[0].oom, RungCounts { quarantine: 1, ..RungCounts::default() });
    stage.strike().await;
}

// --- workers -----------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_killed_worker_is_replaced_at_once_and_its_stream_goes_on() {
    let mut stage = Stage::ready(1, one_model(1), Script::default()).await;
    let mut stream = stage.stream("m", 1, 200).await;
    stream.read(20).await;
    stage.workers.alive()[0].kill();
    assert_eq!(stage.until(ended).await, WorkerEnd::Signalled(9));
    let restart = |event: &HouseEvent| match event {
        HouseEvent::RestartScheduled { after, .. } => Some(*after),
        _ => None,
    };
    assert_eq!(stage.until(restart).await, Duration::ZERO, "the first restart is immediate");
    stream.completes().await;
    assert_eq!(stage.replica("m/0").await.incarnation, 2);
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_workers_stream_goes_on_at_another_replica_without_waiting_for_the_restart() {
    // Replica 0 dies and never loads again.
    let load = |spec: &WorkerSpec| {
        if spec.replica.index == 0 && spec.incarnation > 1 { Verdict::Hang } else { Verdict::Pass }
    };
    let step = |spec: &WorkerSpec, n: u32| {
        if spec.replica.index == 0 && n == 10 { Verdict::Exit(134) } else { Verdict::Pass }
    };
    let stage = Stage::ready(2, one_model(2), Script { load, step, ..Script::default() }).await;
    let (first, second) = (stage.stream("m", 1, 100).await, stage.stream("m", 2, 100).await);
    let begun = Instant::now();
    let (first, second) = (tokio::spawn(first.completes()), tokio::spawn(second.completes()));
    first.await.expect("every token arrived");
    second.await.expect("every token arrived");
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}: it waited for the restart", begun.elapsed());
    assert_eq!(stage.replica("m/0").await.phase, Phase::Loading);
    assert_eq!(stage.status().await.router.expect("a router").requests.resumed, 1);
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_workers_memory_is_back_before_the_next_one_starts() {
    let step =
        |spec: &WorkerSpec, n: u32| if spec.incarnation < 3 && n == 3 { Verdict::Signal(11) } else { Verdict::Pass };
    let mut config = one_model(1);
    // The card holds one worker and no second one beside it.
    config.models[0].kv_budget_bytes = Some(300 * SIM_BLOCK_BYTES);
    let mut stage = Stage::ready(1, config, Script { step, ..Script::default() }).await;
    let stream = stage.stream("m", 1, 1).await;
    stream.completes().await;
    for _ in 0..2 {
        stage.workers.alive()[0].kill();
        assert!(matches!(stage.until(ended).await, WorkerEnd::Signalled(_)), "not out of memory");
        stage.all_ready().await;
    }
    assert_eq!(stage.replica("m/0").await.kv_bytes, 300 * SIM_BLOCK_BYTES, "the ladder was not needed");
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_hung_worker_is_killed_and_its_stream_goes_on() {
    let step = |spec: &WorkerSpec, n: u32| if spec.incarnation == 1 && n == 7 { Verdict::Hang } else { Verdict::Pass };
    let mut stage = Stage::ready(1, one_model(1), Script { step, ..Script::default() }).await;
    let begun = Instant::now();
    let stream = stage.stream("m", 1, 100).await;
    assert_eq!(stage.until(ended).await, WorkerEnd::Hung);
    let limit = stage.config.supervision.step_timeout;
    assert!(begun.elapsed() > limit && begun.elapsed() < limit * 2, "{:?}", begun.elapsed());
    stream.completes().await;
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_never_becomes_ready_is_killed_and_replaced() {
    let load = |spec: &WorkerSpec| if spec.incarnation == 1 { Verdict::Hang } else { Verdict::Pass };
    let mut stage = Stage::set(1, one_model(1), Script { load, ..Script::default() }).await;
    assert_eq!(stage.until(ended).await, WorkerEnd::Hung);
    stage.all_ready().await;
    stage.stream("m", 1, 20).await.completes().await;
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_breaks_the_rules_is_killed_and_its_stream_goes_on() {
    let step = |spec: &WorkerSpec, n: u32| {
        if spec.incarnation == 1 && n == 6 { Verdict::BrokenIndex } else { Verdict::Pass }
    };
    let mut stage = Stage::ready(1, one_model(1), Script { step, ..Script::default() }).await;
    let stream = stage.stream("m", 1, 50).await;
    assert!(matches!(stage.until(ended).await, WorkerEnd::Protocol(_)));
    stream.completes().await;
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_device_that_fails_too_often_is_quarantined_and_taken_back_when_released() {
    // The fourth failure within the window is one too many; the fifth worker is well.
    let load = |spec: &WorkerSpec| if spec.incarnation <= 4 { Verdict::Exit(1) } else { Verdict::Pass };
    let mut stage = Stage::set(1, one_model(1), Script { load, ..Script::default() }).await;
    let begun = Instant::now();
    let (_, reason) = stage.until(quarantined).await;
    assert_eq!(reason, "4 failures");
    assert!(begun.elapsed() > Duration::from_millis(2400), "restarts back off: {:?}", begun.elapsed());
    stage.until(|event| matches!(event, HouseEvent::GaveUp { .. }).then_some(())).await;
    assert_eq!(stage.replica("m/0").await.incarnation, 4, "a worker that always fails is started four times");
    assert!(stage.house.restart_device(&DeviceId::gpu("SIM-0")).await);
    stage.all_ready().await;
    stage.stream("m", 1, 20).await.completes().await;
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_model_that_cannot_be_loaded_is_given_up_and_its_device_is_not() {
    let config = Config {
        models: vec![model("good", Replicas::Count(1)), model("bad", Replicas::Count(1))],
        ..Config::default()
    };
    let load = |spec: &WorkerSpec| if spec.replica.model == "bad" { Verdict::Exit(65) } else { Verdict::Pass };
    let mut stage = Stage::set(1, config, Script { load, ..Script::default() }).await;
    stage.until(|event| matches!(event, HouseEvent::ModelFailed { .. }).then_some(())).await;
    stage.seen("ready", |status| status.replicas().any(|replica| replica.phase == Phase::Ready)).await;
    assert_eq!((stage.replica("bad/0").await.incarnation, stage.replica("bad/0").await.phase), (1, Phase::Failed));
    stage.stream("good", 1, 20).await.completes().await;
    let refused = stage.house.generate(request("bad", 1, 5)).await.expect_err("nobody can serve it");
    assert_eq!(refused, Refusal::Unavailable { model: "bad".into() });
    assert!(stage.status().await.devices.iter().all(|device| device.quarantined.is_none()));
    stage.strike().await;
}

// --- devices -----------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_lost_device_is_quarantined_and_its_requests_move() {
    for kind in
        [HealthKind::Xid(79), HealthKind::Xid(95), HealthKind::Xid(119), HealthKind::GpuLost, HealthKind::ResetRequired]
    {
        let mut stage = Stage::ready(2, one_model(2), Script::default()).await;
        let (mut first, mut second) = (stage.stream("m", 1, 100).await, stage.stream("m", 2, 100).await);
        first.read(5).await;
        second.read(5).await;
        stage.sim.report(Some("SIM-0"), kind);
        let (device, _) = stage.until(quarantined).await;
        assert_eq!(device.as_str(), "SIM-0");
        first.completes().await;
        second.completes().await;
        assert_eq!(stage.replica("m/0").await.phase, Phase::Quarantined, "{kind:?}");
        assert_eq!(stage.replica("m/1").await.incarnation, 1, "the other device was not touched");
        stage.strike().await;
    }
}

/// A worker that was told to make room for another is followed by none when its device is given up meanwhile.
#[tokio::test(start_paused = true)]
async fn a_restart_under_way_ends_with_its_device() {
    let step = |_: &WorkerSpec, n: u32| if n == 3 { Verdict::Hang } else { Verdict::Pass };
    let mut stage = Stage::ready(1, one_model(1), Script { step, ..Script::default() }).await;
    // It hangs: only the limit for its shutdown ends it.
    let mut stream = stage.stream("m", 1, 50).await;
    stream.read(1).await;
    assert_eq!(stage.house.restart_model("m").await, 1);
    stage.seen("ending", |status| status.replicas().all(|replica| replica.phase == Phase::Stopping)).await;
    stage.sim.report(Some("SIM-0"), HealthKind::Xid(79));
    stage.until(ended).await;
    let replica = stage.replica("m/0").await;
    assert_eq!((replica.phase, replica.incarnation), (Phase::Quarantined, 1));
    let (_, terminal) = stream.end().await;
    assert_eq!(terminal, Terminal::Failed(Failure::Unavailable));
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn the_last_devices_loss_is_a_typed_end() {
    let mut stage = Stage::ready(1, one_model(1), Script::default()).await;
    let mut stream = stage.stream("m", 1, 100).await;
    stream.read(5).await;
    stage.sim.report(Some("SIM-0"), HealthKind::Xid(79));
    stage.until(|event| matches!(event, HouseEvent::GaveUp { .. }).then_some(())).await;
    let (_, terminal) = stream.end().await;
    assert_eq!(terminal, Terminal::Failed(Failure::Unavailable));
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn an_xid_of_an_application_disturbs_nobody() {
    let mut stage = Stage::ready(1, one_model(1), Script::default()).await;
    let mut stream = stage.stream("m", 1, 100).await;
    stream.read(5).await;
    stage.sim.report(Some("SIM-0"), HealthKind::Xid(31));
    stage.until(|event| matches!(event, HouseEvent::Health { .. }).then_some(())).await;
    stream.completes().await;
    assert_eq!(stage.replica("m/0").await.incarnation, 1, "the worker's own end is what counts");
    stage.strike().await;
}

// --- requests ----------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_request_in_flight_at_two_deaths_is_poison_and_later_ones_are_served() {
    // Every worker dies in its third step until the request is gone: the third worker is well.
    let step = |spec: &WorkerSpec, n: u32| {
        if spec.incarnation <= 2 && n == 3 { Verdict::Signal(11) } else { Verdict::Pass }
    };
    let mut stage = Stage::ready(1, one_model(1), Script { step, ..Script::default() }).await;
    let poison = stage.stream("m", 1, 100).await;
    stage.until(ended).await;
    // This one comes between the deaths: it is in flight at one.
    let innocent = stage.stream("m", 2, 50).await;
    let (_, terminal) = poison.end().await;
    assert_eq!(terminal, Terminal::Failed(Failure::Poison { deaths: 2 }));
    innocent.completes().await;
    stage.stream("m", 3, 50).await.completes().await;
    assert_eq!(stage.replica("m/0").await.incarnation, 3, "it has ended two workers and no more");
    assert_eq!(stage.status().await.router.expect("a router").requests.poisoned, 1);
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_goes_away_frees_its_place() {
    let stage = Stage::ready(1, one_model(1), Script::default()).await;
    let mut stream = stage.stream("m", 1, 200).await;
    stream.read(5).await;
    drop(stream);
    let free = |status: &HouseStatus| {
        let open = status.router.iter().flat_map(|router| &router.services).map(|service| service.open_requests);
        open.sum::<u32>() == 0 && status.replicas().all(|replica| replica.running == 0)
    };
    let begun = Instant::now();
    stage.seen("free", free).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    let kv_free = |status: &HouseStatus| {
        status
            .replicas()
            .all(|replica| replica.stats.is_some_and(|stats| stats.running == 0 && stats.kv_blocks_used == 0))
    };
    stage.seen("told by the engine", kv_free).await;
    assert_eq!(stage.status().await.router.expect("a router").requests.cancelled, 1);
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_ended_and_the_others_go_on() {
    let mut config = one_model(1);
    config.host.limits.stream_events = 4;
    let stage = Stage::ready(1, config, Script::default()).await;
    let slow = stage.stream("m", 1, 200).await;
    stage.stream("m", 2, 200).await.completes().await;
    stage.seen("failed", |status| status.router.as_ref().is_some_and(|router| router.requests.failed == 1)).await;
    let (n_read, terminal) = slow.end().await;
    assert_eq!(terminal, Terminal::Failed(Failure::SlowClient));
    assert!((4..200).contains(&n_read), "{n_read}");
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_request_that_takes_too_long_ends_at_its_deadline() {
    let stage = Stage::ready(
        1,
        one_model(1),
        Script { step: |_, n| if n == 3 { Verdict::Hang } else { Verdict::Pass }, ..Script::default() },
    )
    .await;
    let late = Generate { timeout: Some(Duration::from_secs(5)), ..request("m", 1, 200) };
    let stream = stage.house.generate(late).await.expect("it is accepted");
    let begun = Instant::now();
    let (_, terminal) = timeout(DEADLINE, stream.collect()).await.expect("it ends");
    assert_eq!(terminal, Terminal::Failed(Failure::Deadline));
    assert!(begun.elapsed() < Duration::from_secs(7), "{:?}", begun.elapsed());
    stage.strike().await;
}

// --- the actors themselves ---------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_model_actor_that_fails_is_replaced_and_its_stream_goes_on() {
    // The second request makes the first worker's link panic.
    let send_panics = |spec: &WorkerSpec, command: &WorkerCommand| {
        spec.incarnation == 1 && matches!(command, WorkerCommand::Submit(request) if request.sampling.seed == 2)
    };
    let mut stage = Stage::ready(1, one_model(1), Script { send_panics, ..Script::default() }).await;
    let mut first = stage.stream("m", 1, 150).await;
    first.read(10).await;
    let second = stage.stream("m", 2, 50).await;
    assert_eq!(stage.until(actor_restarted).await, "model m/0");
    first.completes().await;
    second.completes().await;
    stage.strike().await;
}

/// The supervisors of the devices, in the order of the devices.
async fn supervisors(stage: &Stage) -> Vec<ActorRef<DeviceMsg>> {
    let mut found = BTreeMap::new();
    for child in stage.house.actor().get_cell().get_children() {
        if child.is_message_type_of::<DeviceMsg>() == Some(true) {
            let supervisor: ActorRef<DeviceMsg> = child.into();
            let status = ractor::call!(supervisor, DeviceMsg::Status).expect("it answers");
            assert!(found.insert(status.device, supervisor).is_none(), "two supervisors of one device");
        }
    }
    found.into_values().collect()
}

#[tokio::test(start_paused = true)]
async fn a_device_supervisor_that_fails_is_replaced_with_its_workers_and_streams_go_on() {
    let mut stage = Stage::ready(2, one_model(2), Script::default()).await;
    let (mut first, mut second) = (stage.stream("m", 1, 150).await, stage.stream("m", 2, 150).await);
    first.read(10).await;
    second.read(10).await;
    supervisors(&stage).await[0].kill();
    assert!(stage.until(actor_restarted).await.starts_with("Device("));
    first.completes().await;
    second.completes().await;
    stage.all_ready().await;
    stage.strike().await;
}

/// The worker of a supervisor that failed is still being reaped when the next supervisor begins.
#[tokio::test(start_paused = true)]
async fn a_failed_supervisors_worker_is_gone_before_the_next_one_starts() {
    let mut stage = Stage::ready(1, one_model(1), Script::default()).await;
    supervisors(&stage).await[0].kill();
    stage.until(actor_restarted).await;
    let started = |event: &HouseEvent| match event {
        HouseEvent::WorkerStarted { incarnation, .. } => Some(*incarnation),
        _ => None,
    };
    assert_eq!(stage.until(started).await, 2, "counted over all supervisors");
    let alive = stage.workers.alive();
    assert_eq!(alive.iter().map(|worker| worker.spec.incarnation).collect::<Vec<_>>(), [2]);
    stage.strike().await;
}

/// The second fails before the first is back: each is started again, and only once.
#[tokio::test(start_paused = true)]
async fn device_supervisors_that_fail_together_are_all_replaced() {
    let mut stage = Stage::ready(2, one_model(2), Script::default()).await;
    supervisors(&stage).await.iter().for_each(|supervisor| supervisor.kill());
    let restarted = [stage.until(actor_restarted).await, stage.until(actor_restarted).await];
    assert_ne!(restarted[0], restarted[1]);
    let is_back = |status: &HouseStatus| status.replicas().filter(|it| it.phase == Phase::Ready).count() == 2;
    stage.seen("back", is_back).await;
    assert_eq!(supervisors(&stage).await.len(), 2);
    stage.strike().await;
}

/// The change starts the supervisor that waits for its turn; when that comes, nothing is left to do.
#[tokio::test(start_paused = true)]
async fn a_change_while_a_device_supervisor_waits_for_its_restart_starts_one() {
    let mut stage = Stage::ready(1, one_model(1), Script::default()).await;
    for _ in 0..2 {
        // The first restart is immediate, the second is not.
        stage.seen("back", |status| status.replicas().count() == 1).await;
        supervisors(&stage).await[0].kill();
        stage.until(actor_restarted).await;
    }
    let next =
        Config { models: vec![model("m", Replicas::Count(1)), model("n", Replicas::Count(1))], ..Config::default() };
    let next_plan = plan(&next, &stage.cards, Some(&plan(&stage.config, &stage.cards, None)));
    stage.house.apply(next, next_plan).await.expect("the tree lives");
    let longest = stage.config.supervision.backoff.max;
    let changed = stage.status().await.uptime;
    stage.seen("after the back-off", |status| status.uptime > changed + longest).await;
    assert_eq!(supervisors(&stage).await.len(), 1);
    stage.all_ready().await;
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_router_that_fails_is_replaced_and_nothing_in_flight_notices() {
    let mut stage = Stage::ready(1, one_model(1), Script::default()).await;
    let mut stream = stage.stream("m", 1, 150).await;
    stream.read(10).await;
    stage.house.router().current().expect("a router").kill();
    assert_eq!(stage.until(actor_restarted).await, "Router");
    stream.completes().await;
    stage.seen("routing", |status| status.router.as_ref().is_some_and(|router| router.services[0].ready == 1)).await;
    stage.stream("m", 2, 20).await.completes().await;
    assert_eq!(stage.replica("m/0").await.incarnation, 1, "no worker was touched");
    stage.strike().await;
}

/// A question that a router took to its grave was not accepted, and its client is told so.
#[tokio::test(start_paused = true)]
async fn a_lost_reply_port_is_a_refusal_of_its_own() {
    let mut stage = Stage::ready(1, one_model(1), Script::default()).await;
    stage.house.router().current().expect("a router").kill();
    let refused = stage.house.generate(request("m", 1, 5)).await.expect_err("nobody is there to answer");
    assert_eq!(refused, Refusal::RouterLost);
    assert_eq!(stage.until(actor_restarted).await, "Router");
    stage.seen("routing", |status| status.router.as_ref().is_some_and(|router| router.services[0].ready == 1)).await;
    stage.stream("m", 1, 5).await.completes().await;
    stage.strike().await;
}

/// Everybody asks at once: the model takes what it may, the mailbox what it holds, and whoever is over learns which it was.
#[tokio::test(start_paused = true)]
async fn full_queues_are_refusals_of_their_own() {
    const ASKED: usize = 5000;
    const INBOX: usize = 4096;
    let stage = Stage::ready(1, one_model(1), Script::default()).await;
    let ask = |_| {
        let house = stage.house.clone();
        tokio::spawn(async move { house.generate(request("m", 1, 5)).await })
    };
    let asked: Vec<_> = (0..ASKED).map(ask).collect();
    let (mut accepted, mut busy, mut overloaded) = (Vec::new(), 0, 0);
    for answer in asked {
        match answer.await.expect("no panic") {
            Ok(stream) => accepted.push(stream),
            Err(Refusal::Busy { model, full }) => {
                assert_eq!(model, "m");
                assert!(full.retry_after().is_some_and(|after| after > Duration::ZERO), "{full:?}");
                busy += 1;
            }
            Err(Refusal::Overloaded) => overloaded += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    let may_take = usize::try_from(stage.config.host.limits.queued_requests).expect("small");
    assert_eq!((accepted.len(), busy, overloaded), (may_take, INBOX - may_take, ASKED - INBOX));
    drop(accepted);
    stage.seen("idle", |status| status.router.as_ref().is_some_and(|it| it.services[0].open_requests == 0)).await;
    stage.stream("m", 1, 5).await.completes().await;
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_root_that_fails_takes_every_worker_with_it() {
    let stage = Stage::ready(2, one_model(2), Script::default()).await;
    let mut stream = stage.stream("m", 1, 200).await;
    stream.read(5).await;
    stage.house.actor().kill();
    let (_, terminal) = stream.end().await;
    assert!(matches!(terminal, Terminal::Failed(Failure::Lost | Failure::Draining)), "{terminal:?}");
    let mut looks = tokio::time::interval(Duration::from_millis(50));
    let begun = Instant::now();
    while !stage.workers.alive().is_empty() {
        looks.tick().await;
        assert!(begun.elapsed() < Duration::from_secs(1), "workers outlive the host: {:?}", stage.workers.alive());
    }
    assert!(stage.sim.ledger().is_empty(), "their memory is free");
    assert_eq!(stage.house.status().await, None);
}

// --- the operator ------------------------------------------------------------------------------------------------------

#[tokio::test(start_paused = true)]
async fn a_reload_leaves_what_is_unchanged_alone() {
    let config = Config {
        models: vec![
            model("stays", Replicas::Count(1)),
            model("changes", Replicas::Count(1)),
            model("goes", Replicas::Count(1)),
        ],
        ..Config::default()
    };
    let mut stage = Stage::ready(1, config, Script::default()).await;
    let (mut stays, mut changes) = (stage.stream("stays", 1, 200).await, stage.stream("changes", 2, 200).await);
    stays.read(10).await;
    changes.read(10).await;
    let mut next = stage.config.clone();
    next.models.truncate(2);
    next.models[1].max_sequences = 3;
    next.models.push(model("comes", Replicas::Count(1)));
    let next_plan = plan(&next, &stage.cards, Some(&plan(&stage.config, &stage.cards, None)));
    let applied = stage.house.apply(next, next_plan).await.expect("the tree lives");
    let names = |list: &[ReplicaId]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(names(&applied.kept), ["stays/0"]);
    assert_eq!(names(&applied.stopped), ["changes/0", "goes/0"]);
    assert_eq!(names(&applied.started), ["changes/0", "comes/0"]);
    stays.completes().await;
    changes.completes().await;
    stage.all_ready().await;
    assert_eq!(stage.replica("stays/0").await.incarnation, 1, "its worker is the same");
    let refused = stage.house.generate(request("goes", 1, 5)).await.expect_err("it is gone");
    assert_eq!(refused, Refusal::UnknownModel { model: "goes".into() });
    stage.stream("comes", 3, 20).await.completes().await;
    stage.strike().await;
}

/// One that goes on with less memory for KV than was planned is as untouched as any other, and a dry run says so.
#[tokio::test(start_paused = true)]
async fn a_reload_leaves_a_replica_alone_that_was_given_less_memory() {
    let load = |spec: &WorkerSpec| match spec.kv_bytes > 48 * SIM_BLOCK_BYTES {
        true => Verdict::OutOfMemory,
        false => Verdict::Pass,
    };
    let mut stage = Stage::ready(1, one_model(1), Script { load, ..Script::default() }).await;
    let given = stage.replica("m/0").await.kv_bytes;
    let mut running = plan(&stage.config, &stage.cards, None);
    let planned = std::mem::replace(&mut running.devices[0].placements[0].kv_bytes, given);
    assert!(given < planned);
    let next_plan = plan(&stage.config, &stage.cards, Some(&running));
    let would = stage.house.preview(stage.config.clone(), next_plan.clone()).await.expect("the tree lives");
    let applied = stage.house.apply(stage.config.clone(), next_plan).await.expect("the tree lives");
    assert_eq!((applied.kept.len(), applied.stopped.len()), (1, 0));
    assert_eq!(would, applied);
    // A supervisor that is started again knows, too.
    supervisors(&stage).await[0].kill();
    stage.until(actor_restarted).await;
    stage.seen("back", |status| status.replicas().any(|replica| replica.phase == Phase::Ready)).await;
    let oom = stage.status().await.devices[0].oom;
    assert_eq!(oom, RungCounts { shrink_kv: 1, ..RungCounts::default() }, "found out once");
    stage.strike().await;
}

const EMPTY: Drained = Drained::Empty { ended: 0 };

#[tokio::test(start_paused = true)]
async fn a_drain_that_is_taken_back_ends_nothing_and_takes_requests_again() {
    let stage = Stage::ready(1, one_model(1), Script::default()).await;
    let mut stream = stage.stream("m", 1, 200).await;
    stream.read(5).await;
    let drain = tokio::spawn({
        let house = stage.house.clone();
        async move { house.drain(Duration::from_secs(1)).await }
    });
    stage.seen("draining", |status| status.router.as_ref().is_some_and(|router| router.draining)).await;
    assert!(stage.house.undrain().await, "there was a drain");
    assert_eq!(timeout(DEADLINE, drain).await.expect("in time").expect("no panic"), Drained::Undone);
    let status = stage.status().await;
    assert!(status.is_ready() && !status.router.expect("a router").draining);
    // Longer than the drain had: nobody ends what it would have ended.
    stream.completes().await;
    stage.stream("m", 2, 50).await.completes().await;
    assert!(!stage.house.undrain().await, "there is none any more");
    assert_eq!(stage.house.drain(Duration::from_secs(30)).await, EMPTY);
    assert!(stage.house.undrain().await, "one that is over can be taken back, too");
    stage.stream("m", 3, 50).await.completes().await;
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_outlives_the_router() {
    let mut stage = Stage::ready(1, one_model(1), Script::default()).await;
    let mut stream = stage.stream("m", 1, 150).await;
    stream.read(5).await;
    let drain = tokio::spawn({
        let house = stage.house.clone();
        async move { house.drain(Duration::from_secs(600)).await }
    });
    let is_draining = |status: &HouseStatus| status.router.as_ref().is_some_and(|router| router.draining);
    stage.seen("draining", is_draining).await;
    stage.house.router().current().expect("a router").kill();
    assert_eq!(stage.until(actor_restarted).await, "Router");
    stage.seen("draining again", is_draining).await;
    assert_eq!(stage.house.generate(request("m", 2, 5)).await.expect_err("no more"), Refusal::Draining);
    assert!(!drain.is_finished(), "a stream is open");
    stream.completes().await;
    assert_eq!(timeout(DEADLINE, drain).await.expect("in time").expect("no panic"), EMPTY);
    assert!(stage.house.undrain().await);
    stage.stream("m", 3, 20).await.completes().await;
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_a_load() {
    // Its load never ends; a worker that loads hears no command.
    let stage = Stage::set(1, one_model(1), Script { load: |_| Verdict::Hang, ..Script::default() }).await;
    stage.seen("loading", |status| status.replicas().all(|replica| replica.phase == Phase::Loading)).await;
    let begun = Instant::now();
    stage.strike().await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_restart_does_not_wait_for_a_load() {
    let load = |spec: &WorkerSpec| if spec.incarnation == 1 { Verdict::Hang } else { Verdict::Pass };
    let mut stage = Stage::set(1, one_model(1), Script { load, ..Script::default() }).await;
    stage.seen("loading", |status| status.replicas().all(|replica| replica.phase == Phase::Loading)).await;
    let begun = Instant::now();
    assert_eq!(stage.house.restart_model("m").await, 1);
    assert_eq!(stage.until(ended).await, WorkerEnd::Asked, "no failure");
    stage.all_ready().await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    stage.strike().await;
}

/// The change has taken a worker out that ends slowly when the house is told to stop: nothing is started any more, and the
/// stop waits for the last worker.
#[tokio::test(start_paused = true)]
async fn a_stop_in_the_middle_of_a_change_leaves_no_worker() {
    let config = Config { models: vec![model("goes", Replicas::Count(1))], ..Config::default() };
    let step = |_: &WorkerSpec, n: u32| if n == 3 { Verdict::Hang } else { Verdict::Pass };
    let stage = Stage::ready(1, config, Script { step, ..Script::default() }).await;
    // It hangs: only the limit for its shutdown ends it.
    let mut stream = stage.stream("goes", 1, 50).await;
    stream.read(1).await;
    let next = Config { models: vec![model("comes", Replicas::Count(1))], ..Config::default() };
    let next_plan = plan(&next, &stage.cards, None);
    let change = tokio::spawn({
        let house = stage.house.clone();
        async move { house.apply(next, next_plan).await }
    });
    stage.seen("changing", |status| status.replicas().count() == 0).await;
    let mut events = stage.house.listen();
    stage.strike().await;
    change.await.expect("no panic");
    while let Ok(event) = events.try_recv() {
        assert!(!matches!(event, HouseEvent::WorkerStarted { .. }), "{event:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_lets_streams_finish_and_refuses_new_ones() {
    let stage = Stage::ready(1, one_model(1), Script::default()).await;
    let mut stream = stage.stream("m", 1, 200).await;
    stream.read(5).await;
    let drain = tokio::spawn({
        let house = stage.house.clone();
        async move { house.drain(Duration::from_secs(30)).await }
    });
    stage.seen("draining", |status| status.router.as_ref().is_some_and(|router| router.draining)).await;
    assert_eq!(stage.house.generate(request("m", 2, 5)).await.expect_err("no more"), Refusal::Draining);
    stream.completes().await;
    assert_eq!(timeout(DEADLINE, drain).await.expect("in time").expect("no panic"), EMPTY, "nothing had to be ended");
    stage.strike().await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_ends_what_is_open_at_its_deadline_and_a_second_one_is_immediate() {
    // A worker that hangs keeps its stream open.
    let step = |_: &WorkerSpec, n: u32| if n == 8 { Verdict::Hang } else { Verdict::Pass };
    let stage = Stage::ready(1, one_model(1), Script { step, ..Script::default() }).await;
    let stream = stage.stream("m", 1, 200).await;
    let begun = Instant::now();
    let patient = tokio::spawn({
        let house = stage.house.clone();
        async move { house.drain(Duration::from_secs(3000)).await }
    });
    stage.seen("draining", |status| status.router.as_ref().is_some_and(|router| router.draining)).await;
    assert_eq!(stage.house.drain(Duration::ZERO).await, Drained::Empty { ended: 1 }, "one stream was ended");
    assert_eq!(patient.await.expect("no panic"), Drained::Empty { ended: 1 }, "for the first, too");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let (_, terminal) = stream.end().await;
    assert_eq!(terminal, Terminal::Failed(Failure::Draining));
    stage.strike().await;
}
