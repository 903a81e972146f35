//! From texts to the raw types: syntax, overrides, substitution of `${env:NAME}`, unknown keys, types.

use crate::error::{Report, did_you_mean};
use crate::overrides::Overrides;
use crate::raw::RawConfig;
use crate::schema::{Node, json_schema};
use crate::source::Sources;
use serde::Deserialize;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Reads `text`; `None` if something is so wrong that the values cannot be judged. What is wrong is in the report.
pub(crate) fn read(label: &str, text: &str, overrides: &Overrides) -> (Option<RawConfig>, Report) {
    let mut sources = Sources::default();
    sources.push(label, text);
    let mut report = Report::new(sources);
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        syntax(error, text, &mut report);
    }
    if !report.is_empty() {
        return (None, report);
    }
    let schema = json_schema();
    let schema = Node::root(&schema);
    let span = document.span();
    let mut table = document.into_inner();
    overrides.apply(&mut table, schema, &mut report);
    let substituted = substitute_table(&mut table, overrides, &mut report);
    refuse_unknown(&mut table, schema, "", &mut report);
    if !substituted {
        return (None, report);
    }
    let deserializer = toml::de::Deserializer::from(Spanned::new(span, table));
    match RawConfig::deserialize(deserializer) {
        Ok(raw) => (Some(raw), report),
        Err(error) => {
            explain(&error, &mut report);
            (None, report)
        }
    }
}

/// Adds to a syntax error what its few words leave out.
fn syntax(error: &toml::de::Error, text: &str, report: &mut Report) {
    let span = error.span().unwrap_or(0..0);
    let message = match text.get(span.clone()) {
        Some(key) if error.message() == "duplicate key" => format!("the key `{key}` is there twice"),
        _ => error.message().to_owned(),
    };
    let invalid = message.starts_with("invalid");
    report.add(span, message).help = invalid.then(|| "a text is written in quotes".into());
}

fn substitute_table(table: &mut DeTable<'_>, overrides: &Overrides, report: &mut Report) -> bool {
    table.iter_mut().map(|(_, value)| substitute(value, overrides, report)).fold(true, |all, ok| all & ok)
}

fn substitute(value: &mut Spanned<DeValue<'_>>, overrides: &Overrides, report: &mut Report) -> bool {
    let span = value.span();
    match value.get_mut() {
        DeValue::String(text) if text.contains("${") => match expand(text, span, overrides, report) {
            Some(expanded) => {
                *text = expanded.into();
                true
            }
            None => false,
        },
        DeValue::Array(items) => {
            items.iter_mut().map(|item| substitute(item, overrides, report)).fold(true, |all, ok| all & ok)
        }
        DeValue::Table(table) => substitute_table(table, overrides, report),
        _ => true,
    }
}

/// Replaces `${env:NAME}`; `$${` stands for `${`.
fn expand(text: &str, span: Range<usize>, overrides: &Overrides, report: &mut Report) -> Option<String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    let mut good = true;
    while let Some(start) = rest.find("${") {
        if rest[..start].ends_with('$') {
            expanded.push_str(&rest[..start]);
            expanded.push('{');
            rest = &rest[start + 2..];
            continue;
        }
        expanded.push_str(&rest[..start]);
        let Some(len) = rest[start..].find('}') else {
            let place = report.sources.find_within(span.clone(), &rest[start..]);
            report.add(place, "`${` is not closed").help =
                Some("write `${env:NAME}`, or `$${` for a plain `${`".into());
            return None;
        };
        let whole = &rest[start..=start + len];
        let place = report.sources.find_within(span.clone(), whole);
        match whole[2..whole.len() - 1].strip_prefix("env:") {
            Some(name) if !name.is_empty() => match overrides.env(name) {
                Some(value) => expanded.push_str(value),
                None => {
                    let found = report.add(place, format!("environment variable `{name}` is not set"));
                    found.help = Some(format!("set `{name}` for the host process, or write the value here"));
                    good = false;
                }
            },
            _ => {
                let found = report.add(place, format!("unknown substitution `{whole}`"));
                found.help = Some("write `${env:NAME}`, or `$${` for a plain `${`".into());
                good = false;
            }
        }
        rest = &rest[start + len + 1..];
    }
    expanded.push_str(rest);
    good.then_some(expanded)
}

/// Reports and removes keys that the schema does not have, so that everything else is still judged.
fn refuse_unknown(table: &mut DeTable<'_>, node: Node<'_>, path: &str, report: &mut Report) {
    // Sorted here: the order of a JSON map depends on a feature of serde_json that any crate of a build may switch on.
    let mut known = node.keys();
    known.sort_unstable();
    let unknown: Vec<(String, Range<usize>)> = table
        .keys()
        .filter(|key| !known.contains(&key.get_ref().as_ref()))
        .map(|key| (key.get_ref().to_string(), key.span()))
        .collect();
    for (key, span) in unknown {
        table.remove(key.as_str());
        let place = if path.is_empty() { "at the top of the file".into() } else { format!("in [{path}]") };
        let message = format!("unknown key `{key}` {place}");
        let list = format!("the keys there are: {}", known.join(", "));
        report.add(span, message).help = Some(did_you_mean(&key, known.iter().copied()).unwrap_or(list));
    }
    for (key, value) in table.iter_mut() {
        let name = key.get_ref().as_ref();
        let Some(child) = node.key(name) else { continue };
        let path = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        match (value.get_mut(), child.items()) {
            (DeValue::Table(inner), None) if !child.keys().is_empty() => refuse_unknown(inner, child, &path, report),
            (DeValue::Array(items), Some(element)) if !element.keys().is_empty() => {
                for item in items.iter_mut() {
                    if let DeValue::Table(inner) = item.get_mut() {
                        refuse_unknown(inner, element, &format!("[{path}]"), report);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Puts a type error of serde into our words.
fn explain(error: &toml::de::Error, report: &mut Report) {
    let words = [
        ("expected a sequence", "expected a list"),
        ("invalid type: map", "invalid type: table"),
        ("expected u32", "expected a whole number, 0 or more"),
        ("expected u64", "expected a whole number, 0 or more"),
        ("expected i32", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected a string", "expected a text"),
        ("unknown variant", "unknown value"),
    ];
    let mut message = error.message().lines().next().unwrap_or_default().to_owned();
    for (from, to) in words {
        message = message.replace(from, to);
    }
    let quoted: Vec<&str> = error.message().split('`').skip(1).step_by(2).collect();
    let help = match quoted.split_first() {
        Some((found, candidates)) if message.starts_with("unknown value") => {
            did_you_mean(found, candidates.iter().copied())
        }
        _ if message.contains("table, expected a list") => {
            Some("a list of tables has double brackets, such as `[[model]]`".into())
        }
        _ => None,
    };
    report.add(error.span().unwrap_or(0..0), message).help = help;
}
