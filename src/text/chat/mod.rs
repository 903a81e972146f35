//! Chat templates: conversations to prompts, as the model's makers wrote them.
//!
//! A template is a Jinja program in the file's metadata, and files come from anywhere. It runs with minijinja, which
//! has no objects to escape from, on a budget of steps and of output; and it renders byte for byte what Python's
//! jinja2 renders with the settings of transformers (`trim_blocks`, `lstrip_blocks`, loop controls, `tojson`
//! without escapes, `raise_exception`, `strftime_now`, methods of Python's strings and dicts).

mod guard;
mod message;
mod python;
mod strftime;

use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, context};
use serde_json::Map;

use crate::gguf::GgufFile;

use super::prompt::ChatPrompt;
use super::tokenizer::Tokenizer;
use guard::Guard;
pub use message::Message;

/// Steps that a rendering may take: some 50 ms of work. Real templates take about fifty per message.
pub const FUEL_MAX: u64 = 1_000_000;

/// Bytes that a rendering may write beyond four times the conversation's own.
pub const OUTPUT_BASE_BYTES: usize = 1 << 20;

/// Bytes of the largest template that is accepted; the largest real one has 30,000.
pub const SOURCE_MAX_BYTES: usize = 1 << 20;

/// Names that callers cannot set: the template gets them from us.
const RESERVED: &[&str] = &["messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"];

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The metadata is wrong.
    #[error(transparent)]
    Metadata(#[from] crate::gguf::GgufError),
    /// The template is not Jinja, or uses something that is not implemented.
    #[error("the chat template does not compile")]
    Syntax(#[source] Box<Error>),
    /// The template is absurdly large.
    #[error("the chat template has {bytes} bytes; at most {max} are accepted")]
    SourceTooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// The template refuses the conversation, in its own words.
    #[error("the chat template refuses the conversation: {message}")]
    Raised {
        /// What `raise_exception` was given.
        message: String,
    },
    /// The template took more than [`FUEL_MAX`] steps.
    #[error("the chat template took more than {fuel} steps; it may loop for ever")]
    OutOfFuel {
        /// The limit.
        fuel: u64,
    },
    /// The template wrote too much.
    #[error("the chat template wrote more than {max} bytes")]
    OutputTooLarge {
        /// The limit.
        max: usize,
    },
    /// The template failed on this conversation.
    #[error("the chat template failed")]
    Failed(#[source] Box<Error>),
    /// A message that no template could read.
    #[error("bad message: {why}")]
    BadMessage {
        /// What is wrong.
        why: String,
    },
    /// An argument that callers cannot set.
    #[error("the template argument {name:?} cannot be set")]
    ReservedArgument {
        /// Its name.
        name: String,
    },
}

/// What goes into a prompt besides the messages.
#[derive(Debug, Clone)]
pub struct RenderOptions {
    /// Ends the prompt with the beginning of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Tools that the model may call, as JSON schemas.
    pub tools: Option<Vec<serde_json::Value>>,
    /// Further variables of the template (`enable_thinking`, `reasoning_effort`).
    pub kwargs: Map<String, serde_json::Value>,
    /// What time it is, for templates that say so; written in UTC.
    pub now: SystemTime,
}

impl Default for RenderOptions {
    fn default() -> RenderOptions {
        RenderOptions { add_generation_prompt: true, tools: None, kwargs: Map::new(), now: SystemTime::now() }
    }
}

/// The texts of special tokens that templates write by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateTokens {
    /// `bos_token`.
    pub bos: Option<String>,
    /// `eos_token`.
    pub eos: Option<String>,
    /// `unk_token`.
    pub unknown: Option<String>,
    /// `pad_token`.
    pub padding: Option<String>,
}

impl TemplateTokens {
    /// The texts as a vocabulary has them.
    pub fn of(tokenizer: &Tokenizer) -> TemplateTokens {
        let text = |id: Option<u32>| id.map(|id| String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned());
        let ids = tokenizer.special_ids();
        TemplateTokens {
            bos: text(ids.bos),
            eos: text(ids.eos),
            unknown: text(ids.unknown),
            padding: text(ids.padding),
        }
    }
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    tokens: TemplateTokens,
    source: String,
}

/// The name of the one template in the environment.
const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Reads `tokenizer.chat_template`; `None` where the file has none, as base models.
    ///
    /// # Errors
    /// The key is no string, or the template does not compile.
    pub fn from_gguf(gguf: &GgufFile, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>, TemplateError> {
        let source = gguf.metadata().opt_str("tokenizer.chat_template")?;
        source.map(|source| ChatTemplate::new(source, TemplateTokens::of(tokenizer))).transpose()
    }

    /// Compiles a template.
    ///
    /// # Errors
    /// [`TemplateError::Syntax`], [`TemplateError::SourceTooLarge`].
    pub fn new(source: &str, tokens: TemplateTokens) -> Result<ChatTemplate, TemplateError> {
        if source.len() > SOURCE_MAX_BYTES {
            return Err(TemplateError::SourceTooLarge { bytes: source.len(), max: SOURCE_MAX_BYTES });
        }
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|e| TemplateError::Syntax(Box::new(e)))?;
        let mut env = Environment::new();
        env.set_syntax(syntax);
        env.set_fuel(Some(FUEL_MAX));
        env.set_debug(false);
        env.set_formatter(write_value);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_filter("tojson", python::tojson);
        env.add_filter("string", |value: &Value| python::python_str(value));
        env.add_test("iterable", is_iterable);
        env.add_test("sequence", is_iterable);
        env.add_function("raise_exception", raise_exception);
        env.add_template_owned(NAME, without_generation_tags(source))
            .map_err(|e| TemplateError::Syntax(Box::new(e)))?;
        Ok(ChatTemplate { env, tokens, source: source.to_owned() })
    }

    /// The template's source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation, byte for byte as transformers' `apply_chat_template(tokenize=False)` does.
    ///
    /// The text does not tell what users wrote from what the template wrote; to encode it, use
    /// [`ChatTemplate::prompt`].
    ///
    /// # Errors
    /// The template refuses or fails, or exceeds a limit.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, TemplateError> {
        self.render_inputs(&Inputs::new(messages, options)?, options)
    }

    /// Renders a conversation in which the text of control tokens in user-given parts (contents, names, arguments,
    /// tools) stays text.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn prompt(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<ChatPrompt, TemplateError> {
        let mut inputs = Inputs::new(messages, options)?;
        let clean = self.render_inputs(&inputs, options)?;
        let Some(guard) = Guard::new(tokenizer.control_texts(), &inputs.all()) else {
            return Ok(ChatPrompt::new(clean, Vec::new()));
        };
        if !inputs.mark(&guard) {
            return Ok(ChatPrompt::new(clean, Vec::new()));
        }
        // A template that looks for control tokens in user text may now take another branch. What it then writes is
        // safe to encode, so that is what counts.
        let (text, places) = guard.unmark(&self.render_inputs(&inputs, options)?);
        Ok(ChatPrompt::new(text, places))
    }

    fn render_inputs(&self, inputs: &Inputs, options: &RenderOptions) -> Result<String, TemplateError> {
        let now = options.now;
        let token = |text: &Option<String>| text.as_deref().map_or(Value::UNDEFINED, Value::from);
        let ctx = context! {
            messages => python::value_of(&inputs.messages),
            tools => python::value_of(&inputs.tools),
            documents => Value::from(()),
            add_generation_prompt => options.add_generation_prompt,
            bos_token => token(&self.tokens.bos),
            eos_token => token(&self.tokens.eos),
            unk_token => token(&self.tokens.unknown),
            pad_token => token(&self.tokens.padding),
            strftime_now => Value::from_function(move |format: &str| strftime::strftime(format, now)),
            ..python::value_of(&inputs.kwargs)
        };
        let max = OUTPUT_BASE_BYTES + 4 * inputs.n_bytes;
        let mut out = Limited { bytes: Vec::new(), max, is_full: false };
        let template = self.env.get_template(NAME).map_err(|e| TemplateError::Syntax(Box::new(e)))?;
        match template.render_captured_to(ctx, &mut out) {
            _ if out.is_full => Err(TemplateError::OutputTooLarge { max }),
            Err(error) => Err(typed(error)),
            Ok(_) => Ok(String::from_utf8_lossy(&out.bytes).into_owned()),
        }
    }
}

