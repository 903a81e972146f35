//! Whole files: the good ones are read, each bad one gives the message beside it, the examples and the page are true.

use playhouse_config::{
    Config, ConfigError, DeviceSelector, Devices, Host, Model, ModelSource, Overrides, PerKey, Replicas,
    SimulatedDevice, Supervision, Tls, json_schema,
};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn toml_files(name: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder(name)).expect("the folder is part of the crate");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("readable").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    files
}

/// The environment that the files in `tests/` and `examples/` are read in.
fn environment() -> Overrides {
    Overrides::none().with_env("PLAYHOUSE_KEY", "k-123").with_env("MODELS", "/srv/models").with_env("PATH", "/bin")
}

fn check(text: &str) -> Config {
    Config::from_text("test.toml", text, &environment()).unwrap_or_else(|error| panic!("{error}"))
}

fn refuse(text: &str, overrides: &Overrides) -> String {
    match Config::from_text("test.toml", text, overrides) {
        Ok(config) => panic!("accepted: {config:#?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn good_files_are_read() {
    let files = toml_files("tests/good");
    assert!(files.len() >= 5, "{files:?}");
    for path in files {
        let config = Config::open(Some(&path), &environment()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(config.path.as_deref(), Some(path.as_path()));
        assert!(!config.models.is_empty());
    }
}

/// `NAME.toml` gives exactly the message in `NAME.expected`; with `PLAYHOUSE_BLESS=1` the messages are written anew.
#[test]
fn bad_files_give_the_message_beside_them() {
    let bless = std::env::var_os("PLAYHOUSE_BLESS").is_some();
    let files = toml_files("tests/bad");
    assert!(files.len() >= 40, "only {} bad files", files.len());
    for path in files {
        let text = fs::read_to_string(&path).expect("readable");
        let label = path.file_name().expect("a file").to_string_lossy().into_owned();
        let message = match Config::from_text(&label, &text, &environment()) {
            Ok(_) => panic!("{label} was accepted"),
            Err(error) => format!("{error}\n"),
        };
        assert!(message.contains(&format!("{label}:")) && message.contains('^'), "no place in:\n{message}");
        let expected = path.with_extension("expected");
        if bless {
            fs::write(&expected, &message).expect("writable");
        }
        let expected =
            fs::read_to_string(&expected).unwrap_or_else(|_| panic!("no message beside {label}:\n{message}"));
        assert_eq!(message, expected, "{label}");
    }
}

#[test]
fn every_bad_message_belongs_to_a_file() {
    for entry in fs::read_dir(folder("tests/bad")).expect("the folder is part of the crate") {
        let path = entry.expect("readable").path();
        assert!(path.with_extension("toml").exists(), "{} has no file", path.display());
    }
}

#[test]
fn examples_are_read_and_say_what_they_are_called() {
    let read = |name: &str| {
        let path = folder("examples").join(name);
        let text = fs::read_to_string(&path).expect("the example exists");
        assert!(text.starts_with("#:schema ../playhouse.schema.json\n"), "{name} names its schema");
        assert!(text.lines().filter(|line| line.contains("# ")).count() >= 4, "{name} is commented");
        Config::open(Some(&path), &environment()).unwrap_or_else(|error| panic!("{error}"))
    };
    assert_eq!(toml_files("examples").len(), 4);
    assert_eq!(read("one-gpu.toml").models.len(), 1);
    let mixed = read("four-mixed.toml");
    assert!(mixed.models.iter().any(|model| matches!(&model.devices, Devices::These(list) if !list.is_empty())));
    assert!(mixed.models.iter().any(|model| model.devices == Devices::Auto));
    assert_eq!(read("eight-equal.toml").models[0].replicas, Replicas::All);
    assert!(read("cpu-only.toml").models.iter().all(|model| model.devices == Devices::Cpu));
}

#[test]
fn without_a_file_the_embedded_model_is_served() {
    let config = Config::open(None, &Overrides::none()).expect("nothing is wrong with nothing");
    assert_eq!(config, Config::default());
    assert_eq!(config.host.address.to_string(), "127.0.0.1:7070");
    assert_eq!(config.models[0].devices, Devices::AutoElseCpu);
    assert_eq!(config.models[0].replicas, Replicas::All);
    assert_eq!(config.models[0].source, ModelSource::Embedded("basho".into()));
}

#[test]
fn a_file_that_cannot_be_read_is_its_own_error() {
    let error = Config::open(Some(Path::new("/nowhere/playhouse.toml")), &Overrides::none()).expect_err("no such file");
    assert!(matches!(error, ConfigError::Read { .. }));
    assert_eq!(error.to_string(), "cannot read the configuration file /nowhere/playhouse.toml");
}

#[test]
fn every_key_is_read() {
    let config = check(
        r#"
        version = 1
        [host]
        address = "127.0.0.1:0"
        admin_socket = "/run/playhouse.sock"
        api_keys = ["${env:PLAYHOUSE_KEY}", "a$${b"]
        drain = "1m"
        log = "json"
        insecure = true
        http_socket = "/run/playhouse-http.sock"
        api_keys_file = "keys"
        admin_keys = ["sk-admin"]
        admin_keys_file = "/etc/admin-keys"
        tls = { certificate = "cert.pem", key = "/key.pem" }
        allowed_hosts = ["models.example"]
        cors_origins = ["*"]
        per_key = { streams = 4, requests_per_minute = 60, tokens_per_minute = 1_000_000 }
        keep_alive = "1s"
        look_every = "20ms"
        otlp_endpoint = "http://127.0.0.1:4318"
        limits = { connections_per_ip = 7, http2_streams = 9, body = "1MiB", queued_requests = 3, queued_tokens = 9, stream_events = 5, client_timeout = "2s" }
        [defaults]
        context = 4096
        required = false
        [supervision]
        strategy = "rest_for_one"
        max_restarts = 1000
        window = "1h"
        restart = "transient"
        shutdown = "0s"
        backoff = { min = "10ms", max = "1s", jitter = 0 }
        reset_after = "1m"
        step_timeout = "5s"
        load_timeout = "20s"
        heartbeat = "100ms"
        poison_deaths = 3
        [[model]]
        name = "a"
        aliases = ["b", "c/d:latest"]
        path = "a.gguf"
        devices = ["SIM-0", 1]
        max_sequences = 4
        max_batch_tokens = 64
        kv_budget = "1GiB"
        kv_type = "q8_0"
        isolation = "process"
        priority = -1
        [[model]]
        name = "e"
        path = "embedded:basho"
        devices = "auto"
        replicas = 2
        context = 128
        required = true
        [[simulate.device]]
        name = "Simulated 24G"
        uuid = "SIM-0"
        vram = "24GiB"
        [[simulate.device]]
        name = "Simulated 8G"
        uuid = "SIM-1"
        vram = "8GiB"
        used = "1GiB"
        "#,
    );
    let keys: Vec<&str> = config.host.api_keys.iter().map(|key| key.expose()).collect();
    assert_eq!(keys, ["k-123", "a${b"]);
    assert!(!format!("{config:?}").contains("k-123"), "keys are not printed");
    let host = &config.host;
    assert!(host.insecure && !format!("{config:?}").contains("sk-admin"));
    assert_eq!(host.http_socket.as_deref(), Some(Path::new("/run/playhouse-http.sock")));
    assert_eq!(host.admin_keys[0].expose(), "sk-admin");
    assert_eq!(
        (host.api_keys_file.as_deref(), host.admin_keys_file.as_deref()),
        (Some(Path::new("keys")), Some(Path::new("/etc/admin-keys")))
    );
    assert_eq!(host.tls, Some(Tls { certificate: "cert.pem".into(), key: "/key.pem".into() }));
    assert_eq!(
        (host.allowed_hosts.as_slice(), host.cors_origins.as_slice()),
        (&["models.example".to_owned()][..], &["*".to_owned()][..])
    );
    let per_key = PerKey { streams: Some(4), requests_per_minute: Some(60), tokens_per_minute: Some(1_000_000) };
    assert_eq!(host.per_key, per_key);
    assert_eq!((host.keep_alive, host.look_every), (Duration::from_secs(1), Duration::from_millis(20)));
    assert_eq!(host.otlp_endpoint.as_deref(), Some("http://127.0.0.1:4318"));
    assert_eq!((host.limits.connections_per_ip, host.limits.http2_streams), (7, 9));
    assert_eq!(config.host.limits.queued_requests, 3);
    assert_eq!(config.host.limits.idle_timeout, Duration::from_secs(75));
    assert_eq!(config.supervision.backoff.min, Duration::from_millis(10));
    let [a, e] = config.models.as_slice() else { panic!("two models") };
    let selectors = vec![DeviceSelector::Uuid("SIM-0".into()), DeviceSelector::Index(1)];
    assert_eq!(a.devices, Devices::These(selectors));
    assert_eq!((a.replicas, a.context, a.required), (Replicas::All, Some(4096), false));
    assert_eq!((e.replicas, e.context, e.required), (Replicas::Count(2), Some(128), true));
    let second =
        SimulatedDevice { name: "Simulated 8G".into(), uuid: "SIM-1".into(), vram_bytes: 8 << 30, used_bytes: 1 << 30 };
    assert_eq!(config.simulate[1], second);
    assert_eq!(config.model("c/d:latest").map(|model| model.name.as_str()), Some("a"));
    assert_eq!(config.model("x"), None);
}

#[test]
fn arguments_outrank_the_environment_which_outranks_the_file() {
    let text = "[host]\naddress = \"127.0.0.1:1\"\ndrain = \"1s\"\nlog = \"json\"\n";
    let environment = Overrides::none()
        .with_env("PLAYHOUSE_HOST_ADDRESS", "127.0.0.1:2")
        .with_env("PLAYHOUSE_HOST_DRAIN", "2s")
        .with_env("PLAYHOUSE_DEFAULTS_CONTEXT", "512")
        .with_env("PLAYHOUSE_DEFAULTS_REPLICAS", "2")
        .with_env("PLAYHOUSE_HOST_LIMITS_BODY", "4MiB")
        .with_env("PLAYHOUSE_HOST_API_KEYS", "one, two")
        .with_env("PLAYHOUSE_LOG", "not ours: no table is called LOG");
    let overrides = environment.with_argument("--address", "host.address", "127.0.0.1:3");
    let config = Config::from_text("test.toml", text, &overrides).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(config.host.address.port(), 3, "the argument");
    assert_eq!(config.host.drain, Duration::from_secs(2), "the environment");
    assert_eq!(config.host.log, playhouse_config::checked::LogFormat::Json, "the file");
    assert_eq!(config.host.limits.header_timeout, Duration::from_secs(10), "the default");
    assert_eq!(config.host.limits.body_bytes, 4 << 20);
    assert_eq!(config.models[0].context, Some(512));
    assert_eq!(config.models[0].replicas, Replicas::Count(2));
    let keys: Vec<&str> = config.host.api_keys.iter().map(|key| key.expose()).collect();
    assert_eq!(keys, ["one", "two"]);
}

/// What keeps a house from strangers can be said in all three places, and paths in a file are relative to it.
#[test]
fn the_front_is_set_from_the_file_the_environment_and_arguments() {
    let path = folder("tests/good/keys.toml");
    let overrides = environment()
        .with_env("PLAYHOUSE_HOST_TLS_KEY", "/run/secrets/key.pem")
        .with_env("PLAYHOUSE_HOST_ALLOWED_HOSTS", "a.example, b.example")
        .with_env("PLAYHOUSE_HOST_PER_KEY_STREAMS", "3")
        .with_argument("--api-keys-file", "host.api_keys_file", "secrets/keys");
    let host = Config::open(Some(&path), &overrides).unwrap_or_else(|error| panic!("{error}")).host;
    let tls = host.tls.expect("both are given");
    assert_eq!((tls.certificate, tls.key), (folder("tests/good/cert.pem"), PathBuf::from("/run/secrets/key.pem")));
    assert_eq!(host.api_keys_file, Some(PathBuf::from("secrets/keys")), "an argument's path is the caller's");
    assert_eq!(host.allowed_hosts, ["a.example", "b.example"]);
    assert_eq!((host.per_key.streams, host.per_key.requests_per_minute), (Some(3), Some(600)));

    let open = "[host]\naddress = \"0.0.0.0:7070\"\n";
    assert!(refuse(open, &Overrides::none()).contains("neither keys nor a certificate"));
    let insecure = Overrides::none().with_argument("--insecure", "host.insecure", "true");
    assert!(Config::from_text("test.toml", open, &insecure).is_ok_and(|config| config.host.insecure));
    let by_argument = Overrides::none().with_argument("--address", "host.address", "192.0.2.1:80");
    assert!(refuse("", &by_argument).contains("argument --address:1:1"));
}

#[test]
fn a_bad_override_says_where_it_came_from() {
    let variable = Overrides::none().with_env("PLAYHOUSE_HOST_DRAIN", "30");
    assert_eq!(
        refuse("", &variable),
        "error: `30` has no unit: write one of d, h, m, s, ms, us, such as `30s`\n --> environment variable \
         PLAYHOUSE_HOST_DRAIN:1:1\n  |\n1 | 30\n  | ^^"
    );
    let unknown = Overrides::none().with_env("PLAYHOUSE_HOST_ADRESS", "127.0.0.1:1");
    assert!(refuse("", &unknown).contains("did you mean `PLAYHOUSE_HOST_ADDRESS`?"));
    let argument = Overrides::none().with_argument("--set", "host.adress", "127.0.0.1:1");
    assert!(refuse("", &argument).contains("did you mean `host.address`?"));
    let list = Overrides::none().with_argument("--devices", "defaults.devices", "[0, 0]");
    let message = refuse("", &list);
    assert!(message.contains("device 0 is there twice\n --> argument --devices:1:5\n"), "{message}");
}

#[test]
fn a_secret_from_the_environment_is_not_in_a_message() {
    let overrides = Overrides::none().with_env("KEY", "hunter two");
    let message = refuse("[host]\napi_keys = [\"${env:KEY}\"]\n", &overrides);
    assert!(message.contains("a key is not empty") && !message.contains("hunter"), "{message}");
    let message = refuse("", &Overrides::none().with_env("PLAYHOUSE_HOST_API_KEYS", "hunter two"));
    assert!(message.contains("1 | ****** ***") && !message.contains("hunter"), "{message}");
    let message = refuse("[host]\napi_keys = [\"hunter\", \"hunter\"]\n", &Overrides::none());
    assert!(message.contains("2 | api_keys = [\"******\", \"******\"]") && !message.contains("hunter"), "{message}");
}

#[test]
fn problems_are_reported_together() {
    let message = refuse("[host]\nadress = \"x\"\ndrain = \"5\"\n[[model]]\nname = \"a b\"\n", &Overrides::none());
    assert_eq!(message.matches("error: ").count(), 4, "{message}");
}

#[test]
fn the_schema_beside_the_code_is_current() {
    let path = folder("playhouse.schema.json");
    let schema = json_schema();
    if std::env::var_os("PLAYHOUSE_BLESS").is_some() {
        let text = serde_json::to_string_pretty(&schema).expect("a schema is JSON");
        fs::write(&path, text + "\n").expect("writable");
    }
    let text = fs::read_to_string(&path).expect("the schema is part of the crate");
    let stored: Value = serde_json::from_str(&text).expect("the schema is JSON");
    assert!(stored == schema, "run `PLAYHOUSE_BLESS=1 cargo test -p playhouse-config` and look at the difference");
}

/// Every key of the schema: the table it is in, its name, its default.
fn schema_keys() -> Vec<(String, String, Option<Value>)> {
    fn walk(root: &Value, node: &Value, path: &str, keys: &mut Vec<(String, String, Option<Value>)>) {
        let target = node.get("$ref").and_then(Value::as_str).map(|path| path.trim_start_matches('#'));
        let node = target.and_then(|path| root.pointer(path)).unwrap_or(node);
        let Some(properties) = node.get("properties").and_then(Value::as_object) else { return };
        for (name, child) in properties {
            let inner = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            let items = child.get("items").filter(|items| items.get("$ref").is_some());
            match items {
                Some(items) => walk(root, items, &format!("[{inner}]"), keys),
                None if child.get("$ref").is_some() && target_is_table(root, child) => walk(root, child, &inner, keys),
                None => keys.push((path.to_owned(), name.clone(), child.get("default").cloned())),
            }
        }
    }
    fn target_is_table(root: &Value, node: &Value) -> bool {
        let path = node.get("$ref").and_then(Value::as_str).unwrap_or_default().trim_start_matches('#');
        root.pointer(path).is_some_and(|target| target.get("properties").is_some())
    }
    let schema = json_schema();
    let mut keys = Vec::new();
    walk(&schema, &schema, "", &mut keys);
    keys
}

/// A file that spells every default out is the same configuration as one without those keys.
#[test]
fn the_defaults_in_the_schema_are_the_defaults() {
    let mut text = String::new();
    let mut table = String::new();
    let mut keys = schema_keys();
    keys.retain(|(table, _, default)| default.is_some() && !table.starts_with('['));
    keys.sort_by(|a, b| (&a.0, &a.1).cmp(&(&b.0, &b.1)));
    assert!(keys.len() >= 30, "{keys:?}");
    for (path, name, default) in keys {
        if path != table {
            text += &format!("[{path}]\n");
            table = path;
        }
        text += &format!("{name} = {}\n", default.expect("kept those with one"));
    }
    let config = check(&text);
    assert_eq!((config.host, config.supervision), (Host::default(), Supervision::default()), "{text}");
    let expected = Model {
        devices: Devices::Auto,
        name: "basho".into(),
        source: ModelSource::Embedded("basho".into()),
        replicas: Replicas::All,
        ..Model::default()
    };
    assert_eq!(config.models, [expected]);
}

/// The page has a heading per table and under it a row per key, with the default that the schema has.
#[test]
fn the_page_lists_every_key() {
    let path = folder("../docs/src/configuration.md");
    let page = fs::read_to_string(path).expect("the page exists");
    for (table, name, default) in schema_keys() {
        let heading = if table.is_empty() { "## The top of the file".into() } else { format!("## `[{table}]`") };
        let section = page.split(&format!("{heading}\n")).nth(1);
        let section = section.unwrap_or_else(|| panic!("no heading {heading}"));
        let section = section.split("\n## ").next().unwrap_or_default();
        let row = section.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("no row for `{name}` under {heading}"));
        if let Some(default) = default {
            assert!(
                row.contains(&format!("| `{default}` |")),
                "{heading}: the default of `{name}` is {default}: {row}"
            );
        }
    }
}
