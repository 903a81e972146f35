//! Supervision in a log: every event of the tree as a line of JSON, while a worker is killed under a stream. The stream
//! does not notice.
//!
//! ```sh
//! cargo run --release --example events
//! ```

use playhouse::client::{Event, GenerateRequest};
use playhouse::host::Playhouse;
use playhouse_actors::HouseEvent;
use playhouse_config::{Config, Overrides};
use std::time::Duration;

const CONFIG: &str = r#"
[[model]]
name = "basho"
path = "embedded:basho"
devices = "cpu"
isolation = "process"

[supervision]
heartbeat = "100ms"
"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    playhouse::worker::run_if_worker();
    tokio::runtime::Runtime::new()?.block_on(run())
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let house = Playhouse::open(Config::from_text("events", CONFIG, &Overrides::none())?).await?;
    let mut events = house.events();
    let (done, is_done) = tokio::sync::oneshot::channel::<()>();
    let log = tokio::spawn(async move {
        let mut is_done = is_done;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Ok(event) => println!("{}", serde_json::to_string(&event)?),
                    Err(_) => break,
                },
                _ = &mut is_done => break,
            }
        }
        Ok::<(), serde_json::Error>(())
    });
    house.ready().await?;

    let model = house.model("basho")?;
    let undisturbed = text_of(&house, &model, false).await?;
    let disturbed = text_of(&house, &model, true).await?;
    assert_eq!(undisturbed, disturbed, "the same request gives the same text, whatever dies meanwhile");
    println!("{disturbed}");
    house.stop().await;
    let _ = done.send(());
    log.await??;
    Ok(())
}

/// Generates with a fixed seed; with `kill`, ends the worker from outside after the third token.
async fn text_of(
    house: &Playhouse,
    model: &playhouse::client::ModelHandle,
    kill: bool,
) -> Result<String, Box<dyn std::error::Error>> {
    let mut stream = model.generate(GenerateRequest::text("first snow\n").seed(3).max_tokens(48)).await?;
    let (mut text, mut n_tokens) = (String::new(), 0);
    while let Some(event) = stream.next().await {
        match event {
            Event::Token(token) => {
                text.push_str(&token.text);
                n_tokens += 1;
            }
            Event::End(end) => text.push_str(&end.text),
        }
        if kill && n_tokens == 3 {
            n_tokens += 1;
            kill_worker(house).await?;
        }
    }
    Ok(text)
}

async fn kill_worker(house: &Playhouse) -> Result<(), Box<dyn std::error::Error>> {
    let mut events = house.events();
    let status = house.status().await.ok_or("the house has ended")?;
    let pid = status.replicas().find_map(|replica| replica.pid).ok_or("no worker is a process")?;
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).ok_or("a process id is not 0")?;
    rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    let ended = async { while !matches!(events.recv().await, Ok(HouseEvent::WorkerEnded { .. }) | Err(_)) {} };
    Ok(tokio::time::timeout(Duration::from_secs(10), ended).await?)
}
