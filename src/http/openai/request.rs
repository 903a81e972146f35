//! What clients ask for, as the OpenAI API and vLLM's extras write it.

use super::super::bounded::{self, Document, Object, Tree, Trees};
use super::super::error::ApiError;
use crate::client::{GenerateRequest, Prompt, limits};
use playhouse_actors::engine::Constraint;
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// The fields that every generating endpoint has, and fields of its own. (`serde(flatten)` would lose the path of a
/// wrong field.)
macro_rules! with_sampling {
    ($(#[$doc:meta])* $name:ident { $($(#[$attr:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, serde::Deserialize)]
        pub(in crate::http) struct $name {
            $($(#[$attr])* pub(super) $field: $type,)*
            pub(super) model: String,
            pub(super) n: Option<u32>,
            pub(super) stream: Option<bool>,
            pub(super) stream_options: Option<$crate::http::openai::request::StreamOptions>,
            seed: Option<$crate::http::openai::request::Seed>,
            temperature: Option<f32>,
            top_p: Option<f32>,
            min_p: Option<f32>,
            top_k: Option<i64>,
            #[serde(alias = "repeat_penalty")]
            repetition_penalty: Option<f32>,
            presence_penalty: Option<f32>,
            frequency_penalty: Option<f32>,
            logit_bias: Option<$crate::http::openai::request::LogitBias>,
            stop: Option<$crate::http::openai::request::Stop>,
            stop_token_ids: Option<$crate::http::openai::request::StopIds>,
            ignore_eos: Option<bool>,
            min_tokens: Option<u32>,
            max_tokens: Option<u32>,
            max_completion_tokens: Option<u32>,
            skip_special_tokens: Option<bool>,
            priority: Option<i32>,
            best_of: Option<u32>,
            response_format: Option<$crate::http::openai::request::ResponseFormat>,
            guided_json: Option<$crate::http::bounded::Document>,
            guided_regex: Option<String>,
            guided_grammar: Option<String>,
            #[serde(rename = "user")]
            _user: Option<String>,
        }

        impl $name {
            /// The fields that every generating endpoint has.
            pub(super) fn sampling(&mut self) -> $crate::http::openai::request::Sampling {
                $crate::http::openai::request::Sampling {
                    n: self.n,
                    seed: self.seed.take(),
                    temperature: self.temperature,
                    top_p: self.top_p,
                    min_p: self.min_p,
                    top_k: self.top_k,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: self.logit_bias.take(),
                    stop: self.stop.take(),
                    stop_token_ids: self.stop_token_ids.take(),
                    ignore_eos: self.ignore_eos,
                    min_tokens: self.min_tokens,
                    max_tokens: self.max_completion_tokens.or(self.max_tokens),
                    skip_special_tokens: self.skip_special_tokens,
                    priority: self.priority,
                    best_of: self.best_of,
                    response_format: self.response_format.take(),
                    guided: [
                        self.guided_json.take().map(|schema| playhouse_actors::engine::Constraint::JsonSchema(schema.text)),
                        self.guided_regex.take().map(playhouse_actors::engine::Constraint::Regex),
                        self.guided_grammar.take().map(playhouse_actors::engine::Constraint::Lark),
                    ]
                    .into_iter()
                    .flatten()
                    .collect(),
                }
            }
        }
    };
}
with_sampling! {
    /// The body of `/v1/chat/completions`.
    ChatBody {
        messages: Trees,
        logprobs: Option<bool>,
        top_logprobs: Option<u32>,
        tools: Option<Trees>,
        tool_choice: Option<Tree>,
        parallel_tool_calls: Option<bool>,
        chat_template_kwargs: Option<Object>,
        reasoning_effort: Option<String>,
        add_generation_prompt: Option<bool>,
        continue_final_message: Option<bool>,
    }
}

with_sampling! {
    /// The body of `/v1/completions`.
    CompletionBody {
        #[serde(deserialize_with = "PromptField::prompt")]
        prompt: PromptField,
        suffix: Option<String>,
        echo: Option<bool>,
        logprobs: Option<u32>,
    }
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub(super) struct StreamOptions {
    include_usage: Option<bool>,
}

impl StreamOptions {
    /// Whether a chunk with the usage is to follow the last.
    pub(super) fn include_usage(options: Option<&Self>) -> bool {
        options.and_then(|options| options.include_usage).unwrap_or(false)
    }
}

/// `response_format`.
#[derive(Debug, Deserialize)]
pub(super) struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<JsonSchema>,
    /// The Responses API has the schema here.
    schema: Option<Document>,
}

#[derive(Debug, Deserialize)]
struct JsonSchema {
    schema: Option<Document>,
}

impl ResponseFormat {
    fn constraint(self) -> Result<Option<Constraint>, ApiError> {
        match self.kind.as_str() {
            "text" => Ok(None),
            "json_object" => Ok(Some(Constraint::JsonObject)),
            "json_schema" => {
                let schema = self.json_schema.and_then(|outer| outer.schema).or(self.schema);
                // vLLM takes a schema as text, too, but as `guided_json`.
                let schema = schema.filter(|schema| schema.is_schema);
                let missing =
                    || ApiError::param("response_format.json_schema", "a schema is needed: `json_schema.schema`");
                Ok(Some(Constraint::JsonSchema(schema.ok_or_else(missing)?.text)))
            }
            kind => {
                let shown: String = kind.chars().take(40).collect();
                let message = format!("`{shown}` is not a format; expected `text`, `json_object` or `json_schema`");
                Err(ApiError::param("response_format", message))
            }
        }
    }
}

/// What [`with_sampling`] bodies have in common.
#[derive(Debug, Default)]
pub(super) struct Sampling {
    pub(super) n: Option<u32>,
    pub(super) seed: Option<Seed>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) min_p: Option<f32>,
    pub(super) top_k: Option<i64>,
    pub(super) repetition_penalty: Option<f32>,
    pub(super) presence_penalty: Option<f32>,
    pub(super) frequency_penalty: Option<f32>,
    pub(super) logit_bias: Option<LogitBias>,
    pub(super) stop: Option<Stop>,
    pub(super) stop_token_ids: Option<StopIds>,
    pub(super) ignore_eos: Option<bool>,
    pub(super) min_tokens: Option<u32>,
    pub(super) max_tokens: Option<u32>,
    pub(super) skip_special_tokens: Option<bool>,
    pub(super) priority: Option<i32>,
    pub(super) best_of: Option<u32>,
    pub(super) response_format: Option<ResponseFormat>,
    /// vLLM's names for the same.
    pub(super) guided: Vec<Constraint>,
}

impl Sampling {
    /// Sets what was given; the rest stays as it is in `request`. Ranges are checked where the request is sent.
    ///
    /// # Errors
    /// What cannot be expressed, or is not done.
    pub(super) fn apply(self, request: &mut GenerateRequest) -> Result<(), ApiError> {
        request.n = self.n.unwrap_or(1);
        if self.best_of.is_some_and(|best_of| best_of != request.n) {
            return Err(ApiError::not_supported("best_of", "`best_of` other than `n` is not supported"));
        }
        let format = self.response_format.map(ResponseFormat::constraint).transpose()?.flatten();
        let mut constraints = format.into_iter().chain(self.guided);
        request.constraint = constraints.next();
        if constraints.next().is_some() {
            return Err(ApiError::param("response_format", "a text can be held to one format only"));
        }
        let sampling = &mut request.sampling;
        set(&mut sampling.temperature, self.temperature);
        set(&mut sampling.top_p, self.top_p);
        set(&mut sampling.min_p, self.min_p);
        set(&mut sampling.repetition_penalty, self.repetition_penalty);
        set(&mut sampling.presence_penalty, self.presence_penalty);
        set(&mut sampling.frequency_penalty, self.frequency_penalty);
        if let Some(top_k) = self.top_k {
            sampling.top_k = read_top_k(top_k)?;
        }
        if let Some(bias) = self.logit_bias {
            sampling.logit_bias = bias.by_token()?;
        }
        request.seed = self.seed.map(|seed| seed.0);
        request.stop = self.stop.map(|stop| stop.0).unwrap_or_default();
        request.stop_ids = self.stop_token_ids.map(|ids| ids.0).unwrap_or_default();
        set(&mut request.ignore_eos, self.ignore_eos);
        set(&mut request.min_tokens, self.min_tokens);
        request.max_tokens = self.max_tokens.or(request.max_tokens);
        set(&mut request.skip_special, self.skip_special_tokens);
        set(&mut request.priority, self.priority);
        Ok(())
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

/// vLLM writes -1, llama.cpp 0 for "all".
fn read_top_k(top_k: i64) -> Result<u32, ApiError> {
    match top_k {
        -1 => Ok(0),
        _ => u32::try_from(top_k)
            .map_err(|_| ApiError::param("top_k", format!("`top_k` is {top_k}, expected -1 or more"))),
    }
}

/// Any integer of 64 bits; OpenAI's are signed, ours are not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seed(pub(super) u64);

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Integer;
        impl Visitor<'_> for Integer {
            type Value = Seed;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer of 64 bits")
            }
            fn visit_u64<E>(self, value: u64) -> Result<Seed, E> {
                Ok(Seed(value))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Seed, E> {
                Ok(Seed(value.cast_unsigned()))
            }
        }
        deserializer.deserialize_any(Integer)
    }
}

/// One stop string or several.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(pub(super) Vec<String>);

impl<'de> Deserialize<'de> for Stop {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Strings;
        impl<'de> Visitor<'de> for Strings {
            type Value = Stop;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E>(self, value: &str) -> Result<Stop, E> {
                // Some clients send an empty string for "none".
                Ok(Stop(if value.is_empty() { Vec::new() } else { vec![value.to_owned()] }))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<Stop, A::Error> {
                bounded::elements(list, "stop", limits::STOPS_MAX).map(Stop)
            }
        }
        deserializer.deserialize_any(Strings)
    }
}

/// Token ids that end a text.
#[derive(Debug, Clone, Default)]
pub(super) struct StopIds(pub(super) Vec<u32>);

impl<'de> Deserialize<'de> for StopIds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ids;
        impl<'de> Visitor<'de> for Ids {
            type Value = StopIds;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of token ids")
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, list: A) -> Result<StopIds, A::Error> {
                bounded::elements(list, "stop_token_ids", limits::STOP_IDS_MAX).map(StopIds)
            }
        }
        deserializer.deserialize_seq(Ids)
    }
}

