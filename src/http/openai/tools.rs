//! Tools: which ones a conversation may use, and how a model is made to call one.
//!
//! | `tool_choice` | what happens |
//! |---|---|
//! | `auto`, or nothing | the template is told the tools; the model does as it likes |
//! | `none` | the template is not told |
//! | `required` | the answer is held to a grammar: calls of the tools in the template's own syntax, arguments by their schemas |
//! | `{"type": "function", "function": {"name": ...}}` | the same with one call of that tool |

use super::super::error::ApiError;
use super::super::output::Syntax;
use crate::client::ModelCard;
use playhouse_actors::engine::Constraint;
use serde_json::{Value, json};

/// Most calls of one answer that must have one.
const CALLS_MAX: usize = 8;
/// Levels of a tool's schema.
const SCHEMA_DEPTH_MAX: usize = 64;

/// What was asked about tools.
#[derive(Debug, Default)]
pub(super) struct Tools {
    /// What the template is given.
    pub(super) shown: Option<Vec<Value>>,
    /// Of those, the ones of which one must be called.
    forced: Option<Vec<Value>>,
    /// Whether an answer may have more than one call.
    pub(super) parallel: bool,
}

enum Choice {
    Auto,
    None,
    Required,
    Named(String),
}

impl Tools {
    /// Reads and checks what the client sent.
    ///
    /// # Errors
    /// A tool or choice that is none; tools for a template that takes none.
    pub(super) fn read(
        tools: Option<Vec<Value>>,
        choice: Option<&Value>,
        parallel: Option<bool>,
        template: &str,
    ) -> Result<Self, ApiError> {
        let choice = read_choice(choice)?;
        let tools = tools.unwrap_or_default();
        for (at, tool) in tools.iter().enumerate() {
            check_tool(at, tool)?;
        }
        let forced = match &choice {
            Choice::Auto => None,
            Choice::None => return Ok(Self { parallel: true, ..Self::default() }),
            Choice::Required if tools.is_empty() => {
                return Err(ApiError::param("tool_choice", "`tool_choice` is `required`, and there are no `tools`"));
            }
            Choice::Required => Some(tools.clone()),
            Choice::Named(name) => match tools.iter().find(|tool| name_of(tool) == Some(name)) {
                Some(tool) => Some(vec![tool.clone()]),
                None => {
                    let shown: String = name.chars().take(64).collect();
                    return Err(ApiError::param("tool_choice", format!("`{shown}` is not among the `tools`")));
                }
            },
        };
        if !tools.is_empty() && !Syntax::takes_tools(template) {
            return Err(ApiError::not_supported("tools", "this model's chat template does not take tools"));
        }
        let is_one = matches!(choice, Choice::Named(_));
        let shown = (!tools.is_empty()).then_some(tools);
        Ok(Self { shown, forced, parallel: parallel.unwrap_or(true) && !is_one })
    }

    /// What holds an answer to a call, if there must be one.
    ///
    /// # Errors
    /// The model's calls have no syntax that is known.
    pub(super) fn constraint(&self, syntax: Syntax, card: &ModelCard) -> Result<Option<Constraint>, ApiError> {
        let Some(tools) = &self.forced else { return Ok(None) };
        let template = card.template.as_ref().map_or("", |template| template.source());
        let most = if self.parallel { CALLS_MAX } else { 1 };
        let grammar = match syntax {
            Syntax::Tagged => tagged(tools, most, template),
            Syntax::Bare => bare(tools, most),
            Syntax::Harmony => harmony(tools, card),
            Syntax::Plain => {
                let message = "this model's chat template does not say how a tool is called, so no call can be forced";
                return Err(ApiError::not_supported("tool_choice", message));
            }
        };
        Ok(Some(Constraint::Lark(grammar)))
    }
}

fn read_choice(choice: Option<&Value>) -> Result<Choice, ApiError> {
    let wrong = || {
        let forms = "`auto`, `none`, `required` or `{\"type\": \"function\", \"function\": {\"name\": ...}}`";
        ApiError::param("tool_choice", format!("`tool_choice` is {forms}"))
    };
    match choice {
        None | Some(Value::Null) => Ok(Choice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => Ok(Choice::Auto),
            "none" => Ok(Choice::None),
            "required" => Ok(Choice::Required),
            _ => Err(wrong()),
        },
        // The Responses API has the name one level up.
        Some(named) if named.get("type").is_none_or(|kind| kind == "function") => {
            let name = named.pointer("/function/name").or_else(|| named.get("name")).and_then(Value::as_str);
            name.map(|name| Choice::Named(name.to_owned())).ok_or_else(wrong)
        }
        Some(_) => Err(wrong()),
    }
}

fn name_of(tool: &Value) -> Option<&str> {
    tool.pointer("/function/name").and_then(Value::as_str)
}

