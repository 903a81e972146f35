//! What a good client feels of bad ones: the time to its first token and the memory of the house, before and during an
//! attack. House and attacker are processes of their own, so that neither the generator's memory nor its work is taken
//! for the house's.

use super::attack::Kind;
use super::client::{Ask, OpenLoop, quantile, quantiles, rss_mib, wait};
use super::speed::{ended, null_setup};
use super::{Must, Report};
use crate::http_support::engines::Pace;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What the bad clients do.
    kind: Kind,
    /// How many of them; without it, what the issue of each kind asks for.
    #[arg(long)]
    connections: Option<u32>,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Good requests a second.
    #[arg(long, default_value_t = 200)]
    rate: u64,
    /// Pairs of a measurement in peace and one under attack.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Places for connections; without it, the default of a configuration.
    #[arg(long)]
    places: Option<u32>,
    /// The processor of the attacker, if it is not to share the house's.
    #[arg(long)]
    attacker_cpu: Option<usize>,
}

#[derive(clap::Args)]
pub(crate) struct HouseArgs {
    #[arg(long)]
    places: Option<u32>,
    /// Microseconds of a step; 0 is as fast as it goes.
    #[arg(long)]
    step_us: u64,
}

/// A house in a process of its own: says where it is and runs until it is killed.
pub(crate) async fn house(args: HouseArgs) -> Value {
    let pace = match args.step_us {
        0 => Pace::Free,
        us => Pace::Every(Duration::from_micros(us)),
    };
    let mut setup = null_setup(pace, None);
    setup.config.host.limits.queued_requests = 4096;
    if let Some(places) = args.places {
        setup.settings.limits.connections = places;
    }
    let house = setup.start().await;
    println!("{}", house.address);
    ended(house).await
}

/// A process of ours; it ends with this value.
struct Part {
    child: Child,
    lines: BufReader<ChildStdout>,
}

impl Part {
    /// Starts this program again with other arguments.
    fn start(args: &[String]) -> Self {
        let program = std::env::current_exe().expect("this program has a path");
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be started again");
        let lines = BufReader::new(child.stdout.take().expect("it is piped"));
        Self { child, lines }
    }

    /// Waits for its next line.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("its output can be read");
        line.trim().to_owned()
    }

    /// Tells it to stop and reads its last line.
    fn stop(mut self) -> String {
        drop(self.child.stdin.take());
        self.line()
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Measures in peace and under attack, in turn.
pub(crate) async fn run(args: Args) -> Report {
    let mut house = vec!["house".to_owned(), format!("--step-us={}", args.kind.step_us())];
    // All of the bad ones at a time, and room for the good.
    let connections = args.connections.unwrap_or(args.kind.connections());
    let places = args.places.or(args.kind.places());
    house.extend(places.map(|places| format!("--places={places}")));
    let mut house = Part::start(&house);
    let address: SocketAddr = house.line().parse().expect("the house says where it is");
    let process = house.child.id().to_string();
    let (prompt, rate, seconds) = (json!([1]), args.rate, args.seconds);
    let good = async |seconds| {
        let ask = Ask { model: "basho", prompt: &prompt, max_tokens: 4, stream: true };
        OpenLoop::run(address, ask, rate, seconds).await
    };
    good(3).await;
    let before = rss_mib(&process);
    let (mut calm, mut attacked, mut ratios, mut told) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut most, mut n_failed) = (before, 0);
    for _ in 0..args.rounds {
        let peace = good(seconds).await;
        let mut attacker = vec!["attack".to_owned(), args.kind.name(), format!("--to={address}")];
        attacker.push(format!("--connections={connections}"));
        attacker.extend(args.attacker_cpu.map(|cpu| format!("--cpu={cpu}")));
        let mut attacker = Part::start(&attacker);
        attacker.line();
        let sampling = async {
            loop {
                most = f64::max(most, rss_mib(&process));
                wait(Duration::from_millis(100)).await;
            }
        };
        let war = async {
            wait(args.kind.settles_in()).await;
            good(seconds).await
        };
        let war = tokio::select! { war = war => war, () = sampling => unreachable!("it goes on") };
        told.push(serde_json::from_str::<Value>(&attacker.stop()).unwrap_or_default());
        n_failed += peace.n_failed() + war.n_failed();
        ratios.push(quantile(war.ttft(), 0.99) / quantile(peace.ttft(), 0.99));
        calm.extend(peace.ttft());
        attacked.extend(war.ttft());
        // What the attacker left behind is cleared away before the next round begins.
        wait(Duration::from_secs(1)).await;
    }
    let ratio = (quantile(attacked.clone(), 0.99) / quantile(calm.clone(), 0.99) * 1000.0).round() / 1000.0;
    let growth = ((most - before) * f64::from(1 << 20) / 1e6).round();
    let mut musts = vec![
        Must::at_most("times the quiet p99 time to first token", 1.2, ratio),
        Must::at_most("MB that the house's memory grew by", 200.0, growth),
        Must::at_most("good requests that failed", 0.0, n_failed as f64),
    ];
    if let Kind::Absurd = args.kind {
        let is_other = |status: &str| !status.starts_with('4');
        let statuses = told.iter().filter_map(|told| told["cut_by_status"].as_object()).flatten();
        let others: u64 = statuses.filter(|(status, _)| is_other(status)).filter_map(|(_, n)| n.as_u64()).sum();
        musts.push(Must::at_most("bad requests that were not refused with a 4xx", 0.0, others as f64));
    }
    let figures = json!({
        "kind": args.kind.name(), "connections": connections, "places": places, "good_per_second": rate,
        "quiet_ttft_ms": quantiles(calm), "attacked_ttft_ms": quantiles(attacked),
        "p99_ratio": ratio, "p99_ratio_by_round": ratios.iter().map(|r| (r * 1000.0).round() / 1000.0).collect::<Vec<_>>(),
        "rss_mib_before": before.round(), "rss_mib_most": most.round(), "attacker": told,
    });
    Report::new("abuse", figures, musts)
}
