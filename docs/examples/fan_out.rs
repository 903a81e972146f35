//! Many requests over all replicas of a model, with a progress bar: the router gives each to the least busy replica.
//!
//! ```sh
//! cargo run --release --example fan_out -- 64
//! ```

use futures_util::stream::{FuturesUnordered, StreamExt};
use indicatif::{ProgressBar, ProgressStyle};
use playhouse::client::{GenerateRequest, ModelHandle, RequestError};
use playhouse::host::Playhouse;
use playhouse_config::{Config, Overrides};

/// Four devices that are not there: each replica is a real process with the real engine on the CPU.
const CONFIG: &str = r#"
[[model]]
name = "basho"
path = "embedded:basho"
replicas = 4
isolation = "process"

[[simulate.device]]
name = "Card 0"
uuid = "SIM-0"
vram = "1GiB"

[[simulate.device]]
name = "Card 1"
uuid = "SIM-1"
vram = "1GiB"

[[simulate.device]]
name = "Card 2"
uuid = "SIM-2"
vram = "1GiB"

[[simulate.device]]
name = "Card 3"
uuid = "SIM-3"
vram = "1GiB"
"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    playhouse::worker::run_if_worker();
    let count: u64 = std::env::args().nth(1).map_or(Ok(64), |text| text.parse())?;
    tokio::runtime::Runtime::new()?.block_on(fan_out(count))
}

async fn fan_out(count: u64) -> Result<(), Box<dyn std::error::Error>> {
    let house = Playhouse::open(Config::from_text("fan_out", CONFIG, &Overrides::none())?).await?;
    house.ready().await?;
    let model = house.model("basho")?;

    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} haiku, {msg}")?;
    let bar = ProgressBar::new(count).with_style(style);
    let mut running: FuturesUnordered<_> = (0..count).map(|seed| haiku(&model, seed)).collect();
    let mut tokens = 0;
    let mut last = String::new();
    while let Some(haiku) = running.next().await {
        let (text, n_tokens) = haiku?;
        (tokens, last) = (tokens + n_tokens, text);
        bar.set_message(format!("{tokens} tokens"));
        bar.inc(1);
    }
    bar.finish();
    println!("{count} haiku, {tokens} tokens; the last one:\n{last}");
    let status = house.status().await.ok_or("the house has ended")?;
    let requests = status.router.as_ref().ok_or("the router is being restarted")?.requests;
    println!("{} replicas, {} requests completed", status.replicas().count(), requests.completed);
    house.stop().await;
    Ok(())
}

async fn haiku(model: &ModelHandle, seed: u64) -> Result<(String, u32), RequestError> {
    let request = GenerateRequest::text("winter river\n").seed(seed).max_tokens(64);
    let mut texts = model.generate(request).await?.collect().await?;
    let choice = texts.remove(0);
    Ok((choice.text, choice.end.completion_tokens))
}