fn check_tool(at: usize, tool: &Value) -> Result<(), ApiError> {
    let is_function = tool.get("type").is_none_or(|kind| kind == "function");
    if !is_function || name_of(tool).is_none_or(str::is_empty) {
        let message = "a tool is `{\"type\": \"function\", \"function\": {\"name\": ...}}`";
        return Err(ApiError::param(&format!("tools[{at}]"), message));
    }
    let param = || format!("tools[{at}].function.parameters");
    match tool.pointer("/function/parameters") {
        None | Some(Value::Null) => Ok(()),
        Some(schema @ Value::Object(_)) if depth(schema) <= SCHEMA_DEPTH_MAX => Ok(()),
        Some(Value::Object(_)) => {
            Err(ApiError::param(&param(), format!("the schema has more than {SCHEMA_DEPTH_MAX} levels")))
        }
        Some(_) => Err(ApiError::param(&param(), "`parameters` is a JSON schema: an object")),
    }
}

fn depth(value: &Value) -> usize {
    let inner = match value {
        Value::Array(list) => list.iter().map(depth).max(),
        Value::Object(fields) => fields.values().map(depth).max(),
        _ => return 0,
    };
    1 + inner.unwrap_or(0)
}

/// The schema of a tool's arguments.
fn arguments(tool: &Value) -> Value {
    let schema = tool.pointer("/function/parameters").filter(|schema| schema.is_object());
    schema.cloned().unwrap_or_else(|| json!({ "type": "object" }))
}

/// A call as JSON, `key` being what the syntax calls the arguments.
fn call(tool: &Value, key: &str) -> Value {
    json!({
        "type": "object",
        "properties": { "name": { "const": name_of(tool) }, key: arguments(tool) },
        "required": ["name", key],
        "additionalProperties": false,
    })
}

/// A schema within a grammar, with one way to write spaces: a model that may write as many as it likes may never write
/// anything else.
fn embedded(mut schema: Value) -> String {
    schema["x-guidance"] = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
    format!("%json {schema}")
}

/// A text within a grammar.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// One rule for each tool, and `call` for any of them.
fn rules(tools: &[Value], rule: impl Fn(&Value) -> String) -> String {
    let names: Vec<String> = (0..tools.len()).map(|at| format!("call_{at}")).collect();
    let mut text = format!("call: {}\n", names.join(" | "));
    for (name, tool) in names.iter().zip(tools) {
        text.push_str(&format!("{name}: {}\n", rule(tool)));
    }
    text
}

/// `<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>`, perhaps after thoughts.
fn tagged(tools: &[Value], most: usize, template: &str) -> String {
    let (open, close) = (literal("<tool_call>\n"), literal("\n</tool_call>"));
    let thoughts = if template.contains("</think>") { "thoughts? " } else { "" };
    let more = if most > 1 { format!(" (\"\\n\" tag){{0,{}}}", most - 1) } else { String::new() };
    let mut text = format!("start: {thoughts}tag{more}\ntag: {open} call {close}\n");
    if !thoughts.is_empty() {
        text.push_str("thoughts: thought \"\\n\\n\"\nthought[suffix=\"</think>\"]: /(?s:.*)/\n");
    }
    text + &rules(tools, |tool| embedded(call(tool, "arguments")))
}

/// `{"name": ..., "parameters": ...}`, and perhaps more of them after `;`.
fn bare(tools: &[Value], most: usize) -> String {
    let more = if most > 1 { format!(" (\"; \" call){{0,{}}}", most - 1) } else { String::new() };
    format!("start: call{more}\n") + &rules(tools, |tool| embedded(call(tool, "parameters")))
}

/// A message to the tool on the commentary channel, perhaps after one on the analysis channel. Its end is a stop id.
fn harmony(tools: &[Value], card: &ModelCard) -> String {
    let tokenizer = &card.tokenizer;
    let mark = |text: &str| match tokenizer.special_id(text).filter(|id| tokenizer.is_control(*id)) {
        Some(id) => format!("<[{id}]>"),
        None => literal(text),
    };
    let (channel, message) = (mark("<|channel|>"), mark("<|message|>"));
    let (end, start, constrain) = (mark("<|end|>"), mark("<|start|>"), mark("<|constrain|>"));
    // Where the end of a message is the end of the turn, as in vocabularies that are not harmony's own, there is no second.
    let ends_turn = tokenizer.special_id("<|end|>").is_some_and(|id| tokenizer.stop_ids().contains(&id));
    let beginning = if ends_turn {
        "start: call\n".to_owned()
    } else {
        format!(
            "start: analysis? call\nthought: /[^<]*/\n\
             analysis: {channel} \"analysis\" {message} thought {end} {start} \"assistant\"\n"
        )
    };
    let header = |tool: &Value| literal(&format!("commentary to=functions.{} ", name_of(tool).unwrap_or_default()));
    beginning
        + &rules(tools, |tool| {
            format!("{channel} {} {constrain} \"json\" {message} {}", header(tool), embedded(arguments(tool)))
        })
}

#[cfg(test)]
mod tests {
    use super::super::super::output::{Piece, Splitter};
    use super::*;
    use crate::text::{ChatTemplate, TemplateTokens};
    use playhouse_config::Model;

