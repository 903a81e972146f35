//! `playhouse run [PROMPT]`: text from a model, streamed to stdout.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use playhouse_actors::engine::{FinishReason, TokenLogprobs};
use serde_json::json;
use signal_hook::consts::SIGINT;

use super::generate::{Choice, Generated, Job, generate};
use super::load::{LoadedModel, ModelArgs, limits_for};
use super::sampling::SamplingArgs;
use super::{CliError, Exit, RunCommand, chat, note, print, print_json};
use crate::engine::{EngineOptions, LlmEngine};
use crate::text::{ChatTemplate, EncodeOptions, Message, RenderOptions, Tokenizer};

/// The arguments of `run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The prompt; `-` reads it from stdin
    #[arg(value_name = "PROMPT")]
    prompt: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Hold a conversation: a prompt per line, with history; Ctrl-C stops an answer, Ctrl-D leaves
    #[arg(long, conflicts_with_all = ["prompt", "json", "n", "raw", "logprobs"])]
    chat: bool,
    /// Instructions that come before the prompt, if the model has a chat template that takes them
    #[arg(long, visible_alias = "system-prompt", value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Continue the prompt as it stands, without the model's chat template
    #[arg(long)]
    raw: bool,
    /// Show the log probability of each token and of the N most likely ones
    #[arg(long, value_name = "N")]
    logprobs: Option<u32>,
    /// How many texts to generate, each with random numbers of its own
    #[arg(long, visible_alias = "choices", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=128))]
    n: u32,
    /// Print one JSON document when done, instead of text as it comes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl RunCommand for Args {
    fn run(self) -> Result<(), CliError> {
        if self.chat {
            return self.converse();
        }
        let prompt = self.read_prompt()?;
        let loaded = self.model.load(|n_ctx, kv| limits_for(n_ctx, self.n as usize, kv))?;
        let LoadedModel { tokenizer, template, runner, load_time, .. } = loaded;
        let seed = self.sampling.seed();
        let ids = self.encode(&prompt, &tokenizer, template.as_ref())?;
        let request = self.sampling.request(ids, seed, self.logprobs, &tokenizer)?;
        let job = Job { request, n_choices: self.n, stops: self.sampling.stop.clone() };
        let mut engine = LlmEngine::new(runner, EngineOptions::default());
        let interrupted = stop_on_interrupt()?;

        let mut printer = Printer { is_silent: self.json, ..Printer::default() };
        let generated =
            generate(&mut engine, &tokenizer, &job, &interrupted, &mut |choice, text| printer.push(choice, text))?;
        if self.json {
            print_json(&document(&generated, &tokenizer, seed, load_time.as_secs_f64()))?;
        } else {
            printer.finish(generated.choices.len())?;
            if self.logprobs.is_some() {
                generated.choices.iter().for_each(|choice| note_logprobs(choice, &tokenizer));
            }
        }
        note(&summary(&generated, seed));
        Ok(())
    }
}

impl Args {
    fn read_prompt(&self) -> Result<String, CliError> {
        match self.prompt.as_slice() {
            [] => Err(CliError::usage("no prompt; expected text, `-` to read it from stdin, or --chat")),
            [dash] if dash == "-" => {
                let mut text = String::new();
                let read = std::io::stdin().lock().read_to_string(&mut text);
                read.map_err(|source| CliError::io("stdin".as_ref(), source))?;
                Ok(text)
            }
            words => Ok(words.join(" ")),
        }
    }

    fn encode(
        &self,
        prompt: &str,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
    ) -> Result<Vec<u32>, CliError> {
        let ids = match template.filter(|_| !self.raw) {
            Some(template) => {
                let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
                let messages: Vec<Message> = system.chain([Message::new("user", prompt)]).collect();
                encode_chat(&messages, tokenizer, template)?
            }
            None if self.system.is_some() => {
                return Err(CliError::usage("--system needs a chat template; this model has none"));
            }
            None => tokenizer.encode(prompt, EncodeOptions::PROMPT)?,
        };
        if ids.is_empty() {
            return Err(CliError::usage("the prompt is empty, and the model has no token that begins a text"));
        }
        Ok(ids)
    }

    fn converse(self) -> Result<(), CliError> {
        let loaded = self.model.load(|n_ctx, kv| limits_for(n_ctx, 1, kv))?;
        let Some(template) = loaded.template else {
            return Err(CliError::usage(format!("--chat needs a chat template; {} has none", loaded.file.label())));
        };
        let engine = LlmEngine::new(loaded.runner, EngineOptions::default());
        let interrupted = stop_on_interrupt()?;
        let seed = self.sampling.seed();
        chat::Chat { engine, tokenizer: loaded.tokenizer, template, sampling: self.sampling, seed, interrupted }
            .run(self.system)
    }
}

