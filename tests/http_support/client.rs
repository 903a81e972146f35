//! A small HTTP client: one connection a request, so that nothing is shared that a test does not mean to share.

use super::PATIENCE;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::net::SocketAddr;
use tokio::net::TcpStream;

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: hyper::HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {:?}", self.body))
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("UTF-8")
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The error object's member.
    pub(crate) fn error(&self, member: &str) -> Value {
        self.json()["error"][member].clone()
    }
}

/// A request, not sent yet.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    address: SocketAddr,
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: Bytes,
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Call {
    Call { address, method: "GET".into(), path: path.into(), headers: vec![], body: Bytes::new() }
}

pub(crate) fn post(address: SocketAddr, path: &str, body: &Value) -> Call {
    raw(address, path, body.to_string())
}

pub(crate) fn raw(address: SocketAddr, path: &str, body: impl Into<Bytes>) -> Call {
    let headers = vec![("content-type".into(), "application/json".into())];
    Call { address, method: "POST".into(), path: path.into(), headers, body: body.into() }
}

impl Call {
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub(crate) fn method(mut self, method: &str) -> Self {
        self.method = method.into();
        self
    }

    /// Sends it; the answer's body is still to be read.
    pub(crate) async fn open(self) -> Response<Incoming> {
        let socket = TcpStream::connect(self.address).await.expect("the front listens");
        self.over(socket).await
    }

    /// Sends it over this connection.
    pub(crate) async fn over<S>(self, socket: S) -> Response<Incoming>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(socket)).await.expect("a handshake");
        tokio::spawn(connection);
        let mut request = Request::builder().method(self.method.as_str()).uri(&self.path);
        if !self.headers.iter().any(|(name, _)| name == "host") {
            request = request.header("host", self.address.to_string());
        }
        for (name, value) in &self.headers {
            request = request.header(name, value);
        }
        let request = request.body(Full::new(self.body)).expect("a request");
        let sent = tokio::time::timeout(PATIENCE, sender.send_request(request));
        let response = sent.await.expect("an answer in time").expect("an answer");
        // The connection lives as long as its sender.
        tokio::spawn(async move {
            let _ = sender.ready().await;
        });
        response
    }

    /// Sends it and reads the whole answer.
    pub(crate) async fn send(self) -> Answer {
        read(self.open().await).await
    }

    /// Sends it and reads the data of all events.
    pub(crate) async fn events(self) -> Vec<String> {
        let answer = self.send().await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
        events_of(answer.text())
    }
}

pub(crate) async fn read(response: Response<Incoming>) -> Answer {
    let (parts, body) = response.into_parts();
    let collected = tokio::time::timeout(PATIENCE, body.collect()).await.expect("the body ends in time");
    let body = collected.expect("a whole body").to_bytes();
    Answer { status: parts.status.as_u16(), headers: parts.headers, body }
}

/// The `data:` of each event.
pub(crate) fn events_of(text: &str) -> Vec<String> {
    text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).map(str::to_owned).collect()
}

/// The chunks of a stream, which must end with `[DONE]`.
pub(crate) fn chunks_of(events: &[String]) -> Vec<Value> {
    let (last, chunks) = events.split_last().expect("events");
    assert_eq!(last, "[DONE]");
    chunks.iter().map(|chunk| serde_json::from_str(chunk).expect("a chunk is JSON")).collect()
}
