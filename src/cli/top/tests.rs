//! Frames of `top` as golden text. `UPDATE_GOLDEN=1 cargo test -p playhouse --lib cli::top` writes them anew.

use super::draw::{Heights, heights};
use super::sample::Sample;
use super::screen::Sort;
use super::*;
use crate::host::admin::{HostInfo, Stamped};
use playhouse_actors::HouseEvent;
use playhouse_actors::HouseStatus;
use playhouse_actors::engine::{EngineStats, LoadPhase, LoadProgress};
use playhouse_actors::inventory::{Device, DeviceId};
use playhouse_actors::messages::{
    DeviceStatus, Phase, ReplicaId, ReplicaStatus, RequestCounters, RouterStatus, ServiceStatus,
};
use playhouse_actors::policy::outcome::WorkerEnd;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use std::path::Path;

fn replica(model: &str, index: u32, device: usize, phase: Phase) -> ReplicaStatus {
    ReplicaStatus {
        replica: ReplicaId { model: model.into(), index },
        device: device_id(device),
        phase,
        incarnation: 1,
        pid: Some(4000 + index),
        progress: None,
        running: 0,
        kv_bytes: 8 << 30,
        last_heard: Some(Duration::from_millis(300)),
        step_age: None,
        stats: None,
        last_end: None,
    }
}

fn device_id(device: usize) -> DeviceId {
    DeviceId::gpu(format!("GPU-5d5b{device:04}-7c1e-4a4b-9d0f-000000000000"))
}

/// A box with two cards after so many seconds, in which `qwen/0` emits 250 tokens a second.
fn sample(seconds: u64) -> Sample {
    let stats = EngineStats {
        waiting: 2,
        kv_blocks_used: 640,
        kv_blocks_total: 1000,
        decode_tokens: 250 * seconds,
        ..EngineStats::default()
    };
    let ready = ReplicaStatus {
        running: 5,
        stats: Some(stats),
        step_age: Some(Duration::from_millis(12)),
        ..replica("qwen", 0, 0, Phase::Ready)
    };
    let loading = ReplicaStatus {
        incarnation: 3,
        progress: Some(LoadProgress { phase: LoadPhase::Weights, bytes_done: 43, bytes_total: 100 }),
        last_end: Some(WorkerEnd::Signalled(9)),
        ..replica("phi", 0, 1, Phase::Loading)
    };
    let idle = ReplicaStatus {
        stats: Some(EngineStats { kv_blocks_total: 1000, ..EngineStats::default() }),
        ..replica("qwen", 1, 1, Phase::Ready)
    };
    let device = |index: usize, replicas| DeviceStatus {
        device: device_id(index),
        quarantined: None,
        recent_failures: 0,
        failures: 0,
        oom: Default::default(),
        replicas,
    };
    let service = |model: &str, ready, replicas| ServiceStatus {
        model: model.into(),
        ready,
        replicas,
        open_requests: 7,
        open_tokens: 900,
        waiting: 2,
        tokens_per_second: None,
        required: true,
    };
    let card = |index: usize, used_gib: u64| Device {
        uuid: device_id(index).to_string(),
        name: "NVIDIA H200".into(),
        total_bytes: 140 << 30,
        used_bytes: used_gib << 30,
        utilization_percent: Some(93),
        temperature_c: Some(61),
        power_mw: Some(512_400),
        ..Device::default()
    };
    let event = |number, event| Stamped { number, unix_ms: 1_795_266_000_000 + number * 1000, event };
    Sample {
        host: HostInfo { pid: 4242, version: "0.1.0".into() },
        house: HouseStatus {
            devices: vec![device(0, vec![ready]), device(1, vec![loading, idle])],
            router: Some(RouterStatus {
                services: vec![service("phi", 0, 1), service("qwen", 2, 2)],
                requests: RequestCounters { completed: 90, failed: 1, resumed: 4, ..RequestCounters::default() },
                draining: false,
            }),
            uptime: Duration::from_secs(seconds),
        },
        devices: vec![card(0, 110), card(1, 21)],
        events: vec![
            event(
                0,
                HouseEvent::WorkerReady {
                    replica: ReplicaId { model: "qwen".into(), index: 0 },
                    after: Duration::from_millis(812),
                },
            ),
            event(
                1,
                HouseEvent::WorkerEnded {
                    replica: ReplicaId { model: "phi".into(), index: 0 },
                    end: WorkerEnd::Signalled(9),
                    in_flight: 3,
                },
            ),
        ],
    }
}

fn app() -> App {
    let mut app = App::new(sample(3600), false);
    app.sampled(Ok(sample(3602)));
    app
}

fn key(code: KeyCode) -> KeyEvent {
    KeyEvent::new(code, KeyModifiers::NONE)
}

/// Draws through a terminal, as `live` does, and reads what is on it.
fn frame(app: &App, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("no device is involved");
    let screen = app.screen();
    terminal.draw(|frame| frame.render_widget(&screen, frame.area())).expect("no device is involved");
    let lines = terminal.backend().buffer().content().chunks(usize::from(width));
    let text = |cells: &[ratatui::buffer::Cell]| cells.iter().map(ratatui::buffer::Cell::symbol).collect::<String>();
    lines.map(|cells| format!("{}\n", text(cells).trim_end())).collect()
}