/// The ids of a conversation that the assistant is to continue.
pub(super) fn encode_chat(
    messages: &[Message],
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> Result<Vec<u32>, CliError> {
    let prompt = template
        .prompt(tokenizer, messages, &RenderOptions::default())
        .map_err(|error| CliError::new(Exit::Usage, error))?;
    Ok(tokenizer.encode_prompt(&prompt)?)
}

/// A flag that the first Ctrl-C sets. A second one before the flag is cleared ends the program at once.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>, CliError> {
    const KILLED_BY_SIGINT: i32 = 130;
    let flag = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register_conditional_shutdown(SIGINT, KILLED_BY_SIGINT, Arc::clone(&flag))
        .and_then(|_| signal_hook::flag::register(SIGINT, Arc::clone(&flag)))
        .map_err(|error| CliError::new(Exit::Software, error))?;
    Ok(flag)
}

/// Streams the first choice that has not ended and keeps the text of the others until it is their turn.
#[derive(Debug, Default)]
struct Printer {
    is_silent: bool,
    /// Text of choices after the first.
    later: Vec<String>,
    ends_line: bool,
}

impl Printer {
    fn push(&mut self, choice: usize, text: &str) -> Result<(), CliError> {
        if self.is_silent {
            return Ok(());
        }
        if choice == 0 {
            self.ends_line = text.ends_with('\n');
            return print(text);
        }
        if self.later.len() < choice {
            self.later.resize(choice, String::new());
        }
        self.later[choice - 1].push_str(text);
        Ok(())
    }

    fn finish(&mut self, n_choices: usize) -> Result<(), CliError> {
        self.end_line()?;
        self.later.resize(n_choices - 1, String::new());
        for text in std::mem::take(&mut self.later) {
            print("\n---\n\n")?;
            self.ends_line = text.ends_with('\n');
            print(&text)?;
            self.end_line()?;
        }
        Ok(())
    }

    fn end_line(&self) -> Result<(), CliError> {
        if self.ends_line { Ok(()) } else { print("\n") }
    }
}

/// The one line on stderr.
pub(super) fn summary(generated: &Generated, seed: u64) -> String {
    let plural = |n: usize| if n == 1 { "" } else { "s" };
    let n_tokens = generated.n_tokens();
    let total = generated.prefill_time + generated.decode_time;
    let speed = generated.decode_speed().map_or(String::new(), |speed| format!(", {speed:.1} tokens/s"));
    let reasons: Vec<&str> = generated.choices.iter().map(|choice| reason_name(choice.reason)).collect();
    format!(
        "[{n_tokens} token{} in {:.2} s{speed}; prompt {} token{} in {:.0} ms; seed {seed}; {}]",
        plural(n_tokens),
        total.as_secs_f64(),
        generated.n_prompt,
        plural(generated.n_prompt),
        generated.prefill_time.as_secs_f64() * 1e3,
        reasons.join(", "),
    )
}

fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
        FinishReason::Deadline => "deadline",
    }
}

fn note_logprobs(choice: &Choice, tokenizer: &Tokenizer) {
    let name = |token: u32| format!("{:?}", String::from_utf8_lossy(tokenizer.token_bytes(token)));
    for (&token, logprobs) in choice.tokens.iter().zip(&choice.logprobs) {
        let top: Vec<String> =
            logprobs.top.iter().map(|top| format!("{} {:.4}", name(top.token), top.logprob)).collect();
        note(&format!("{} {:.4} | {}", name(token), logprobs.chosen, top.join(", ")));
    }
}

fn document(generated: &Generated, tokenizer: &Tokenizer, seed: u64, load_s: f64) -> serde_json::Value {
    let choices: Vec<_> = generated.choices.iter().map(|choice| choice_document(choice, tokenizer)).collect();
    let mut document = choices[0].clone();
    let prefill_s = generated.prefill_time.as_secs_f64();
    document["usage"] = json!({
        "prompt_tokens": generated.n_prompt,
        "cached_tokens": generated.choices[0].n_cached(),
        "completion_tokens": generated.n_tokens(),
    });
    document["timings"] = json!({
        "load_ms": load_s * 1e3,
        "prefill_ms": prefill_s * 1e3,
        "decode_ms": generated.decode_time.as_secs_f64() * 1e3,
        "prefill_tokens_per_s": generated.n_prompt as f64 / prefill_s.max(1e-9),
        "decode_tokens_per_s": generated.decode_speed(),
    });
    document["seed"] = json!(seed);
    if choices.len() > 1 {
        document["choices"] = choices.into();
    }
    document
}

fn choice_document(choice: &Choice, tokenizer: &Tokenizer) -> serde_json::Value {
    let mut document = json!({
        "text": choice.text,
        "tokens": choice.tokens,
        "finish_reason": reason_name(choice.reason),
    });
    if !choice.logprobs.is_empty() {
        let tokens = choice.tokens.iter().zip(&choice.logprobs);
        document["logprobs"] = tokens.map(|(&token, logprobs)| logprobs_document(token, logprobs, tokenizer)).collect();
    }
    document
}

fn logprobs_document(token: u32, logprobs: &TokenLogprobs, tokenizer: &Tokenizer) -> serde_json::Value {
    let one = |token: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token);
        json!({"token": token, "text": String::from_utf8_lossy(bytes), "bytes": bytes, "logprob": logprob})
    };
    let mut document = one(token, logprobs.chosen);
    document["top"] = logprobs.top.iter().map(|top| one(top.token, top.logprob)).collect();
    document
}
