//! The file as it is written: every key optional where it has a default, every value with its place, nothing judged yet.
//!
//! The doc comments of this file are the descriptions in the JSON Schema; `default` there is what `checked` fills in.

use crate::source::At;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

/// A Playhouse configuration file.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Playhouse configuration")]
pub(crate) struct RawConfig {
    /// Version of the file's format. There is one: 1.
    #[schemars(extend("default" = 1))]
    pub(crate) version: Option<At<u32>>,
    /// The host process: where it listens, who may speak to it, how much it takes on.
    #[serde(default)]
    pub(crate) host: RawHost,
    /// What every model has unless it says otherwise.
    #[serde(default)]
    pub(crate) defaults: RawDefaults,
    /// The models. With none, the embedded model is served on every GPU, or on the CPU where there is no GPU.
    #[serde(default)]
    pub(crate) model: Vec<At<RawModel>>,
    /// When and how often workers are restarted.
    #[serde(default)]
    pub(crate) supervision: RawSupervision,
    /// Devices that are not there.
    #[serde(default)]
    pub(crate) simulate: RawSimulate,
}

/// The host process.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "the table [host]")]
pub(crate) struct RawHost {
    /// Address and port of the HTTP server. An address that other machines can reach needs keys and a certificate, or
    /// `insecure`. Port 0 takes a free one.
    #[schemars(extend("default" = "127.0.0.1:7070"))]
    pub(crate) address: Option<At<String>>,
    /// Serve on an address that other machines can reach although there are no keys or no certificate.
    #[schemars(extend("default" = false))]
    pub(crate) insecure: Option<At<bool>>,
    /// Path of the local admin socket. Without it the host chooses one in the user's runtime directory.
    pub(crate) admin_socket: Option<At<String>>,
    /// Path of a Unix socket on which the HTTP server listens, too. Only its owner may open it; whoever can needs no key and
    /// may load and unload models.
    pub(crate) http_socket: Option<At<String>>,
    /// Keys of which a client must show one. With none, every local client may speak. Use `${env:NAME}`.
    #[schemars(extend("default" = []))]
    pub(crate) api_keys: Option<Vec<At<String>>>,
    /// File with more of them, one a line, each a key or `sha256:` and the key's hash in 64 hex digits. Relative to this
    /// file. It is read again when it changes.
    pub(crate) api_keys_file: Option<At<String>>,
    /// Keys that may also load and unload models. With none, only who comes by `http_socket` may.
    #[schemars(extend("default" = []))]
    pub(crate) admin_keys: Option<Vec<At<String>>>,
    /// File with more of them, as `api_keys_file`.
    pub(crate) admin_keys_file: Option<At<String>>,
    /// Certificate and key. Without them connections are plain.
    #[serde(default)]
    pub(crate) tls: RawTls,
    /// Names under which clients may reach the server, besides addresses and `localhost`. With none, every name will do
    /// where there are keys, and none but those where there are not.
    #[schemars(extend("default" = []))]
    pub(crate) allowed_hosts: Option<Vec<At<String>>>,
    /// Origins whose pages may use the API, such as `"https://chat.example"`; `"*"` is all of them. With none, no page but
    /// the dashboard may.
    #[schemars(extend("default" = []))]
    pub(crate) cors_origins: Option<Vec<At<String>>>,
    /// What each key may do. Admin keys may do without bound.
    #[serde(default)]
    pub(crate) per_key: RawPerKey,
    /// A comment is sent into a stream that has been silent for so long.
    #[schemars(extend("default" = "15s"))]
    pub(crate) keep_alive: Option<At<RawDuration>>,
    /// How often files with keys and certificates are looked at for changes. SIGHUP has them looked at at once.
    #[schemars(extend("default" = "5s"))]
    pub(crate) look_every: Option<At<RawDuration>>,
    /// Where traces are sent: an OTLP collector's address for HTTP, such as `"http://127.0.0.1:4318"`. Needs a program that
    /// was built with the feature `otlp`.
    pub(crate) otlp_endpoint: Option<At<String>>,
    /// How long open streams may finish after the host was told to stop.
    #[schemars(extend("default" = "30s"))]
    pub(crate) drain: Option<At<RawDuration>>,
    /// Format of the log on standard error.
    #[schemars(extend("default" = "text"))]
    pub(crate) log: Option<At<LogFormat>>,
    /// Whether prompts are logged, as the models read them. They may be anybody's secrets.
    #[schemars(extend("default" = false))]
    pub(crate) log_prompts: Option<At<bool>>,
    /// How much the host takes on.
    #[serde(default)]
    pub(crate) limits: RawLimits,
}

