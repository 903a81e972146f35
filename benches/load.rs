//! Load on the HTTP front: what the front itself can carry, with an engine that costs nothing, what a running house carries,
//! and what a good client feels of bad ones. Prints one JSON document; beside it, on standard error, what is asked for and
//! what was reached.
//!
//! ```text
//! cargo bench --bench load                              the speed figures, shortened
//! cargo bench --bench load -- throughput                tokens a second of SSE over 256 streams
//! cargo bench --bench load -- delay                     what the front adds to a token at 10,000 tokens a second
//! cargo bench --bench load -- overload                  20 times as many requests as can be done, for 60 s
//! cargo bench --bench load -- open                      open-loop arrivals; with --url at a house that runs
//! cargo bench --bench load -- abuse slow-loris          10,000 connections that never finish their headers
//! cargo bench --bench load -- abuse stalled-readers     1,000 streams that nobody reads
//! cargo bench --bench load -- abuse h2                  resets, floods and header bombs over HTTP/2
//! cargo bench --bench load -- abuse absurd              requests beyond every bound
//! cargo bench --bench load -- serve --port 7070         the embedded model behind the front, for other generators
//! ```
//!
//! Arrivals are open-loop: they do not wait for answers, so a server that falls behind is seen to. The generator shares the
//! cores with the front; `taskset -c 0,1` makes these two on any machine. With `--check` the exit status is 1 where
//! something that is asked for was not reached.

#[path = "load/abuse.rs"]
mod abuse;
#[path = "load/attack.rs"]
mod attack;
#[path = "load/client.rs"]
mod client;
#[path = "../tests/http_support/mod.rs"]
mod http_support;
#[path = "load/speed.rs"]
mod speed;

use clap::Parser;
use serde_json::{Value, json};
use std::future::Future;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    mode: Option<Mode>,
    /// Exit with 1 where something that is asked for was not reached.
    #[arg(long, global = true)]
    check: bool,
    /// What `cargo bench` adds.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(clap::Subcommand)]
enum Mode {
    /// Tokens a second of SSE over 256 streams.
    Throughput {
        #[arg(long, default_value_t = 10)]
        seconds: u64,
    },
    /// What the front adds to a token at 10,000 tokens a second.
    Delay {
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// Streams that share the tokens. They come in steps of one for each stream, as a GPU makes them: the last of a step
        /// waits for all others.
        #[arg(long, default_value_t = 64)]
        streams: u64,
    },
    /// 20 times as many requests as can be done.
    Overload {
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Open-loop arrivals.
    Open {
        /// A house that runs; without it, one of our own with an engine of 10 ms a step.
        #[arg(long)]
        url: Option<String>,
        #[arg(long, default_value = "basho")]
        model: String,
        /// Arrivals a second.
        #[arg(long, default_value_t = 50)]
        rate: u64,
        #[arg(long, default_value_t = 10)]
        seconds: u64,
    },
    /// What a good client feels of bad ones.
    Abuse(abuse::Args),
    /// The embedded model behind the front.
    Serve {
        #[arg(long, default_value_t = 7070)]
        port: u16,
    },
    /// A part of `abuse`.
    #[command(hide = true)]
    House(abuse::HouseArgs),
    /// A part of `abuse`.
    #[command(hide = true)]
    Attack(attack::Args),
}

fn main() {
    let args = Args::parse();
    raise_descriptors();
    let reports = match args.mode {
        None => {
            run(2, async { vec![speed::throughput(5).await, speed::delay(5, 64).await, speed::overload(10).await] })
        }
        Some(Mode::Throughput { seconds }) => run(2, async { vec![speed::throughput(seconds).await] }),
        Some(Mode::Delay { seconds, streams }) => run(2, async { vec![speed::delay(seconds, streams).await] }),
        Some(Mode::Overload { seconds }) => run(2, async { vec![speed::overload(seconds).await] }),
        Some(Mode::Open { url, model, rate, seconds }) => {
            run(2, async { vec![speed::open(url.as_deref(), &model, rate, seconds).await] })
        }
        Some(Mode::Abuse(args)) => run(1, async { vec![abuse::run(args).await] }),
        Some(Mode::Serve { port }) => return drop(run(2, speed::serve(port))),
        Some(Mode::House(args)) => return drop(run(2, abuse::house(args))),
        Some(Mode::Attack(args)) => return run(1, attack::run(args)),
    };
    let is_met = tell(&reports);
    // Engines that nobody asked to end would be waited for.
    std::process::exit(i32::from(args.check && !is_met));
}

fn run<T>(threads: usize, work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    runtime.expect("a runtime").block_on(work)
}

fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // What is not allowed shows in the result.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// One figure that is asked for.
struct Must {
    what: &'static str,
    asked: f64,
    reached: f64,
    is_met: bool,
}

impl Must {
    fn at_least(what: &'static str, asked: f64, reached: f64) -> Self {
        Self { what, asked, reached, is_met: reached >= asked }
    }

    /// A figure that could not be taken is not met.
    fn at_most(what: &'static str, asked: f64, reached: f64) -> Self {
        Self { what, asked, reached, is_met: reached <= asked }
    }
}

/// What one mode found.
struct Report {
    mode: &'static str,
    figures: Value,
    musts: Vec<Must>,
}

impl Report {
    fn new(mode: &'static str, figures: Value, musts: Vec<Must>) -> Self {
        Self { mode, figures, musts }
    }

    fn json(&self) -> Value {
        let musts = self.musts.iter().map(|must| {
            let Must { what, asked, reached, is_met } = must;
            json!({ "what": what, "asked": asked, "reached": reached, "is_met": is_met })
        });
        json!({ "mode": self.mode, "figures": self.figures, "musts": musts.collect::<Vec<_>>() })
    }
}

/// Prints everything; whether all that is asked for was reached.
#[expect(clippy::print_stderr, reason = "standard output is for the document")]
fn tell(reports: &[Report]) -> bool {
    println!("{:#}", reports.iter().map(Report::json).collect::<Value>());
    let musts = reports.iter().flat_map(|report| &report.musts);
    for Must { what, asked, reached, is_met } in musts.clone() {
        let word = if *is_met { "met   " } else { "MISSED" };
        eprintln!("{word} asked {asked:>9}  reached {reached:>12}  {what}");
    }
    musts.into_iter().all(|must| must.is_met)
}
