//! Who comes in: names, origins, keys, and what each may have.

use crate::half_sent;
use crate::http_support::Setup;
use crate::http_support::client::{get, post};
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn names_origins_and_ids() {
    let house = Setup::default().start().await;
    let at = house.address;
    let status = async |name: &str, value: &str| get(at, "/health").header(name, value).send().await.status;
    assert_eq!(status("host", "localhost:7070").await, 200);
    assert_eq!(status("host", "[::1]:7070").await, 200);
    assert_eq!(status("host", "moon.example").await, 403, "a rebound name");
    assert_eq!(status("origin", "https://moon.example").await, 403, "a page of somebody else");
    assert_eq!(status("origin", &format!("http://{at}")).await, 200, "our own page");
    assert_eq!(status("origin", "null").await, 403);
    let echoed = get(at, "/health").header("x-request-id", "mine-1").send().await;
    assert_eq!(echoed.header("x-request-id"), Some("mine-1"));
    let made = get(at, "/health").send().await;
    assert!(made.header("x-request-id").is_some_and(|id| id.starts_with("req-")));
    assert_eq!(made.header("access-control-allow-origin"), None);
    house.shut_down().await;

    let mut setup = Setup::default();
    setup.settings.cors_origins = vec!["https://moon.example".into()];
    setup.settings.allowed_hosts = vec!["house.example".into()];
    let house = setup.start().await;
    let allowed =
        get(house.address, "/health").header("origin", "https://moon.example").header("host", "house.example");
    let answer = allowed.send().await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (200, Some("https://moon.example")));
    let asked = get(house.address, "/v1/models").method("OPTIONS").header("origin", "https://moon.example");
    let asked = asked.header("access-control-request-method", "POST").send().await;
    assert_eq!((asked.status, asked.header("access-control-allow-methods")), (200, Some("*")));
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_asked_for_before_the_body() {
    let mut setup = Setup::default();
    setup.settings.api_keys = ["sk-moon", "sk-river"].into_iter().collect();
    setup.settings.admin_keys = ["sk-admin"].into_iter().collect();
    let house = setup.start().await;
    let at = house.address;
    for open in ["/health", "/health/live", "/health/ready", "/openapi.json", "/"] {
        assert_eq!(get(at, open).send().await.status, 200, "{open} needs no key");
    }
    for closed in ["/v1/models", "/metrics", "/api/status", "/version", "/models"] {
        let answer = get(at, closed).send().await;
        assert_eq!((answer.status, answer.error("code")), (401, json!("invalid_api_key")), "{closed}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
        assert_eq!(get(at, closed).header("authorization", "Bearer sk-moon").send().await.status, 200, "{closed}");
        assert_eq!(get(at, closed).header("x-api-key", "sk-river").send().await.status, 200, "{closed}");
        assert_eq!(get(at, closed).header("authorization", "Bearer SK-MOON").send().await.status, 401, "{closed}");
        assert_eq!(get(at, closed).header("authorization", "Basic sk-moon").send().await.status, 401, "{closed}");
    }
    // The answer comes although the body never does.
    let unsent = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n";
    assert!(half_sent(&house, unsent).await.starts_with("HTTP/1.1 401"));
    let load = post(at, "/models/load", &json!({"model": "basho"}));
    assert_eq!(load.clone().send().await.status, 401);
    assert_eq!(load.clone().header("authorization", "Bearer sk-moon").send().await.status, 403);
    assert_eq!(load.clone().header("authorization", "Bearer sk-admin").send().await.json(), json!({"success": true}));
    let unload = post(at, "/models/unload", &json!({"model": "../basho"})).header("authorization", "Bearer sk-admin");
    assert_eq!(unload.send().await.status, 404, "models are named by the configuration");
    assert_eq!(*house.control.calls.lock().expect("not poisoned"), ["load basho"]);
    house.shut_down().await;

    let house = Setup::default().start().await;
    let load = post(house.address, "/models/load", &json!({"model": "basho"}));
    assert_eq!(load.send().await.status, 403, "without an admin key only the socket may");
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_socket_needs_no_key() {
    let mut setup = Setup::default();
    setup.settings.api_keys = ["sk-moon"].into_iter().collect();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("admin.sock");
    setup.unix = Some(tokio::net::UnixListener::bind(&path).expect("a socket"));
    let house = setup.start().await;
    let socket = tokio::net::UnixStream::connect(&path).await.expect("it listens");
    let unload = post(house.address, "/models/unload", &json!({"model": "basho"})).over(socket).await;
    assert_eq!(unload.status(), 200);
    assert_eq!(*house.control.calls.lock().expect("not poisoned"), ["unload basho"]);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_its_share_of_connections_whatever_it_says_of_itself() {
    let (mut setup, gate, _) = Setup::gated();
    setup.settings.limits.connections_per_ip = 2;
    let house = setup.start().await;
    let body = json!({"model": "basho", "prompt": "a", "max_tokens": 3});
    let asked: Vec<_> = (1..=2)
        .map(|n: u32| {
            let forwarded = format!("192.0.2.{n}");
            let call = post(house.address, "/v1/completions", &body).header("x-forwarded-for", &forwarded);
            tokio::spawn(call.send())
        })
        .collect();
    house.wait("asked", |status| status.router.as_ref().is_some_and(|r| r.services[0].open_requests == 2)).await;
    // Each of the two said that it was somebody else. The third is answered before it says anything.
    let refused = half_sent(&house, "");
    assert!(refused.await.starts_with("HTTP/1.1 429"));
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.2:0".parse().expect("an address")).expect("Linux has all of 127.0.0.0/8");
    let other = get(house.address, "/health").header("x-forwarded-for", "127.0.0.1");
    let other = other.over(socket.connect(house.address).await.expect("it listens")).await;
    assert_eq!(other.status(), 200, "another address has its own share");
    gate.give(100);
    for answer in asked {
        assert_eq!(answer.await.expect("no panic").status, 200);
    }
    assert_eq!(get(house.address, "/health").send().await.status, 200);
    house.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_its_share_of_requests_and_tokens() {
    let mut setup = Setup::default();
    setup.settings.api_keys = ["sk-requests", "sk-tokens"].into_iter().collect();
    setup.settings.admin_keys = ["sk-admin"].into_iter().collect();
    setup.settings.per_key.requests_per_minute = Some(3);
    setup.settings.per_key.tokens_per_minute = Some(200);
    let house = setup.start().await;
    let ask = async |key: &str, path: &str, body: Value| {
        post(house.address, path, &body).header("authorization", &format!("Bearer {key}")).send().await
    };
    let complete = |n: u32| json!({"model": "basho", "prompt": "a", "max_tokens": n, "ignore_eos": true});
    for _ in 0..2 {
        assert_eq!(ask("sk-requests", "/v1/completions", complete(1)).await.status, 200);
    }
    let embed = json!({"model": "basho", "input": "a"});
    assert_eq!(ask("sk-requests", "/v1/embeddings", embed.clone()).await.status, 200);
    for (path, body) in [("/v1/completions", complete(1)), ("/v1/embeddings", embed)] {
        let refused = ask("sk-requests", path, body).await;
        assert_eq!((refused.status, refused.error("type")), (429, json!("rate_limit_error")), "{path}");
        let after: u64 = refused.header("retry-after").and_then(|after| after.parse().ok()).expect("a time");
        assert!((1..=20).contains(&after), "a third of a minute: {after}");
    }
    assert_eq!(ask("sk-tokens", "/v1/completions", complete(220)).await.status, 200, "what has begun is finished");
    let refused = ask("sk-tokens", "/v1/completions", complete(1)).await;
    assert_eq!(refused.status, 429);
    assert!(refused.error("message").as_str().is_some_and(|message| message.contains("200 tokens")));
    for _ in 0..5 {
        assert_eq!(ask("sk-admin", "/v1/completions", complete(1)).await.status, 200, "admins have no such bounds");
    }
    house.shut_down().await;
}