/// Certificate and key.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "the table [host.tls]")]
pub(crate) struct RawTls {
    /// The certificate chain, PEM, relative to this file. It is read again when it changes.
    pub(crate) certificate: Option<At<String>>,
    /// The private key, PEM.
    pub(crate) key: Option<At<String>>,
}

/// Bounds of one key.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "the table [host.per_key]")]
pub(crate) struct RawPerKey {
    /// Requests open at a time. Without it there is no bound.
    pub(crate) streams: Option<At<u32>>,
    /// Requests begun in a minute.
    pub(crate) requests_per_minute: Option<At<u32>>,
    /// Tokens of prompts and answers in a minute. A request that is under way is finished; the next one waits.
    pub(crate) tokens_per_minute: Option<At<u64>>,
}

/// Bounds of the host.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "the table [host.limits]")]
pub(crate) struct RawLimits {
    /// Connections open at a time.
    #[schemars(extend("default" = 1024))]
    pub(crate) connections: Option<At<u32>>,
    /// Connections open at a time from one address (of IPv6: from one /64). A proxy is one address.
    #[schemars(extend("default" = 512))]
    pub(crate) connections_per_ip: Option<At<u32>>,
    /// Requests open at a time on one HTTP/2 connection.
    #[schemars(extend("default" = 256))]
    pub(crate) http2_streams: Option<At<u32>>,
    /// Largest request body.
    #[schemars(extend("default" = "2MiB"))]
    pub(crate) body: Option<At<RawSize>>,
    /// How long a client may take for its request's headers.
    #[schemars(extend("default" = "10s"))]
    pub(crate) header_timeout: Option<At<RawDuration>>,
    /// How long a client may take for its request's body.
    #[schemars(extend("default" = "30s"))]
    pub(crate) body_timeout: Option<At<RawDuration>>,
    /// How long a connection may be idle.
    #[schemars(extend("default" = "75s"))]
    pub(crate) idle_timeout: Option<At<RawDuration>>,
    /// How long a request may take in all, where the client does not ask for less.
    #[schemars(extend("default" = "10m"))]
    pub(crate) request_timeout: Option<At<RawDuration>>,
    /// Requests of one model that may be accepted and unfinished.
    #[schemars(extend("default" = 256))]
    pub(crate) queued_requests: Option<At<u32>>,
    /// Prompt and output tokens that the accepted, unfinished requests of one model may still need.
    #[schemars(extend("default" = 1_048_576))]
    pub(crate) queued_tokens: Option<At<u64>>,
    /// Events a stream may hold for a client that reads slowly. A full stream pauses nobody else.
    #[schemars(extend("default" = 64))]
    pub(crate) stream_events: Option<At<u32>>,
    /// How long a stream may stay full before its request is cancelled.
    #[schemars(extend("default" = "30s"))]
    pub(crate) client_timeout: Option<At<RawDuration>>,
}

