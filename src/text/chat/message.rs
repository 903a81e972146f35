//! One message of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::TemplateError;

/// A message as templates see it: an object with a `role` and whatever else the model's makers thought of.
///
/// Fields keep their order, and fields that are absent stay absent: templates ask `"tool_calls" in message`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Message {
    fields: Map<String, Value>,
}

impl Message {
    /// A message that is plain text.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        let mut fields = Map::new();
        fields.insert("role".into(), role.into());
        fields.insert("content".into(), Value::String(content.into()));
        Message { fields }
    }

    /// A message as JSON, in the form of the OpenAI API or of transformers.
    ///
    /// Two forms that templates do not understand are rewritten: content that is a list of text parts becomes one
    /// text, joined by newlines, and the arguments of tool calls that are JSON in a string become that JSON.
    ///
    /// # Errors
    /// [`TemplateError::BadMessage`] if it is no object, has no role, or a role that is not a plain word. The role is
    /// the one part of a message that templates build control tokens from.
    pub fn from_json(value: Value) -> Result<Message, TemplateError> {
        let Value::Object(mut fields) = value else {
            return Err(TemplateError::BadMessage { why: "a message is a JSON object".into() });
        };
        match fields.get("role").and_then(Value::as_str) {
            None => return Err(TemplateError::BadMessage { why: "a message needs a role that is a string".into() }),
            Some(role) if !is_plain_word(role) => {
                let why = format!("the role {role:?} is not made of up to 64 ASCII letters, digits, '_' and '-'");
                return Err(TemplateError::BadMessage { why });
            }
            Some(_) => {}
        }
        if let Some(text) = fields.get("content").and_then(joined_text) {
            fields.insert("content".into(), text);
        }
        if let Some(Value::Array(calls)) = fields.get_mut("tool_calls") {
            calls.iter_mut().for_each(parse_arguments);
        }
        Ok(Message { fields })
    }

    /// Who speaks.
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// What is said, if it is text.
    pub fn content(&self) -> Option<&str> {
        self.fields.get("content").and_then(Value::as_str)
    }

    pub(super) fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }
}

impl TryFrom<Value> for Message {
    type Error = TemplateError;

    fn try_from(value: Value) -> Result<Message, TemplateError> {
        Message::from_json(value)
    }
}

impl From<Message> for Value {
    fn from(message: Message) -> Value {
        Value::Object(message.fields)
    }
}

fn is_plain_word(role: &str) -> bool {
    (1..=64).contains(&role.len()) && role.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'))
}

/// The text of a list that has nothing but text parts.
fn joined_text(content: &Value) -> Option<Value> {
    let parts = content.as_array()?.iter().map(|part| {
        let is_text = part.get("type").is_none_or(|t| t == "text");
        part.get("text").filter(|_| is_text)?.as_str()
    });
    parts.collect::<Option<Vec<&str>>>().map(|texts| texts.join("\n").into())
}

fn parse_arguments(call: &mut Value) {
    let holder = if call.get("function").is_some() { call.get_mut("function") } else { Some(call) };
    if let Some(arguments) = holder.and_then(|h| h.get_mut("arguments"))
        && let Some(Value::Object(parsed)) = arguments.as_str().and_then(|s| serde_json::from_str(s).ok())
    {
        *arguments = Value::Object(parsed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn openai_forms_become_what_templates_read() {
        let message = Message::from_json(json!({
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": 2}"}}],
        }));
        let message = Value::from(message.unwrap());
        assert_eq!(message["content"], "a\nb");
        assert_eq!(message["tool_calls"][0]["function"]["arguments"].to_string(), r#"{"b":1,"a":2}"#);
    }

    #[test]
    fn roles_are_plain_words() {
        for bad in [json!({"role": "a|>b"}), json!({"role": ""}), json!({"role": 1}), json!({}), json!([])] {
            assert!(Message::from_json(bad).is_err());
        }
        assert!(serde_json::from_str::<Message>(r#"{"role": "system", "content": "x"}"#).is_ok());
    }
}
