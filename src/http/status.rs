//! `/api/status` and `/api/events`: what the dashboard shows.

use super::App;
use super::manage;
use super::sse;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use bytes::Bytes;
use hyper::body::Frame;
use playhouse_actors::HouseStatus;
use playhouse_actors::inventory::Device;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

/// How often the dashboard gets a new picture.
const PICTURE_EVERY: Duration = Duration::from_secs(1);
/// Pieces that a slow dashboard may be behind.
const PIECES_MAX: usize = 8;

/// Memory of a device by who has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct DeviceMemory {
    pub(super) device: String,
    pub(super) weights: u64,
    pub(super) kv: u64,
    pub(super) scratch: u64,
    /// What our processes have beyond that: contexts, kernels, the allocator's own.
    pub(super) context: u64,
    /// What other processes have.
    pub(super) foreign: u64,
    /// In use, and nobody's.
    pub(super) unaccounted: u64,
    pub(super) total: Option<u64>,
}

impl DeviceMemory {
    pub(super) fn kinds(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
        [
            ("weights", self.weights),
            ("kv", self.kv),
            ("scratch", self.scratch),
            ("context", self.context),
            ("foreign", self.foreign),
        ]
        .into_iter()
    }
}

/// Who has how much of each device's memory.
pub(super) fn memory_kinds(status: &HouseStatus, devices: &[Device]) -> Vec<DeviceMemory> {
    status
        .devices
        .iter()
        .map(|ours| {
            let mut memory = DeviceMemory { device: ours.device.to_string(), ..DeviceMemory::default() };
            for stats in ours.replicas.iter().filter_map(|replica| replica.stats) {
                memory.weights += stats.weight_bytes;
                memory.kv += stats.kv_bytes;
                memory.scratch += stats.scratch_bytes;
            }
            let Some(card) = devices.iter().find(|card| card.uuid == ours.device.as_str()) else { return memory };
            memory.total = Some(card.total_bytes);
            let pids: BTreeSet<u32> = ours.replicas.iter().filter_map(|replica| replica.pid).collect();
            let told = memory.weights + memory.kv + memory.scratch;
            let mut held = 0;
            for process in &card.processes {
                let bytes = process.used_bytes.unwrap_or(0);
                if pids.contains(&process.pid) { held += bytes } else { memory.foreign += bytes }
            }
            memory.context = held.saturating_sub(told);
            memory.unaccounted = card.used_bytes.saturating_sub(told + memory.context + memory.foreign);
            memory
        })
        .collect()
}

/// `GET /api/status`: one picture of everything.
pub(super) async fn status(State(app): State<App>) -> Json<Value> {
    Json(picture(&app).await)
}

async fn picture(app: &App) -> Value {
    let (house, devices) = tokio::join!(app.client.tree().status(), app.control.devices());
    let memory = house.as_ref().map(|house| memory_kinds(house, &devices)).unwrap_or_default();
    let models = app.control.models().into_iter().map(|model| {
        let (state, reason) = manage::state(house.as_ref(), &model.name, model.wanted);
        let has_chat = app.client.catalog().get(&model.name).is_some_and(|card| card.template.is_some());
        json!({ "name": model.name, "aliases": model.aliases, "state": state, "reason": reason, "chat": has_chat })
    });
    json!({
        "models": models.collect::<Vec<_>>(),
        "house": house,
        "devices": devices,
        "memory": memory,
        "build": app.build,
        "config": app.control.config(),
    })
}

/// `GET /api/events`: what happened last, then a picture every second and news as it comes, until the client goes or the
/// front stops.
pub(super) async fn events(State(app): State<App>) -> Response {
    let (pieces, receiver) = mpsc::channel(PIECES_MAX);
    let stop = app.stopping.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = tell(app, pieces) => {}
        }
    });
    sse::headed(Body::new(Pieces(receiver)))
}

/// Ends when the client is gone.
async fn tell(app: App, pieces: mpsc::Sender<Bytes>) {
    let log = app.control.events();
    let mut news = log.listen();
    let recent = log.recent();
    let mut next = recent.last().map_or(0, |last| last.number + 1);
    if pieces.send(named("log", &json!(recent))).await.is_err() {
        return;
    }
    let mut pictures = tokio::time::interval(PICTURE_EVERY);
    pictures.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        let piece = tokio::select! {
            () = pieces.closed() => return,
            _ = pictures.tick() => named("status", &picture(&app).await),
            event = news.recv() => match event {
                // Told already, as one of the recent ones.
                Ok(event) if event.number < next => continue,
                Ok(event) => {
                    next = event.number + 1;
                    named("event", &json!(event))
                }
                Err(RecvError::Lagged(_)) => named("log", &json!(log.recent())),
                Err(RecvError::Closed) => return,
            },
        };
        if pieces.send(piece).await.is_err() {
            return;
        }
    }
}

fn named(name: &str, value: &Value) -> Bytes {
    let mut out = format!("event: {name}\n").into_bytes();
    sse::data(&mut out, value);
    out.into()
}

/// A body of pieces from a channel.
struct Pieces(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|piece| Some(Ok(Frame::data(piece?))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use playhouse_actors::engine::EngineStats;
    use playhouse_actors::inventory::{DeviceId, DeviceProcess};
    use playhouse_actors::messages::{DeviceStatus, Phase, ReplicaId, ReplicaStatus};

    #[test]
    fn every_byte_in_use_is_somebodys_or_unaccounted() {
        let stats = EngineStats { weight_bytes: 100, kv_bytes: 50, scratch_bytes: 10, ..EngineStats::default() };
        let replica = ReplicaStatus {
            replica: ReplicaId { model: "m".into(), index: 0 },
            device: DeviceId::gpu("GPU-a"),
            phase: Phase::Ready,
            incarnation: 1,
            pid: Some(7),
            progress: None,
            running: 0,
            kv_bytes: 50,
            last_heard: None,
            step_age: None,
            stats: Some(stats),
            last_end: None,
        };
        let device = DeviceStatus {
            device: DeviceId::gpu("GPU-a"),
            quarantined: None,
            recent_failures: 0,
            failures: 0,
            oom: Default::default(),
            replicas: vec![replica],
        };
        let house = HouseStatus { devices: vec![device], router: None, uptime: Duration::ZERO };
        let process = |pid, bytes| DeviceProcess { pid, used_bytes: Some(bytes) };
        let card = Device {
            uuid: "GPU-a".into(),
            total_bytes: 1000,
            used_bytes: 300,
            processes: vec![process(7, 180), process(8, 90)],
            ..Device::default()
        };
        let memory = &memory_kinds(&house, &[card])[0];
        assert_eq!((memory.context, memory.foreign, memory.unaccounted), (20, 90, 30));
        assert_eq!(memory.kinds().map(|(_, bytes)| bytes).sum::<u64>() + memory.unaccounted, 300);
    }
}
