//! What templates expect of Python: `json.dumps` and `str`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// How deep lists and objects may nest.
const DEPTH_MAX: usize = 200;

/// Noncharacters that guard user text (see `guard`); never escaped, so that they can be taken out again.
pub(super) const GUARDS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// The `tojson` filter as transformers defines it:
/// `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let arg = |at: usize, name: &str| match args.0.get(at) {
        Some(given) => Ok(Some(given.clone())),
        None => kwargs.get::<Option<Value>>(name),
    };
    let given = |v: &Value| !v.is_none() && !v.is_undefined();
    let indent = match arg(1, "indent")?.filter(given) {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(n) => Some(" ".repeat(usize::try_from(n)?.min(64))),
    };
    let separators = arg(2, "separators")?.filter(given);
    let separator = |at: usize, default: &str| -> Result<String, Error> {
        let Some(pair) = &separators else { return Ok(default.to_owned()) };
        let text = pair.get_item_by_index(at)?;
        Ok(text.as_str().unwrap_or(default).to_owned())
    };
    let json = Json {
        ascii: arg(0, "ensure_ascii")?.is_some_and(|v| v.is_true()),
        item: separator(0, if indent.is_some() { "," } else { ", " })?,
        key: separator(1, ": ")?,
        sort: arg(3, "sort_keys")?.is_some_and(|v| v.is_true()),
        indent,
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    json.write(&mut out, value, 0)?;
    Ok(Value::from_safe_string(out))
}

/// The options of one `json.dumps`.
struct Json {
    ascii: bool,
    item: String,
    key: String,
    sort: bool,
    indent: Option<String>,
}

impl Json {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value, ["NaN", "Infinity", "-Infinity"])),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.sequence(out, ('[', ']'), items.len(), depth, |out, i| self.write(out, &items[i], depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.sequence(out, ('{', '}'), keys.len(), depth, |out, i| {
                    self.map_key(out, &keys[i])?;
                    out.push_str(&self.key);
                    self.write(out, &value.get_item(&keys[i])?, depth + 1)
                })?;
            }
            other => {
                let message = format!("Object of type {other} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    /// Python turns keys that are not text into text.
    fn map_key(&self, out: &mut String, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.string(out, key.as_str().unwrap_or_default()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                out.push('"');
                self.write(out, key, 0)?;
                out.push('"');
            }
            other => {
                let message = format!("keys must be str, int, float, bool or None, not {other}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn sequence(
        &self,
        out: &mut String,
        (open, close): (char, char),
        n: usize,
        depth: usize,
        mut item: impl FnMut(&mut String, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for i in 0..n {
            if i > 0 {
                out.push_str(&self.item);
            }
            self.new_line(out, depth + 1);
            item(out, i)?;
        }
        if n > 0 {
            self.new_line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn new_line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !(' '..='~').contains(&c) && !GUARDS.contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// JSON as a template's value.
pub(super) fn value_of(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(b) => Value::from(*b),
        serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
            (Some(n), ..) => Value::from(n),
            (_, Some(n), _) => Value::from(n),
            (.., f) => Value::from(f.unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(value_of).collect::<Vec<Value>>().into(),
        serde_json::Value::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), value_of(v)))),
    }
}

/// What `str(value)` gives in Python.
pub(super) fn python_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::String => value.as_str().unwrap_or_default().to_owned(),
        _ => python_repr(value, 0),
    }
}

fn python_repr(value: &Value, depth: usize) -> String {
    let items = |open: &str, close: &str, parts: Vec<String>| format!("{open}{}{close}", parts.join(", "));
    match value.kind() {
        _ if depth > DEPTH_MAX => "...".to_owned(),
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => (if value.is_true() { "True" } else { "False" }).to_owned(),
        ValueKind::Number => number(value, ["nan", "inf", "-inf"]),
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq => items(
            "[",
            "]",
            value.try_iter().map(|i| i.map(|v| python_repr(&v, depth + 1)).collect()).unwrap_or_default(),
        ),
        ValueKind::Map => {
            let entry = |key: Value| {
                let item = value.get_item(&key).unwrap_or_default();
                format!("{}: {}", python_repr(&key, depth + 1), python_repr(&item, depth + 1))
            };
            items("{", "}", value.try_iter().map(|keys| keys.map(entry).collect()).unwrap_or_default())
        }
        _ => value.to_string(),
    }
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || ('\u{7f}'..='\u{a0}').contains(&c) || c == '\u{ad}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Integers as they are; floats as `float.__repr__` writes them.
fn number(value: &Value, [nan, inf, minus_inf]: [&str; 3]) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(f) if f.is_nan() => nan.to_owned(),
        Ok(f) if f.is_infinite() => (if f > 0.0 { inf } else { minus_inf }).to_owned(),
        Ok(f) => float(f),
        Err(_) => value.to_string(),
    }
}

fn float(f: f64) -> String {
    let scientific = format!("{f:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if f == 0.0 || (-4..16).contains(&exponent) {
        let plain = f.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_as_python_writes_them() {
        for (f, expected) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.0 / 3.0, "0.3333333333333333"),
            (5e-324, "5e-324"),
        ] {
            assert_eq!(float(f), expected);
        }
    }

    #[test]
    fn text_of_values() {
        let value = value_of(&serde_json::json!([null, true, 1, 2.0, "it's", "a\n\"'", {"k": []}]));
        assert_eq!(python_str(&value), r#"[None, True, 1, 2.0, "it's", 'a\n"\'', {'k': []}]"#);
        assert_eq!(python_str(&Value::from("x")), "x");
        assert_eq!(python_str(&Value::UNDEFINED), "");
    }
}
