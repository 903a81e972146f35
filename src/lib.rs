//! Playhouse: a supervised runtime for language models on multi-GPU boxes.
//!
//! One request goes down, one stream of events comes up. The modules in reading order:
//!
//! | module | what it is | may import |
//! |---|---|---|
//! | [`dtype`] | block formats of tensor data and their scalar decoders, the reference for every kernel | - |
//! | [`gguf`] | a checked reader and a writer of GGUF files | `dtype` |
//! | [`backend`] | what a device must be able to do, and the CPU that does it | `dtype`, `gguf` |
//! | [`models`] | architectures as data, one row in one table each | `dtype`, `gguf`, `backend` |
//! | [`engine`] | paged KV, scheduler, interpreter of model descriptions, sampler | all of the above, `actors` |
//! | [`text`] | tokenizers, detokenizer, chat templates, stop strings | `gguf` |
//! | [`basho`] | the embedded model, and the grammar, lexicon and scanner that its training text came from | - |
//! | [`source`] | a model's file by its name in a configuration: a path, or the embedded one | `gguf`, `basho` |
//! | [`synth`] | model files with random weights at the true shape | `dtype`, `gguf` |
//! | [`grammar`] | texts held to JSON, a schema, an expression: masks for the sampler | `engine`, `text` |
//! | [`client`] | what programs hold of a running house: models by name, requests, streams of text; every bound of a request | `text`, `source`, `models`, `actors` |
//! | [`worker`] | one replica's engine in a process or thread of its own, and the host's link to it | `engine` and below, `basho`, `actors` |
//! | [`host`] | the long-running process: admin socket, signals, service manager | everyone |
//! | [`http`] | the HTTP front: the OpenAI API, metrics, the dashboard, and what keeps them standing | `client`, `text`, `actors` |
//! | [`cli`] | the commands | everyone |
//!
//! `ARCHITECTURE.md` has the map, the invariants and the life of one request.

pub mod backend;
pub mod basho;
pub mod cli;
pub mod client;
pub mod dtype;
pub mod engine;
pub mod gguf;
pub mod grammar;
pub mod host;
pub mod http;
pub mod models;
pub mod source;
pub mod synth;
pub mod text;
pub mod worker;