/// Declares a struct with the keys that a model and `[defaults]` share, after its own.
macro_rules! with_settings {
    ($(#[$attr:meta])* struct $name:ident { $($(#[$own_attr:meta])* $own:ident: $own_type:ty,)* }) => {
        $(#[$attr])*
        #[derive(Debug, Default, serde::Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, expecting = "a table of a model's settings")]
        pub(crate) struct $name {
            $($(#[$own_attr])* pub(crate) $own: $own_type,)*
            /// Where the model runs: `"auto"` (the GPUs with the best room), `"cpu"`, `["auto", "cpu"]` (GPUs if there
            /// are any, else the CPU), or a list of GPUs, each a UUID (`"GPU-..."`, a prefix will do), a PCI bus id
            /// (`"0000:3b:00.0"`) or an index in the order of PCI bus ids.
            #[schemars(extend("default" = "auto"))]
            pub(crate) devices: Option<At<RawDevices>>,
            /// How many copies: a number, or `"all"` for one on every device that `devices` allows. Without it, a list
            /// of devices means one on each, and everything else means one.
            pub(crate) replicas: Option<At<RawReplicas>>,
            /// Most tokens of one sequence, prompt and output together. Without it, what the model was trained for.
            pub(crate) context: Option<At<u32>>,
            /// Sequences computed together.
            #[schemars(extend("default" = 16))]
            pub(crate) max_sequences: Option<At<u32>>,
            /// Tokens computed in one step, prompt chunks included.
            #[schemars(extend("default" = 512))]
            pub(crate) max_batch_tokens: Option<At<u32>>,
            /// Memory for the KV cache: a size, or `"auto"`: what `max_sequences` full contexts need, or what the device
            /// has left if that is less.
            #[schemars(extend("default" = "auto"))]
            pub(crate) kv_budget: Option<At<RawBudget>>,
            /// Most memory of a device that a replica takes, everything included: a size, or a share of the device such as
            /// `"90%"`. Without it, what is free.
            pub(crate) memory_limit: Option<At<RawLimit>>,
            /// Number format of the KV cache.
            #[schemars(extend("default" = "f16"))]
            pub(crate) kv_type: Option<At<KvType>>,
            /// Whether the engine has a process of its own (`"process"`) or a thread of the host (`"thread"`).
            /// `"auto"` is a process on a GPU and a thread on the CPU.
            #[schemars(extend("default" = "auto"))]
            pub(crate) isolation: Option<At<Isolation>>,
            /// Models with a higher priority are placed first.
            #[schemars(extend("default" = 0))]
            pub(crate) priority: Option<At<i32>>,
            /// Whether the host is ready only when this model is.
            #[schemars(extend("default" = true))]
            pub(crate) required: Option<At<bool>>,
        }
    };
}

with_settings! {
    /// What every model has unless it says otherwise.
    struct RawDefaults {}
}

with_settings! {
    /// One model.
    struct RawModel {
        /// What clients call it: letters, digits and `-_.:/@+`.
        name: Option<At<String>>,
        /// Other names for it.
        #[schemars(extend("default" = []))]
        aliases: Option<Vec<At<String>>>,
        /// The GGUF file (of a split file, the first part), relative to this file, or `embedded:basho`.
        path: Option<At<String>>,
    }
}

/// Restarts.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "the table [supervision]")]
pub(crate) struct RawSupervision {
    /// Which workers of a device are restarted when one of them dies.
    #[schemars(extend("default" = "one_for_one"))]
    pub(crate) strategy: Option<At<Strategy>>,
    /// So many failures of a device within `window` quarantine it: the last of them is not followed by a restart.
    #[schemars(extend("default" = 4))]
    pub(crate) max_restarts: Option<At<u32>>,
    /// The time over which failures are counted.
    #[schemars(extend("default" = "10m"))]
    pub(crate) window: Option<At<RawDuration>>,
    /// Which ends are followed by a restart: all (`"permanent"`), failures (`"transient"`), none (`"temporary"`).
    #[schemars(extend("default" = "permanent"))]
    pub(crate) restart: Option<At<Restart>>,
    /// How long a worker may take to end when it is asked to, before it is killed.
    #[schemars(extend("default" = "10s"))]
    pub(crate) shutdown: Option<At<RawDuration>>,
    /// How long to wait before a restart.
    #[serde(default)]
    pub(crate) backoff: RawBackoff,
    /// A device without a failure for so long starts with a clean sheet.
    #[schemars(extend("default" = "10m"))]
    pub(crate) reset_after: Option<At<RawDuration>>,
    /// A step of an engine that takes longer is a hang: the worker is killed.
    #[schemars(extend("default" = "30s"))]
    pub(crate) step_timeout: Option<At<RawDuration>>,
    /// A load that takes longer is a hang.
    #[schemars(extend("default" = "10m"))]
    pub(crate) load_timeout: Option<At<RawDuration>>,
    /// How often a worker says that it is alive.
    #[schemars(extend("default" = "1s"))]
    pub(crate) heartbeat: Option<At<RawDuration>>,
    /// A request in flight at so many deaths of a worker is refused as `poison_request`.
    #[schemars(extend("default" = 2))]
    pub(crate) poison_deaths: Option<At<u32>>,
}

/// Waiting before a restart: nothing before the first, `min` before the second, then twice as long each time.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a table such as { min = \"1s\", max = \"60s\", jitter = 0.2 }")]
pub(crate) struct RawBackoff {
    /// Before the second restart.
    #[schemars(extend("default" = "1s"))]
    pub(crate) min: Option<At<RawDuration>>,
    /// At most.
    #[schemars(extend("default" = "60s"))]
    pub(crate) max: Option<At<RawDuration>>,
    /// Each wait is longer or shorter by up to this share of itself, at random; 0 to 1.
    #[schemars(extend("default" = 0.2))]
    pub(crate) jitter: Option<At<f64>>,
}

/// Devices that are not there.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "the table [simulate]")]
pub(crate) struct RawSimulate {
    /// The simulated devices. With any, the real GPUs are not looked at; models run on the CPU and account for memory
    /// as if they were on these.
    #[serde(default)]
    pub(crate) device: Vec<At<RawSimulatedDevice>>,
}

/// A simulated device.
#[derive(Debug, Default, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a table [[simulate.device]]")]
pub(crate) struct RawSimulatedDevice {
    /// What the card is called.
    pub(crate) name: Option<At<String>>,
    /// Its identity: `SIM-` and letters, digits and dashes.
    pub(crate) uuid: Option<At<String>>,
    /// Its memory.
    pub(crate) vram: Option<At<RawSize>>,
    /// Memory that somebody else has taken.
    #[schemars(extend("default" = "0B"))]
    pub(crate) used: Option<At<RawSize>>,
}

/// Declares an enumeration of words.
macro_rules! words {
    ($(#[$attr:meta])* enum $name:ident { $($(#[$variant_attr:meta])* $variant:ident),* $(,)? }) => {
        $(#[$attr])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, JsonSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$variant_attr])* $variant),* }
    };
}

words! {
    /// Format of the log.
    enum LogFormat {
        /// Lines for people.
        #[default]
        Text,
        /// One JSON object per line.
        Json,
    }
}
words! {
    /// Number format of a KV cache.
    enum KvType {
        /// 32-bit floats.
        F32,
        /// 16-bit floats.
        #[default]
        F16,
        /// 8-bit blocks of 32 with one scale.
        Q8_0,
    }
}
words! {
    /// What an engine shares with the host.
    enum Isolation {
        /// A process on a GPU, a thread on the CPU.
        #[default]
        Auto,
        /// Nothing: it is a process.
        Process,
        /// Everything: it is a thread.
        Thread,
    }
}
words! {
    /// Whose end restarts whom, among the workers of one device.
    enum Strategy {
        /// The one that died.
        #[default]
        OneForOne,
        /// All of them.
        OneForAll,
        /// The one that died and those started after it.
        RestForOne,
    }
}
words! {
    /// Which ends of a worker are followed by a restart.
    enum Restart {
        /// Every end that was not asked for.
        #[default]
        Permanent,
        /// Only failures: an exit with status 0 is final.
        Transient,
        /// None.
        Temporary,
    }
}

/// Declares a text with a grammar of its own: what serde expects, and its schema.
macro_rules! text {
    ($(#[$attr:meta])* $name:ident, $expecting:literal, $pattern:literal) => {
        $(#[$attr])*
        #[derive(Debug, Clone)]
        pub(crate) struct $name(pub(crate) String);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;
                impl Visitor<'_> for Text {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        Ok($name(text.to_owned()))
                    }
                }
                deserializer.deserialize_any(Text)
            }
        }

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    };
}

text! {
    /// A size with its unit.
    RawSize, "a size with its unit, such as \"8GiB\"",
    r"^\s*[0-9][0-9_.]*\s*([kKmMgGtT]([iI])?)?[bB]\s*$|\$\{env:"
}
text! {
    /// A duration with its unit.
    RawDuration, "a duration with its unit, such as \"30s\"",
    r"^\s*([0-9][0-9_.]*\s*(d|h|m|s|ms|us)\s*)+$|\$\{env:"
}
text! {
    /// `auto` or a size with its unit.
    RawBudget, "\"auto\" or a size with its unit, such as \"8GiB\"",
    r"^auto$|^\s*[0-9][0-9_.]*\s*([kKmMgGtT]([iI])?)?[bB]\s*$|\$\{env:"
}

text! {
    /// A size with its unit, or a share of a device.
    RawLimit, "a size with its unit, such as \"24GB\", or a share of the device, such as \"90%\"",
    r"^\s*[0-9][0-9_.]*\s*(([kKmMgGtT]([iI])?)?[bB]|%)\s*$|\$\{env:"
}

/// A number of copies, or all.
#[derive(Debug, Clone)]
pub(crate) enum RawReplicas {
    Count(i64),
    Word(String),
}

impl<'de> Deserialize<'de> for RawReplicas {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Replicas;
        impl Visitor<'_> for Replicas {
            type Value = RawReplicas;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of replicas or \"all\"")
            }
            fn visit_i64<E: de::Error>(self, count: i64) -> Result<RawReplicas, E> {
                Ok(RawReplicas::Count(count))
            }
            fn visit_u64<E: de::Error>(self, count: u64) -> Result<RawReplicas, E> {
                Ok(RawReplicas::Count(i64::try_from(count).unwrap_or(i64::MAX)))
            }
            fn visit_str<E: de::Error>(self, word: &str) -> Result<RawReplicas, E> {
                Ok(RawReplicas::Word(word.to_owned()))
            }
        }
        deserializer.deserialize_any(Replicas)
    }
}