/// The parts of a rendering that come from users.
struct Inputs {
    messages: serde_json::Value,
    tools: serde_json::Value,
    kwargs: serde_json::Value,
    n_bytes: usize,
}

impl Inputs {
    fn new(messages: &[Message], options: &RenderOptions) -> Result<Inputs, TemplateError> {
        if let Some(name) = options.kwargs.keys().find(|name| RESERVED.contains(&name.as_str())) {
            return Err(TemplateError::ReservedArgument { name: name.clone() });
        }
        let messages = messages.iter().map(|m| serde_json::Value::Object(m.fields().clone())).collect();
        let tools = options.tools.clone().map_or(serde_json::Value::Null, serde_json::Value::Array);
        let kwargs = serde_json::Value::Object(options.kwargs.clone());
        let mut inputs = Inputs { messages, tools, kwargs, n_bytes: 0 };
        inputs.n_bytes = inputs.all().iter().map(|v| text_bytes(v)).sum();
        Ok(inputs)
    }

    fn all(&self) -> [&serde_json::Value; 3] {
        [&self.messages, &self.tools, &self.kwargs]
    }

    /// Marks everything but the roles, from which templates build control tokens.
    fn mark(&mut self, guard: &Guard) -> bool {
        let mut any = guard.mark(&mut self.tools) | guard.mark(&mut self.kwargs);
        for message in self.messages.as_array_mut().into_iter().flatten() {
            let role = message.get("role").cloned();
            any |= guard.mark(message);
            if let (Some(fields), Some(role)) = (message.as_object_mut(), role) {
                fields.insert("role".into(), role);
            }
        }
        any
    }
}

