//! `playhouse ps`: what a running host has on which device, as a table, a tree or JSON.

use std::fmt::Write as _;

use playhouse_actors::HouseStatus;
use playhouse_actors::inventory::Device;
use playhouse_actors::messages::{DeviceStatus, ReplicaStatus, RouterStatus, ServiceStatus};
use serde_json::json;

use super::socket::SocketArgs;
use super::{CliError, RunCommand, show};
use crate::host::admin::HostInfo;

/// The arguments of `ps`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    socket: SocketArgs,
    /// Print one JSON document
    #[arg(long, conflicts_with = "tree")]
    json: bool,
    /// Show devices with their replicas, models and requests as a tree
    #[arg(long)]
    tree: bool,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        let mut client = self.socket.connect()?;
        let (host, house) = client.status()?;
        let devices = client.devices()?;
        let view = View { host, house, devices };
        match () {
            () if self.json => super::print_json(&view.document()),
            () if self.tree => super::print(&view.tree()),
            () => super::print(&view.table()),
        }
    }
}

/// Everything that is shown.
struct View {
    host: HostInfo,
    house: HouseStatus,
    devices: Vec<Device>,
}

impl View {
    fn document(&self) -> serde_json::Value {
        json!({
            "host": self.host, "ready": self.house.is_ready(), "uptime_seconds": self.house.uptime.as_secs_f64(),
            "devices": self.house.devices, "router": self.house.router, "inventory": self.devices,
        })
    }

    fn headline(&self) -> String {
        let HostInfo { pid, version } = &self.host;
        format!("playhouse {version}, process {pid}, up {}, {}", show::time(self.house.uptime), readiness(&self.house))
    }

    fn table(&self) -> String {
        const HEADINGS: &[&str] =
            &["REPLICA", "DEVICE", "PHASE", " PID", " RESTARTS", " RUN", " WAIT", " KV", "STEP", "LAST END"];
        let row = |replica: &ReplicaStatus| {
            let stats = |read: fn(&playhouse_actors::engine::EngineStats) -> String| {
                replica.stats.as_ref().map_or("-".to_owned(), read)
            };
            vec![
                replica.replica.to_string(),
                replica.device.to_string(),
                show::phase_and_progress(replica),
                replica.pid.map_or("-".to_owned(), |pid| pid.to_string()),
                show::restarts(replica).to_string(),
                replica.running.to_string(),
                stats(|stats| stats.waiting.to_string()),
                stats(|stats| format!("{}%", show::kv_percent(stats))),
                show::step(replica),
                replica.last_end.as_ref().map_or("-".to_owned(), ToString::to_string),
            ]
        };
        let rows: Vec<Vec<String>> = self.house.replicas().map(row).collect();
        let mut text = format!("{}\n\n{}", self.headline(), show::table(HEADINGS, &rows));
        for device in &self.house.devices {
            if let Some(reason) = &device.quarantined {
                // Writing to a String does not fail.
                let _ = writeln!(text, "{} is quarantined: {reason}", device.device);
            }
            if let Some(given_up) = show::given_up(device.oom) {
                let _ = writeln!(text, "{} ran out of memory: {given_up}", device.device);
            }
        }
        text
    }

    fn tree(&self) -> String {
        let mut root = Node::new(self.headline());
        root.children.extend(self.house.devices.iter().map(|device| self.device(device)));
        match &self.house.router {
            Some(router) => root.children.extend([models(router), requests(router)]),
            None => root.children.push(Node::new("the router is being restarted".to_owned())),
        }
        root.render()
    }

    fn device(&self, status: &DeviceStatus) -> Node {
        let mut line = status.device.to_string();
        if let Some(device) = self.devices.iter().find(|device| device.uuid == status.device.as_str()) {
            let (used, total) = (show::gib(device.used_bytes), show::gib(device.total_bytes));
            let _ = write!(line, "  {}, {used} of {total} used", device.name);
        }
        if status.failures > 0 {
            let _ = write!(line, ", {} failures ({} recent)", status.failures, status.recent_failures);
        }
        if let Some(given_up) = show::given_up(status.oom) {
            let _ = write!(line, ", ran out of memory: {given_up}");
        }
        if let Some(reason) = &status.quarantined {
            let _ = write!(line, ", quarantined: {reason}");
        }
        let children = status.replicas.iter().map(|status| Node::new(replica(status))).collect();
        Node { line, children }
    }
}

/// Whether the host is ready, and if not, for want of what.
fn readiness(house: &HouseStatus) -> String {
    let Some(router) = &house.router else { return "not ready: the router is being restarted".to_owned() };
    if router.draining {
        return "draining".to_owned();
    }
    let missing = |service: &&ServiceStatus| service.required && service.ready == 0;
    let names: Vec<&str> = router.services.iter().filter(missing).map(|service| service.model.as_str()).collect();
    if names.is_empty() { "ready".to_owned() } else { format!("not ready: {} to come", names.join(", ")) }
}

fn replica(replica: &ReplicaStatus) -> String {
    let mut line = format!("{}  {}", replica.replica, show::phase_and_progress(replica));
    if let Some(pid) = replica.pid {
        let _ = write!(line, ", process {pid}");
    }
    match show::restarts(replica) {
        0 => {}
        1 => line.push_str(", 1 restart"),
        n => drop(write!(line, ", {n} restarts")),
    }
    if let Some(stats) = &replica.stats {
        let (running, waiting) = (replica.running, stats.waiting);
        let _ = write!(line, ", {running} running, {waiting} waiting, step {}", show::step(replica));
        let _ = write!(line, ", KV {}% of {}", show::kv_percent(stats), show::bytes(replica.kv_bytes));
    }
    if let Some(end) = &replica.last_end {
        let _ = write!(line, "; last end: {end}");
    }
    line
}

fn models(router: &RouterStatus) -> Node {
    let line = |service: &ServiceStatus| {
        let required = if service.required { "required" } else { "not required" };
        let speed = service.tokens_per_second.map_or(String::new(), |speed| format!(", {speed:.0} tokens/s"));
        let ServiceStatus { model, ready, replicas, open_requests, waiting, open_tokens, .. } = service;
        format!(
            "{model}  {required}, {ready} of {replicas} ready, {open_requests} open requests ({waiting} wait for a \
             replica), {open_tokens} tokens to come{speed}"
        )
    };
    let children = router.services.iter().map(|service| Node::new(line(service))).collect();
    Node { line: "models".to_owned(), children }
}

fn requests(router: &RouterStatus) -> Node {
    let counters = &router.requests;
    Node::new(format!(
        "requests  {} accepted, {} completed, {} failed, {} cancelled, {} refused, {} resumed, {} poison",
        counters.accepted,
        counters.completed,
        counters.failed,
        counters.cancelled,
        counters.refused,
        counters.resumed,
        counters.poisoned
    ))
}

/// A line and what hangs on it.
struct Node {
    line: String,
    children: Vec<Node>,
}

impl Node {
    fn new(line: String) -> Self {
        Self { line, children: Vec::new() }
    }

    fn render(&self) -> String {
        let mut text = format!("{}\n", self.line);
        self.render_children("", &mut text);
        text
    }

    fn render_children(&self, indent: &str, text: &mut String) {
        for (index, child) in self.children.iter().enumerate() {
            let last = index + 1 == self.children.len();
            let (branch, below) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            let _ = writeln!(text, "{indent}{branch}{}", child.line);
            child.render_children(&format!("{indent}{below}"), text);
        }
    }
}
