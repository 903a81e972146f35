//! The HTTP front over the real supervision tree, with a real client on a real socket: the OpenAI API as its clients
//! read it.

mod doors;
mod failures;
#[path = "../http_support/mod.rs"]
mod http_support;
mod pages;
mod refusals;
mod texts;
mod tools;

use http_support::engines::{Counts, Pace, Speaker};
use http_support::{PATIENCE, Setup, TestHouse, card_with_template};
use serde_json::{Value, json};

fn haiku(stream: bool) -> Value {
    json!({
        "model": "basho",
        "messages": [{"role": "user", "content": "the moon"}],
        "seed": 7,
        "max_tokens": 40,
        "stream": stream,
    })
}

/// The text of a chat's chunks.
fn text_of(chunks: &[Value]) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}

/// A house whose model says this text, with this chat template.
async fn house_that_says(text: &str, template: &str) -> TestHouse {
    let card = card_with_template("basho", template);
    let options = playhouse::text::EncodeOptions { add_special: false, parse_special: false };
    let script = card.tokenizer.encode(text, options).expect("tokens");
    let mut setup =
        Setup::default().engine(move || Box::new(Speaker::new(script.clone(), true, Pace::Free, Counts::default())));
    setup.cards = vec![card];
    setup.start().await
}

/// Sends these bytes and nothing more; what comes back until the front hangs up or has answered.
async fn half_sent(house: &TestHouse, bytes: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(house.address).await.expect("the front listens");
    socket.write_all(bytes.as_bytes()).await.expect("sent");
    let mut answer = vec![0; 4096];
    let n = tokio::time::timeout(PATIENCE, socket.read(&mut answer)).await.expect("in time").unwrap_or(0);
    String::from_utf8_lossy(&answer[..n]).into_owned()
}
