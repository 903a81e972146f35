//! The OpenAI API: models, chat completions, completions, responses, embeddings.
//!
//! A request's JSON becomes a [`crate::client::GenerateRequest`]; its bounds are checked there. Unknown fields are
//! accepted, because clients send more than we know; wrong types are refused, and so is what is known and not done.

mod request;
mod tools;
mod answer;
mod choice;
mod chat;
mod chat_stream;
mod completions;
mod embeddings;
mod models;
mod responses;

pub(super) use chat::{chat, messages};
pub(super) use completions::completions;
pub(super) use embeddings::embeddings;
pub(super) use models::{list, model};
pub(super) use responses::responses;