fn text_bytes(value: &serde_json::Value) -> usize {
    match value {
        serde_json::Value::String(text) => text.len(),
        serde_json::Value::Array(items) => items.iter().map(text_bytes).sum(),
        serde_json::Value::Object(map) => map.iter().map(|(k, v)| k.len() + text_bytes(v)).sum(),
        _ => 8,
    }
}

/// The error as callers tell them apart.
fn typed(error: Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if let Some(raised) = current.downcast_ref::<RaisedException>() {
            return TemplateError::Raised { message: raised.0.clone() };
        }
        if current.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel) {
            return TemplateError::OutOfFuel { fuel: FUEL_MAX };
        }
        cause = current.source();
    }
    TemplateError::Failed(Box::new(error))
}

/// What `raise_exception` was given, on its way out.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct RaisedException(String);

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(RaisedException(message.to_owned())))
}

/// In Python, strings and dicts can be iterated over and indexed too.
fn is_iterable(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
}

/// Writes a value as `str` in Python would.
fn write_value(out: &mut Output, _state: &mut State, value: &Value) -> Result<(), Error> {
    let written = match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python::python_str(value)),
    };
    written.map_err(Error::from)
}

/// Collects output up to a limit.
struct Limited {
    bytes: Vec<u8>,
    max: usize,
    is_full: bool,
}

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.max {
            self.is_full = true;
            return Err(std::io::Error::other("the output is too large"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// transformers has a `{% generation %}` block, which marks what the assistant said and renders as nothing. It is
/// replaced by a condition that holds, which keeps the white space control of its tags.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let name = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::{Duration, UNIX_EPOCH};

    fn options() -> RenderOptions {
        let now = UNIX_EPOCH + Duration::from_secs(1_795_264_496);
        RenderOptions { now, ..RenderOptions::default() }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, TemplateError> {
        ChatTemplate::new(source, TemplateTokens::default())?.render(messages, &options())
    }

    fn says(source: &str, expected: &str) {
        assert_eq!(render(source, &[Message::new("user", "hi")]).unwrap(), expected, "{source}");
    }

    #[test]
    fn what_python_would_write() {
        says(
            "{{ none }} {{ true }} {{ 1.0 }} {{ 1e20 }} {{ ['a', 1] }} {{ nothing }}|",
            "None True 1.0 1e+20 ['a', 1] |",
        );
        says("{{ messages }}", "[{'role': 'user', 'content': 'hi'}]");
        says("{{ {'b': [1, 2.5], 'a': 'é<>&\\n'} | tojson }}", r#"{"b": [1, 2.5], "a": "é<>&\n"}"#);
        says("{{ {'b': [], 'a': {'x': 1}} | tojson(indent=2) }}", "{\n  \"b\": [],\n  \"a\": {\n    \"x\": 1\n  }\n}");
        says(
            "{{ {'b': 1, 'a': 'é🚀'} | tojson(ensure_ascii=true, sort_keys=true) }}",
            r#"{"a": "\u00e9\ud83d\ude80", "b": 1}"#,
        );
        says("{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}", r#"[1,{"a":2}]"#);
        says("{{ strftime_now('%d %b %Y') }}", "21 Nov 2026");
        says("{{ 'x' is iterable }} {{ {} is sequence }} {{ 1 is iterable }}", "True True False");
        says(
            "{{ ' a '.strip() ~ 'abc'.startswith('ab') }}{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
            "aTruea1",
        );
    }

    #[test]
    fn blocks_are_trimmed_and_loops_controlled() {
        says("  {% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb");
        says("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13");
        says("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1");
        says("a\n{%- generation -%}\n b {% endgeneration %}\nc", "ab c");
    }

    #[test]
    fn a_template_can_refuse() {
        let error = render("{{ raise_exception('no system message') }}", &[]).unwrap_err();
        assert!(matches!(&error, TemplateError::Raised { message } if message == "no system message"), "{error:?}");
        let nested =
            "{% macro m() %}{% for i in [1] %}{{ raise_exception('in a macro') }}{% endfor %}{% endmacro %}{{ m() }}";
        assert!(matches!(render(nested, &[]).unwrap_err(), TemplateError::Raised { .. }));
    }

    #[test]
    fn a_template_cannot_loop_for_ever() {
        for source in [
            "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
            "{% for a in range(90000) %}{% for b in range(90000) %}{% set x = a * b %}{% endfor %}{% endfor %}",
            "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        ] {
            let error = render(source, &[]).unwrap_err();
            assert!(matches!(error, TemplateError::OutOfFuel { .. } | TemplateError::Failed(_)), "{error:?}");
        }
    }

    #[test]
    fn output_is_limited() {
        let error = render("{% for a in range(50000) %}{{ 'x' * 100 }}{% endfor %}", &[]).unwrap_err();
        assert!(matches!(error, TemplateError::OutputTooLarge { .. }), "{error:?}");
        // What users wrote may come back a few times over.
        let long = Message::new("user", "y".repeat(3 << 20));
        assert_eq!(render("{{ messages[0].content }}{{ messages[0].content }}", &[long]).unwrap().len(), 6 << 20);
    }

    #[test]
    fn bad_templates_and_arguments_are_typed() {
        assert!(matches!(render("{% if %}", &[]).unwrap_err(), TemplateError::Syntax(_)));
        assert!(matches!(render("{{ messages[7].x.y }}", &[]).unwrap_err(), TemplateError::Failed(_)));
        let too_large = ChatTemplate::new(&" ".repeat(SOURCE_MAX_BYTES + 1), TemplateTokens::default());
        assert!(matches!(too_large.unwrap_err(), TemplateError::SourceTooLarge { .. }));
        let template = ChatTemplate::new("{{ x }}", TemplateTokens::default()).unwrap();
        let with =
            |name: &str| RenderOptions { kwargs: [(name.to_owned(), json!("v"))].into_iter().collect(), ..options() };
        assert_eq!(template.render(&[], &with("x")).unwrap(), "v");
        assert!(matches!(template.render(&[], &with("tools")).unwrap_err(), TemplateError::ReservedArgument { .. }));
    }
}
