//! A chat as a stream of chunks: the role first, then what each token adds, then how each choice ended.

use super::super::error::ApiError;
use super::super::sse::{self, Chunks};
use super::answer::{Usage, finish_reason, stop_reason};
use super::chat::Chat;
use super::choice::{ChatChoice, Delta};
use crate::client::Event;
use serde_json::{Value, json};
use std::io::Write;

/// See the module.
pub(super) struct ChatChunks {
    chat: Chat,
    choices: Vec<ChatChoice>,
    usage: Usage,
    include_usage: bool,
    /// Every chunk's beginning, up to its choices: written once.
    prefix: Vec<u8>,
    deltas: Vec<Delta>,
}

impl ChatChunks {
    pub(super) fn new(chat: Chat, choices: Vec<ChatChoice>, include_usage: bool) -> Self {
        let mut prefix = b"data: ".to_vec();
        sse::json(&mut prefix, &chat.head.json("chat.completion.chunk"));
        // The closing brace comes after the choices.
        prefix.pop();
        prefix.extend_from_slice(b",\"choices\":[");
        let usage = Usage { prompt: chat.n_prompt, ..Usage::default() };
        Self { chat, choices, usage, include_usage, prefix, deltas: Vec::new() }
    }

    fn tail(&self) -> &'static [u8] {
        if self.include_usage { b"],\"usage\":null}\n\n" } else { b"]}\n\n" }
    }

    /// One chunk with one choice.
    fn chunk(&self, out: &mut Vec<u8>, index: u32, delta: impl FnOnce(&mut Vec<u8>), logprobs: Option<Value>) {
        out.extend_from_slice(&self.prefix);
        // Writing into a vector does not fail.
        let _ = write!(out, "{{\"index\":{index},\"delta\":{{");
        delta(out);
        out.extend_from_slice(b"},\"logprobs\":");
        match logprobs {
            None => out.extend_from_slice(b"null"),
            Some(entry) => sse::json(out, &json!({ "content": [entry], "refusal": null })),
        }
        out.extend_from_slice(b",\"finish_reason\":null}");
        out.extend_from_slice(self.tail());
    }

    fn write_deltas(&mut self, out: &mut Vec<u8>, index: u32, mut logprobs: Option<Value>) {
        let deltas = std::mem::take(&mut self.deltas);
        for delta in &deltas {
            self.chunk(out, index, |out| delta.write(out), logprobs.take());
        }
        // A token without certain text has a log probability all the same.
        if let Some(entry) = logprobs {
            self.chunk(out, index, |out| out.extend_from_slice(b"\"content\":\"\""), Some(entry));
        }
        self.deltas = deltas;
        self.deltas.clear();
    }
}

impl Chunks for ChatChunks {
    fn begin(&mut self, out: &mut Vec<u8>) {
        for index in 0..self.choices.len() {
            let index = u32::try_from(index).unwrap_or(u32::MAX);
            self.chunk(out, index, |out| out.extend_from_slice(b"\"role\":\"assistant\",\"content\":\"\""), None);
        }
    }

    fn event(&mut self, event: &Event, out: &mut Vec<u8>) -> Result<(), ApiError> {
        match event {
            Event::Token(token) => {
                let mut deltas = std::mem::take(&mut self.deltas);
                self.choices[token.choice as usize].token(&token.text, &mut deltas);
                self.deltas = deltas;
                let logprobs = self.chat.texts.chat(token);
                self.write_deltas(out, token.choice, logprobs);
            }
            Event::End(end) => {
                let reason = finish_reason(&end.outcome)?;
                let choice = &mut self.choices[end.choice as usize];
                choice.finish(&end.text, &mut self.deltas);
                let reason = choice.finish_reason(reason);
                self.usage.reasoning += choice.reasoning_tokens;
                self.usage.add(end);
                self.write_deltas(out, end.choice, None);
                out.extend_from_slice(&self.prefix);
                let last = json!({
                    "index": end.choice,
                    "delta": {},
                    "logprobs": null,
                    "finish_reason": reason,
                    "stop_reason": stop_reason(&end.outcome),
                });
                sse::json(out, &last);
                out.extend_from_slice(self.tail());
            }
        }
        Ok(())
    }

    fn end(&mut self, out: &mut Vec<u8>) {
        if self.include_usage {
            let mut chunk = self.chat.head.json("chat.completion.chunk");
            chunk["choices"] = json!([]);
            chunk["usage"] = self.usage.json();
            sse::data(out, &chunk);
        }
    }
}