    fn weather() -> Value {
        let parameters = json!({
            "type": "object",
            "properties": { "city": { "enum": ["Edo", "Nara"] }, "days": { "type": "integer", "minimum": 1, "maximum": 3 } },
            "required": ["city", "days"],
            "additionalProperties": false,
        });
        json!({ "type": "function", "function": { "name": "weather", "parameters": parameters } })
    }

    fn clock() -> Value {
        json!({ "type": "function", "function": { "name": "clock" } })
    }

    fn card(template: &str) -> ModelCard {
        let mut card = ModelCard::read(&Model::embedded_default()).expect("the embedded model is whole");
        card.template = Some(ChatTemplate::new(template, TemplateTokens::of(&card.tokenizer)).expect("a template"));
        card
    }

    const TEMPLATES: [(&str, Syntax); 4] = [
        ("{{ tools }}<tool_call>", Syntax::Tagged),
        ("{{ tools }}<tool_call></think>", Syntax::Tagged),
        (r#"{{ tools }}{"name": f, "parameters": p}"#, Syntax::Bare),
        ("{{ tools }}<|channel|><|message|>", Syntax::Harmony),
    ];

    fn forced(template: &str, syntax: Syntax, choice: Value, parallel: Option<bool>) -> Constraint {
        assert_eq!(Syntax::of(template, true), syntax);
        let tools = Some(vec![weather(), clock()]);
        let tools = Tools::read(tools, Some(&choice), parallel, template).expect("good");
        tools.constraint(syntax, &card(template)).expect("known").expect("forced")
    }

    /// Every grammar is one that the library takes, and what the splitter of the syntax reads are calls.
    #[test]
    fn grammars_are_taken_in_every_syntax() {
        for (template, syntax) in TEMPLATES {
            let card = card(template);
            for choice in [json!("required"), json!({"type": "function", "function": {"name": "weather"}})] {
                for parallel in [None, Some(false)] {
                    let constraint = forced(template, syntax, choice.clone(), parallel);
                    card.check(&constraint).unwrap_or_else(|error| panic!("{syntax:?}: {error}\n{constraint:?}"));
                }
            }
        }
    }

    #[test]
    fn what_a_grammar_allows_is_read_as_calls() {
        let call = r#"{"name": "weather", "arguments": {"city": "Edo", "days": 2}}"#;
        let texts = [
            (TEMPLATES[0], format!("<tool_call>\n{call}\n</tool_call>")),
            (TEMPLATES[1], format!("<think>rain</think>\n\n<tool_call>\n{call}\n</tool_call>")),
            (TEMPLATES[2], call.replace("arguments", "parameters")),
            (
                TEMPLATES[3],
                "<|channel|>analysis<|message|>rain<|end|><|start|>assistant<|channel|>commentary to=functions.weather \
                 <|constrain|>json<|message|>{\"city\": \"Edo\", \"days\": 2}<|call|>"
                    .to_owned(),
            ),
        ];
        for ((template, syntax), text) in texts {
            let mut splitter = Splitter::new(syntax, template, "");
            let mut pieces = Vec::new();
            splitter.push(&text, &mut pieces);
            splitter.finish(&mut pieces);
            assert!(pieces.contains(&Piece::Call("weather".into())), "{syntax:?}: {pieces:?}");
            assert!(!pieces.iter().any(|piece| matches!(piece, Piece::Content(_))), "{syntax:?}: {pieces:?}");
        }
    }

    #[test]
    fn choices_are_read_and_checked() {
        let read = |tools: Vec<Value>, choice: Value| Tools::read(Some(tools), Some(&choice), None, "tools");
        let all = || vec![weather(), clock()];
        assert!(read(all(), json!("none")).expect("good").shown.is_none());
        assert!(read(all(), json!("auto")).expect("good").forced.is_none());
        assert_eq!(read(all(), json!("required")).expect("good").forced.map(|tools| tools.len()), Some(2));
        for named in
            [json!({"type": "function", "function": {"name": "clock"}}), json!({"type": "function", "name": "clock"})]
        {
            let tools = read(all(), named).expect("good");
            assert!(!tools.parallel && tools.forced.is_some_and(|tools| tools == [clock()]));
        }
        let param = |tools: Vec<Value>, choice: Value| {
            let error = read(tools, choice).expect_err("it is wrong").json();
            error["error"]["param"].as_str().expect("named").to_owned()
        };
        for choice in [json!("always"), json!(3), json!({}), json!({"type": "allowed_tools"}), json!({"function": {}})]
        {
            assert_eq!(param(all(), choice), "tool_choice");
        }
        assert_eq!(param(vec![], json!("required")), "tool_choice");
        assert_eq!(param(all(), json!({"type": "function", "function": {"name": "moon"}})), "tool_choice");
        assert_eq!(param(vec![weather(), json!({"type": "function"})], json!("auto")), "tools[1]");
        let deep = (0..100).fold(json!({}), |inner, _| json!({ "properties": { "a": inner } }));
        for schema in [json!(3), deep] {
            let tool = json!({"type": "function", "function": {"name": "f", "parameters": schema}});
            assert_eq!(param(vec![tool], json!("auto")), "tools[0].function.parameters");
        }
    }
}