fn check(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/top/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, found).expect("writable");
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(found == expected, "{name}: expected\n{expected}\nfound\n{found}");
}

#[test]
fn a_frame_of_80_by_24() {
    check("80x24.txt", &frame(&app(), 80, 24));
}

#[test]
fn a_wide_frame_has_room_for_names() {
    check("120x30.txt", &frame(&app(), 120, 30));
}

#[test]
fn help_lies_over_the_frame() {
    let mut app = app();
    assert!(app.press(key(KeyCode::Char('?'))));
    check("help.txt", &frame(&app, 80, 24));
    assert!(app.press(key(KeyCode::Esc)), "Esc closes the help first");
    assert!(!app.press(key(KeyCode::Esc)));
}

#[test]
fn a_host_that_went_away_is_said_above_what_was_last_seen() {
    let mut app = app();
    app.sampled(Err("error: no host answers at /run/playhouse/admin.sock\n  caused by: x".into()));
    check("gone.txt", &frame(&app, 80, 24));
    app.sampled(Ok(sample(3605)));
    assert!(frame(&app, 80, 24).starts_with("playhouse 0.1.0"), "and taken back when it answers");
}

#[test]
fn any_size_is_drawn() {
    let app = app();
    for (width, height) in [(1, 1), (5, 3), (20, 4), (40, 6), (79, 10), (300, 100)] {
        let text = frame(&app, width, height);
        assert_eq!(text.lines().count(), usize::from(height), "{width}x{height}");
    }
}

#[test]
fn once_prints_what_the_terminal_would_show() {
    let app = app();
    assert_eq!(text(&app.screen(), Rect::new(0, 0, 80, 24)), frame(&app, 80, 24));
}

#[test]
fn speeds_are_measured_between_two_looks_of_the_same_worker() {
    let speeds = |app: &App| app.screen().replicas.iter().map(|row| row.speed).collect::<Vec<_>>();
    assert_eq!(speeds(&app()), [Some(250.0), None, Some(0.0)]);
    let mut restarted = sample(3602);
    restarted.house.devices[0].replicas[0].incarnation = 2;
    let mut other = App::new(sample(3600), false);
    other.add(restarted);
    assert_eq!(speeds(&other)[0], None, "another worker counts from 0");
    assert_eq!(speeds(&App::new(sample(3600), false))[0], None, "one look is none");
}

#[test]
fn keys_sort_select_and_pause() {
    let mut app = app();
    let names = |app: &App| app.screen().replicas.into_iter().map(|row| row.replica).collect::<Vec<_>>();
    assert_eq!(names(&app), ["qwen/0", "phi/0", "qwen/1"]);
    let mut seen = vec![app.controls.sort];
    for expected in [
        ["phi/0", "qwen/0", "qwen/1"],
        ["qwen/0", "qwen/1", "phi/0"],
        ["qwen/0", "qwen/1", "phi/0"],
        ["phi/0", "qwen/0", "qwen/1"],
    ] {
        app.press(key(KeyCode::Char('s')));
        assert_eq!(names(&app), expected, "{:?}", app.controls.sort);
        seen.push(app.controls.sort);
    }
    app.press(key(KeyCode::Char('s')));
    assert_eq!((app.controls.sort, seen.len()), (Sort::Device, 5));
    for _ in 0..9 {
        app.press(key(KeyCode::Down));
    }
    assert_eq!(app.controls.selected, 2, "the last row");
    app.press(key(KeyCode::Home));
    assert_eq!(app.controls.selected, 0);
    app.press(key(KeyCode::Char('p')));
    app.sampled(Ok(sample(9999)));
    assert!(frame(&app, 80, 24).contains("PAUSED") && !frame(&app, 80, 24).contains("2h46m"));
    app.press(key(KeyCode::Char('p')));
    app.sampled(Ok(sample(9999)));
    assert!(frame(&app, 80, 24).contains("up 2h46m"));
    assert!(!app.press(key(KeyCode::Char('q'))));
    assert!(!app.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
}

#[test]
fn many_rows_share_the_lines_and_the_selection_is_seen() {
    assert_eq!(heights(21, 2, 3), Heights { devices: 3, replicas: 4, events: 14 });
    assert_eq!(heights(21, 8, 32), Heights { devices: 9, replicas: 8, events: 4 });
    assert_eq!(heights(21, 64, 64), Heights { devices: 9, replicas: 8, events: 4 });
    assert_eq!(heights(0, 8, 8), Heights { devices: 0, replicas: 0, events: 0 });
    let mut many = sample(3600);
    many.house.devices[0].replicas = (0..40).map(|index| replica("qwen", index, 0, Phase::Ready)).collect();
    let mut app = App::new(many, false);
    app.press(key(KeyCode::End));
    let text = frame(&app, 80, 24);
    assert!(text.contains("qwen/1 ") && !text.contains("qwen/20 "), "{text}");
}