impl JsonSchema for RawReplicas {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Replicas".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "oneOf": [{ "type": "integer", "minimum": 1 }, { "const": "all" }] })
    }
}

/// One device: a text or an index.
#[derive(Debug, Clone)]
pub(crate) enum RawDevice {
    Index(i64),
    Text(String),
}

/// One device or a list.
#[derive(Debug, Clone)]
pub(crate) enum RawDevices {
    One(RawDevice),
    List(Vec<At<RawDevice>>),
}

impl<'de> Deserialize<'de> for RawDevice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Device;
        impl Visitor<'_> for Device {
            type Value = RawDevice;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a device: \"auto\", \"cpu\", a UUID, a PCI bus id or an index")
            }
            fn visit_i64<E: de::Error>(self, index: i64) -> Result<RawDevice, E> {
                Ok(RawDevice::Index(index))
            }
            fn visit_u64<E: de::Error>(self, index: u64) -> Result<RawDevice, E> {
                Ok(RawDevice::Index(i64::try_from(index).unwrap_or(i64::MAX)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<RawDevice, E> {
                Ok(RawDevice::Text(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Device)
    }
}

impl<'de> Deserialize<'de> for RawDevices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Devices;
        impl<'de> Visitor<'de> for Devices {
            type Value = RawDevices;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"auto\", \"cpu\", or a list of devices (UUID, PCI bus id or index)")
            }
            fn visit_i64<E: de::Error>(self, index: i64) -> Result<RawDevices, E> {
                Ok(RawDevices::One(RawDevice::Index(index)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<RawDevices, E> {
                Ok(RawDevices::One(RawDevice::Text(text.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<RawDevices, A::Error> {
                let mut list = Vec::new();
                while let Some(device) = seq.next_element()? {
                    list.push(device);
                }
                Ok(RawDevices::List(list))
            }
        }
        deserializer.deserialize_any(Devices)
    }
}

impl JsonSchema for RawDevices {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Devices".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "oneOf": [
                { "type": "string" },
                { "type": "integer", "minimum": 0 },
                { "type": "array", "minItems": 1, "items": { "oneOf": [
                    { "type": "string" },
                    { "type": "integer", "minimum": 0 },
                ] } },
            ]
        })
    }
}
