//! What outranks the file: environment variables `PLAYHOUSE_*`, and above them command line arguments.

use crate::error::{Report, did_you_mean};
use crate::schema::Node;
use std::collections::BTreeMap;
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

/// Prefix of the environment variables that set keys: `host.limits.body` is `PLAYHOUSE_HOST_LIMITS_BODY`.
pub const ENV_PREFIX: &str = "PLAYHOUSE_";

/// Tables whose keys can be set from outside. A model has no name to set it by.
const TABLES: &[&str] = &["host", "defaults", "supervision"];

/// The layer above the file. The environment in it also answers `${env:NAME}`.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    env: BTreeMap<String, String>,
    arguments: Vec<Argument>,
}

#[derive(Debug, Clone)]
struct Argument {
    flag: String,
    key: String,
    value: String,
}

impl Overrides {
    /// Nothing, and an empty environment.
    pub fn none() -> Self {
        Self::default()
    }

    /// The environment of this process. Variables that are not UTF-8 are as good as unset.
    pub fn from_process_env() -> Self {
        let utf8 =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self { env: utf8.collect(), arguments: Vec::new() }
    }

    /// Sets an environment variable in this layer.
    #[must_use]
    pub fn with_env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Sets a key, such as `host.address`, from the command line. `flag` is what the user typed, for messages. The value
    /// is a TOML value, or a text without quotes; where a list is due, elements may be separated by commas.
    #[must_use]
    pub fn with_argument(mut self, flag: impl Into<String>, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.arguments.push(Argument { flag: flag.into(), key: key.into(), value: value.into() });
        self
    }

    pub(crate) fn env(&self, name: &str) -> Option<&str> {
        self.env.get(name).map(String::as_str)
    }

    /// Lays this layer over the file's table.
    pub(crate) fn apply<'t>(&'t self, table: &mut DeTable<'t>, schema: Node<'_>, report: &mut Report) {
        let keys = settable(schema);
        let by_variable: BTreeMap<String, &String> = keys.iter().map(|key| (variable(key), key)).collect();
        for (name, value) in self.env.iter().filter(|(name, _)| is_ours(name)) {
            match by_variable.get(name) {
                Some(key) => set(table, schema, key, &format!("environment variable {name}"), value, report),
                None => {
                    let base = report.sources.push("environment", name.as_str());
                    let help = did_you_mean(name, by_variable.keys().map(String::as_str));
                    let found = report.add(base..base + name.len(), format!("`{name}` sets no key"));
                    found.help = help.or(Some("see the keys in the configuration reference".into()));
                }
            }
        }
        for Argument { flag, key, value } in &self.arguments {
            if resolve(schema, key).is_some() {
                set(table, schema, key, &format!("argument {flag}"), value, report);
            } else {
                let base = report.sources.push(format!("argument {flag}"), key.as_str());
                let help = did_you_mean(key, keys.iter().map(String::as_str));
                report.add(base..base + key.len(), format!("unknown key `{key}`")).help = help;
            }
        }
    }
}

/// The environment variable of a key.
pub fn variable(key: &str) -> String {
    format!("{ENV_PREFIX}{}", key.replace('.', "_").to_ascii_uppercase())
}

fn is_ours(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(ENV_PREFIX) else { return false };
    TABLES.iter().any(|table| rest.strip_prefix(&table.to_ascii_uppercase()).is_some_and(|rest| rest.starts_with('_')))
}

/// Every key that can be set from outside, dotted.
pub(crate) fn settable(schema: Node<'_>) -> Vec<String> {
    fn walk(prefix: &str, node: Node<'_>, keys: &mut Vec<String>) {
        let names = node.keys();
        if names.is_empty() {
            keys.push(prefix.to_owned());
        }
        for name in names {
            if let Some(child) = node.key(name) {
                walk(&format!("{prefix}.{name}"), child, keys);
            }
        }
    }
    let mut keys = Vec::new();
    for table in TABLES {
        if let Some(node) = schema.key(table) {
            walk(table, node, &mut keys);
        }
    }
    keys
}

fn resolve<'a>(schema: Node<'a>, key: &str) -> Option<Node<'a>> {
    key.split('.').try_fold(schema, |node, part| node.key(part))
}

fn set<'t>(table: &mut DeTable<'t>, schema: Node<'_>, key: &str, label: &str, value: &'t str, report: &mut Report) {
    let Some(node) = resolve(schema, key) else { return };
    let base = report.sources.push(label, value);
    let whole = base..base + value.len();
    let parsed = match read(node, value, base) {
        Ok(parsed) => parsed,
        Err((span, message)) => {
            report.add(span, message);
            return;
        }
    };
    insert(table, key, parsed, whole);
}

/// Reads an override's value by what is due at `node`.
fn read<'t>(node: Node<'_>, text: &'t str, base: usize) -> Result<Spanned<DeValue<'t>>, (Range<usize>, String)> {
    let whole = base..base + text.len();
    let plain = |text: &str, at: usize| Spanned::new(at..at + text.len(), DeValue::String(text.to_owned().into()));
    if node.is_text() {
        return Ok(plain(text, base));
    }
    let structured = text.trim_start().starts_with(['[', '{', '"', '\'']);
    match DeValue::parse(text) {
        Ok(value) if structured || !value.get_ref().is_str() => Ok(shift(value, base)),
        Err(error) if structured => {
            let span = error.span().map_or(whole, |span| base + span.start..base + span.end);
            Err((span, error.message().to_owned()))
        }
        _ if node.items().is_some() => {
            let mut items = DeArray::new();
            let mut at = base;
            for item in text.split(',') {
                let indent = item.len() - item.trim_start().len();
                items.push(plain(item.trim(), at + indent));
                at += item.len() + 1;
            }
            Ok(Spanned::new(whole, DeValue::Array(items)))
        }
        _ => Ok(plain(text, base)),
    }
}

/// Moves every span by `base`.
pub(crate) fn shift(value: Spanned<DeValue<'_>>, base: usize) -> Spanned<DeValue<'_>> {
    let span = value.span().start + base..value.span().end + base;
    let moved = match value.into_inner() {
        DeValue::Array(items) => {
            let mut moved = DeArray::new();
            items.iter().for_each(|item| moved.push(shift(item.clone(), base)));
            DeValue::Array(moved)
        }
        DeValue::Table(entries) => {
            let mut moved = DeTable::new();
            for (key, value) in entries {
                let at = key.span().start + base..key.span().end + base;
                moved.insert(Spanned::new(at, key.into_inner()), shift(value, base));
            }
            DeValue::Table(moved)
        }
        other => other,
    };
    Spanned::new(span, moved)
}

fn insert<'t>(table: &mut DeTable<'t>, key: &str, value: Spanned<DeValue<'t>>, span: Range<usize>) {
    let Some((first, rest)) = key.split_once('.') else {
        table.remove(key);
        table.insert(Spanned::new(span, key.to_owned().into()), value);
        return;
    };
    if !table.contains_key(first) {
        let empty = Spanned::new(span.clone(), DeValue::Table(DeTable::new()));
        table.insert(Spanned::new(span.clone(), first.to_owned().into()), empty);
    }
    // Where the file has something else than a table, the type error that follows says so.
    if let Some(DeValue::Table(inner)) = table.get_mut(first).map(Spanned::get_mut) {
        insert(inner, rest, value, span);
    }
}
