//! The smallest host application: open a house, ask its model, print the answer as it comes.
//!
//! ```sh
//! cargo run --release --example chat -- "autumn moon"
//! ```
//!
//! The embedded model writes haiku and has no chat template, so this asks for a text; a model with a template takes
//! [`ChatRequest::user`] instead, and this program uses it where there is one.

use playhouse::client::{ChatRequest, Event, GenerateRequest};
use playhouse::host::Playhouse;
use playhouse_config::{Config, Overrides};
use std::io::Write;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Workers are processes of their own, started from this very program. This line is all that they need of it.
    playhouse::worker::run_if_worker();

    let prompt = std::env::args().nth(1).unwrap_or_else(|| "autumn moon".into());
    let config = std::env::args_os().nth(2).map(PathBuf::from);
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(answer(prompt, Config::open(config.as_deref(), &Overrides::from_process_env())?))
}

async fn answer(prompt: String, config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let house = Playhouse::open(config).await?;
    house.ready().await?;
    let name = house.client().catalog().cards().next().ok_or("the configuration has no model")?.name.clone();
    let model = house.model(&name)?;

    let generate = GenerateRequest::text(prompt.clone()).seed(7).max_tokens(64);
    let mut stream = match model.card().template {
        Some(_) => model.chat(ChatRequest { generate, ..ChatRequest::user(prompt) }).await?,
        None => model.generate(generate).await?,
    };
    while let Some(event) = stream.next().await {
        let text = match event {
            Event::Token(token) => token.text,
            Event::End(end) => format!("{}\n", end.text),
        };
        print!("{text}");
        std::io::stdout().flush()?;
    }
    house.stop().await;
    Ok(())
}