/// What is added to the scores of tokens, by their ids as texts: JSON has no other keys.
#[derive(Debug, Clone, Default)]
pub(super) struct LogitBias(Vec<(String, f32)>);

impl LogitBias {
    /// In the order of the ids. Of an id that is there twice the last counts.
    fn by_token(self) -> Result<Vec<(u32, f32)>, ApiError> {
        let token = |(id, bias): (String, f32)| {
            let id = id.parse().map_err(|_| ApiError::param("logit_bias", "keys of `logit_bias` are token ids"))?;
            Ok((id, bias))
        };
        let by_token: BTreeMap<u32, f32> = self.0.into_iter().map(token).collect::<Result<_, ApiError>>()?;
        Ok(by_token.into_iter().collect())
    }
}

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Biases;
        impl<'de> Visitor<'de> for Biases {
            type Value = LogitBias;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of token ids with numbers")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, object: A) -> Result<LogitBias, A::Error> {
                bounded::members(object, "logit_bias", limits::LOGIT_BIAS_MAX).map(LogitBias)
            }
        }
        deserializer.deserialize_map(Biases)
    }
}

/// Most prompts of one request.
pub(super) const PROMPTS_MAX: usize = 32;

/// The prompts of a completion: text or tokens, one or several.
#[derive(Debug, Clone)]
pub(super) enum PromptField {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

impl PromptField {
    /// Of the field `prompt`.
    pub(super) fn prompt<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Prompts { param: "prompt" })
    }

    /// Of the field `input`.
    pub(super) fn input<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Prompts { param: "input" })
    }

    /// As the library takes them.
    pub(super) fn prompts(self) -> Vec<Prompt> {
        match self {
            Self::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Self::Tokens(lists) => lists.into_iter().map(Prompt::Tokens).collect(),
        }
    }
}

