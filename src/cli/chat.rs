//! `playhouse run --chat`: a conversation, line by line.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{Config, Editor};

use super::generate::{Generated, Job, generate};
use super::run::{encode_chat, summary};
use super::sampling::SamplingArgs;
use super::{CliError, Exit, note, print};
use crate::engine::{BoxedModel, LlmEngine};
use crate::text::{ChatTemplate, Message, Tokenizer};

const HELP: &str = "\
/clear   forget the conversation, keep the model
/help    show this
/exit    leave, as does Ctrl-D
Ctrl-C stops an answer. Arrow keys walk through what you wrote before.";

/// A conversation and what it needs.
pub(super) struct Chat {
    pub(super) engine: LlmEngine<BoxedModel>,
    pub(super) tokenizer: Tokenizer,
    pub(super) template: ChatTemplate,
    pub(super) sampling: SamplingArgs,
    pub(super) seed: u64,
    pub(super) interrupted: Arc<AtomicBool>,
}

type LineEditor = Editor<(), DefaultHistory>;

impl Chat {
    /// Reads lines and answers them until the user leaves.
    pub(super) fn run(mut self, system: Option<String>) -> Result<(), CliError> {
        let config = Config::builder().auto_add_history(true).max_history_size(1_000).map_err(line_error)?.build();
        let mut editor = LineEditor::with_config(config).map_err(line_error)?;
        let history_file = history_file();
        if let Some(file) = &history_file {
            // There is none the first time, and none that can be read is as good.
            let _ = editor.load_history(file);
        }
        let result = self.converse(&mut editor, system);
        if let Some(file) = &history_file {
            save_history(&mut editor, file);
        }
        result
    }

    fn converse(&mut self, editor: &mut LineEditor, system: Option<String>) -> Result<(), CliError> {
        let opening: Vec<Message> = system.map(|text| Message::new("system", text)).into_iter().collect();
        let mut messages = opening.clone();
        loop {
            let line = match editor.readline("> ") {
                Ok(line) => line,
                // Nothing is being answered: Ctrl-C throws the line away.
                Err(ReadlineError::Interrupted) => continue,
                Err(ReadlineError::Eof) => return Ok(()),
                Err(error) => return Err(line_error(error)),
            };
            match line.trim() {
                "" => {}
                "/exit" | "/quit" => return Ok(()),
                "/help" => note(HELP),
                "/clear" => messages.clone_from(&opening),
                _ => self.turn(&mut messages, line)?,
            }
        }
    }

    /// One question and its answer. A turn that is refused is forgotten, and the conversation goes on.
    fn turn(&mut self, messages: &mut Vec<Message>, line: String) -> Result<(), CliError> {
        messages.push(Message::new("user", line));
        match self.answer(messages) {
            Ok(generated) => {
                note(&summary(&generated, self.seed));
                messages.push(Message::new("assistant", generated.choices[0].text.clone()));
                Ok(())
            }
            Err(error) if error.exit() == Exit::Usage => {
                messages.pop();
                note(&error.chain());
                note("the last line is forgotten; /clear begins a new conversation, --ctx gives more room");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn answer(&mut self, messages: &[Message]) -> Result<Generated, CliError> {
        let ids = encode_chat(messages, &self.tokenizer, &self.template)?;
        let request = self.sampling.request(ids, self.seed, None, &self.tokenizer)?;
        let job = Job { request, n_choices: 1, stops: self.sampling.stop.clone() };
        self.interrupted.store(false, Ordering::Relaxed);
        let generated =
            generate(&mut self.engine, &self.tokenizer, &job, &self.interrupted, &mut |_, text| print(text));
        self.interrupted.store(false, Ordering::Relaxed);
        let generated = generated?;
        if !generated.choices[0].text.ends_with('\n') {
            print("\n")?;
        }
        Ok(generated)
    }
}

/// `$XDG_STATE_HOME/playhouse/chat_history`, by default under `~/.local/state`; none where there is no home.
fn history_file() -> Option<PathBuf> {
    let state = match std::env::var_os("XDG_STATE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").filter(|dir| !dir.is_empty())?).join(".local/state"),
    };
    Some(state.join("playhouse/chat_history"))
}

fn save_history(editor: &mut LineEditor, file: &std::path::Path) {
    let folder = file.parent().expect("the file is in a folder");
    let saved = std::fs::create_dir_all(folder).map_err(ReadlineError::from).and_then(|()| editor.save_history(file));
    if let Err(error) = saved {
        note(&format!("the history was not saved to {}: {error}", file.display()));
    }
}

fn line_error(error: ReadlineError) -> CliError {
    CliError::new(Exit::Software, error)
}