struct Prompts {
    param: &'static str,
}

impl<'de> Visitor<'de> for Prompts {
    type Value = PromptField;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of token ids, or a list of either")
    }

    fn visit_str<E>(self, value: &str) -> Result<PromptField, E> {
        Ok(PromptField::Texts(vec![value.to_owned()]))
    }

    fn visit_string<E>(self, value: String) -> Result<PromptField, E> {
        Ok(PromptField::Texts(vec![value]))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<PromptField, A::Error> {
        let (mut ids, mut texts, mut lists) = (Vec::new(), Vec::new(), Vec::new());
        while let Some(item) = list.next_element()? {
            match item {
                PromptItem::Id(id) => ids.push(id),
                PromptItem::Text(text) => texts.push(text),
                PromptItem::Ids(list) => lists.push(list),
            }
            let n_prompts = texts.len() + lists.len();
            bounded::at_most(self.param, n_prompts, PROMPTS_MAX)?;
        }
        match (ids.is_empty(), texts.is_empty(), lists.is_empty()) {
            (false, true, true) => Ok(PromptField::Tokens(vec![ids])),
            (true, false, true) => Ok(PromptField::Texts(texts)),
            (true, true, false) => Ok(PromptField::Tokens(lists)),
            (true, true, true) => Err(de::Error::invalid_length(0, &self)),
            _ => Err(de::Error::custom("a list of prompts has texts or tokens, not both")),
        }
    }
}

/// An element of a list of prompts. Read by its first byte: to try one form after the other would build all of them.
enum PromptItem {
    Id(u32),
    Text(String),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Item;
        impl<'de> Visitor<'de> for Item {
            type Value = PromptItem;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<PromptItem, E> {
                let wrong = || E::invalid_value(de::Unexpected::Unsigned(value), &self);
                u32::try_from(value).map(PromptItem::Id).map_err(|_| wrong())
            }
            fn visit_str<E>(self, value: &str) -> Result<PromptItem, E> {
                Ok(PromptItem::Text(value.to_owned()))
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<PromptItem, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = list.next_element()? {
                    ids.push(id);
                }
                Ok(PromptItem::Ids(ids))
            }
        }
        deserializer.deserialize_any(Item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion(json: &str) -> Result<CompletionBody, String> {
        serde_json::from_str(json).map_err(|error| error.to_string())
    }

    #[test]
    fn prompts_have_four_forms() {
        let prompt = |json: &str| completion(&format!(r#"{{"model": "m", "prompt": {json}}}"#)).map(|body| body.prompt);
        assert!(matches!(prompt("\"a\""), Ok(PromptField::Texts(texts)) if texts == ["a"]));
        assert!(matches!(prompt("[1, 2]"), Ok(PromptField::Tokens(lists)) if lists == [[1, 2]]));
        assert!(matches!(prompt("[\"a\", \"b\"]"), Ok(PromptField::Texts(texts)) if texts.len() == 2));
        assert!(matches!(prompt("[[1], [2, 3]]"), Ok(PromptField::Tokens(lists)) if lists.len() == 2));
        for wrong in ["[]", "[1, \"a\"]", "3", "[-1]", "null", "{}"] {
            assert!(prompt(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_was_given_is_set_and_the_rest_left() {
        let mut body = completion(
            r#"{"model": "m", "prompt": "a", "temperature": 0, "top_k": -1, "seed": -1, "stop": "x", "n": 2,
                "logit_bias": {"7": -100}, "repeat_penalty": 1.5, "unknown": [1]}"#,
        )
        .expect("well-formed");
        let mut request = GenerateRequest::text("a");
        body.sampling().apply(&mut request).expect("expressible");
        assert_eq!((request.sampling.temperature, request.sampling.top_k), (0.0, 0));
        assert_eq!(request.sampling.top_p, 0.95, "the default of the command line");
        assert_eq!((request.seed, request.n), (Some(u64::MAX), 2));
        assert_eq!(request.sampling.logit_bias, [(7, -100.0)]);
        assert_eq!(request.sampling.repetition_penalty, 1.5);
        assert_eq!(request.stop, ["x"]);
    }

    #[test]
    fn what_is_not_done_is_refused() {
        for (field, param) in [
            (r#""best_of": 3"#, "best_of"),
            (r#""response_format": {"type": "xml"}"#, "response_format"),
            (r#""response_format": {"type": "json_schema"}"#, "response_format.json_schema"),
            (r#""response_format": {"type": "json_object"}, "guided_regex": "a""#, "response_format"),
            (r#""top_k": -2"#, "top_k"),
            (r#""logit_bias": {"moon": 1}"#, "logit_bias"),
        ] {
            let mut body = completion(&format!(r#"{{"model": "m", "prompt": "a", {field}}}"#)).expect("well-formed");
            let error = body.sampling().apply(&mut GenerateRequest::text("a")).expect_err(param);
            assert_eq!(error.json()["error"]["param"], param);
        }
    }
}
