//! JSON that is refused while it is read: at the first element too many, and not after everything was built. What is absurd
//! costs no more than what is allowed.
//!
//! How much is too much says [`crate::client::limits`]; what has no bound there, because only JSON has it, has one here.

use crate::client::{Invalid, limits};
use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

/// Values of one tree: a long conversation has a few for each of its messages.
const VALUES_MAX: usize = 1 << 16;

/// What an error of the bounds begins with. serde's errors are texts, so the text has to tell them from others.
const MARK: &str = "out of bounds: ";

/// The error of something of the right type that is too much.
fn refused<E: de::Error>(invalid: &Invalid) -> E {
    E::custom(format_args!("{MARK}{invalid}"))
}

/// Whether a message is that of such an error: then the message itself, and the parameter if it names one.
pub(super) fn read_refusal(message: &str) -> Option<(&str, Option<&str>)> {
    let message = message.strip_prefix(MARK)?;
    let param = message.strip_prefix('`').and_then(|rest| rest.split_once('`')).map(|(param, _)| param);
    Some((message, param))
}

/// All of a list, which may have so many elements.
pub(super) fn elements<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    mut list: A,
    param: &'static str,
    most: usize,
) -> Result<Vec<T>, A::Error> {
    let mut all = Vec::new();
    while let Some(element) = list.next_element()? {
        all.push(element);
        at_most(param, all.len(), most)?;
    }
    Ok(all)
}

/// All of an object, which may have so many members, in their order.
pub(super) fn members<'de, T: Deserialize<'de>, A: MapAccess<'de>>(
    mut object: A,
    param: &'static str,
    most: usize,
) -> Result<Vec<(String, T)>, A::Error> {
    let mut all = Vec::new();
    while let Some(member) = object.next_entry()? {
        all.push(member);
        at_most(param, all.len(), most)?;
    }
    Ok(all)
}

/// So much was found so far. The rest was not looked at: how much it would have been is not known.
pub(super) fn at_most<E: de::Error>(param: &'static str, found: usize, most: usize) -> Result<(), E> {
    limits::at_most(param, found as u64, 0, most as u64)
        .map_err(|invalid| refused(&Invalid { found: format!("more than {most}"), ..invalid }))
}

/// A JSON document as text without spaces, written while it is read. For schemas, which go to the engine as text.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) text: String,
    /// Whether it is an object or a boolean: what a schema can be.
    pub(super) is_schema: bool,
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut out = Vec::new();
        // A text is taken for a document itself: it has no quotes to be measured.
        match deserializer.deserialize_any(Writer { out: &mut out, is_outermost: true })? {
            Some(text) => Ok(Self { text, is_schema: false }),
            None => {
                let is_schema = matches!(out.first(), Some(b'{' | b't' | b'f'));
                String::from_utf8(out).map(|text| Self { text, is_schema }).map_err(de::Error::custom)
            }
        }
    }
}

/// Writes what it visits, but for a text that is all there is: that it returns.
struct Writer<'a> {
    out: &'a mut Vec<u8>,
    is_outermost: bool,
}

impl Writer<'_> {
    fn inner(&mut self) -> Writer<'_> {
        Writer { out: self.out, is_outermost: false }
    }

    fn put<E: de::Error>(self, value: &(impl serde::Serialize + ?Sized)) -> Result<Option<String>, E> {
        serde_json::to_writer(&mut *self.out, value).map_err(E::custom)?;
        self.measure()?;
        Ok(None)
    }

    fn measure<E: de::Error>(&self) -> Result<(), E> {
        at_most("response_format", self.out.len(), limits::CONSTRAINT_BYTES_MAX)
    }
}

impl<'de> DeserializeSeed<'de> for Writer<'_> {
    type Value = Option<String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<String>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Writer<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Option<String>, E> {
        self.put(&())
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Option<String>, E> {
        self.put(&value)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Option<String>, E> {
        self.put(&value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Option<String>, E> {
        self.put(&value)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Option<String>, E> {
        self.put(&value)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Option<String>, E> {
        if self.is_outermost { Ok(Some(value.to_owned())) } else { self.put(value) }
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut list: A) -> Result<Option<String>, A::Error> {
        self.out.push(b'[');
        let begin = self.out.len();
        while list.next_element_seed(self.inner())?.is_some() {
            self.out.push(b',');
            self.measure()?;
        }
        close(self.out, begin, b']');
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut object: A) -> Result<Option<String>, A::Error> {
        self.out.push(b'{');
        let begin = self.out.len();
        while object.next_key_seed(self.inner())?.is_some() {
            self.out.push(b':');
            object.next_value_seed(self.inner())?;
            self.out.push(b',');
            self.measure()?;
        }
        close(self.out, begin, b'}');
        Ok(None)
    }
}

/// Ends a list or object: the last comma was one too many.
fn close(out: &mut Vec<u8>, begin: usize, bracket: u8) {
    if out.len() > begin {
        out.pop();
    }
    out.push(bracket);
}

/// A tree of bounded size.
#[derive(Debug)]
pub(super) struct Tree(pub(super) Value);

/// A list of trees that together have a bounded size.
#[derive(Debug)]
pub(super) struct Trees(pub(super) Vec<Value>);

/// An object of bounded size.
#[derive(Debug)]
pub(super) struct Object(pub(super) Map<String, Value>);

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Builder(&mut 0)).map(Tree)
    }
}

impl<'de> Deserialize<'de> for Trees {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Vec<Value>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Vec<Value>, A::Error> {
                Builder(&mut 0).list(list)
            }
        }
        deserializer.deserialize_seq(List).map(Trees)
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Map<String, Value>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<Map<String, Value>, A::Error> {
                Builder(&mut 0).object(object)
            }
        }
        deserializer.deserialize_map(Members).map(Object)
    }
}

/// Builds a tree and counts its values.
struct Builder<'a>(&'a mut usize);

impl Builder<'_> {
    fn list<'de, A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Value>, A::Error> {
        let mut all = Vec::new();
        while let Some(value) = list.next_element_seed(Builder(self.0))? {
            all.push(value);
        }
        Ok(all)
    }

    fn object<'de, A: MapAccess<'de>>(self, mut object: A) -> Result<Map<String, Value>, A::Error> {
        let mut all = Map::new();
        while let Some(name) = object.next_key::<String>()? {
            all.insert(name, object.next_value_seed(Builder(self.0))?);
        }
        Ok(all)
    }
}

impl<'de> DeserializeSeed<'de> for Builder<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        *self.0 += 1;
        if *self.0 > VALUES_MAX {
            return Err(de::Error::custom(format_args!("{MARK}it has more than {VALUES_MAX} JSON values")));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Builder<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Value, A::Error> {
        self.list(list).map(Value::Array)
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<Value, A::Error> {
        self.object(object).map(Value::Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn documents_are_written_as_they_are() {
        for text in
            [r#"{"type":"object","b":[1,-2,2.5,true,false,null,"a\n\"é"],"a":{},"c":[]}"#, "true", "[]", "{}", "7"]
        {
            let spaced = format!(" {}", text.replace(',', " , "));
            let document: Document = serde_json::from_str(&spaced).expect("JSON");
            assert_eq!(document.text, text);
            let value: Value = serde_json::from_str(text).expect("JSON");
            assert_eq!(document.text, value.to_string());
            assert_eq!(document.is_schema, value.is_object() || value.is_boolean(), "{text}");
        }
        let quoted: Document = serde_json::from_value(json!("{\"type\": \"string\"}")).expect("JSON");
        assert_eq!((quoted.text.as_str(), quoted.is_schema), ("{\"type\": \"string\"}", false));
    }

    #[test]
    fn documents_are_as_long_as_the_validator_lets_them() {
        let read = |n: usize| serde_json::from_value::<Document>(json!(["x".repeat(n)]));
        let fits = read(limits::CONSTRAINT_BYTES_MAX - 4).expect("it fits");
        assert_eq!(fits.text.len(), limits::CONSTRAINT_BYTES_MAX);
        let error = read(limits::CONSTRAINT_BYTES_MAX).expect_err("too long").to_string();
        let (message, param) = read_refusal(&error).expect("marked");
        assert_eq!((param, message.starts_with("`response_format` is more than")), (Some("response_format"), true));
        let nothing = |n: usize| serde_json::from_str::<Document>(&format!("[{}]", vec!["[]"; n].join(",")));
        let n = (limits::CONSTRAINT_BYTES_MAX - 1) / 3;
        assert!(nothing(n).is_ok() && nothing(n + 1).is_err(), "brackets are bytes, too");
    }

    #[test]
    fn trees_are_what_serde_makes_of_them() {
        let text = r#"{"a": [1, -2, 2.5, true, null, "x", {"b": {}}], "c": "é"}"#;
        let value: Value = serde_json::from_str(text).expect("JSON");
        assert_eq!(serde_json::from_str::<Tree>(text).expect("JSON").0, value);
        assert_eq!(Value::Object(serde_json::from_str::<Object>(text).expect("JSON").0), value);
        assert_eq!(serde_json::from_str::<Trees>("[1, {}]").expect("JSON").0, [json!(1), json!({})]);
        assert!(serde_json::from_str::<Trees>("{}").is_err() && serde_json::from_str::<Object>("[]").is_err());
    }

    #[test]
    fn trees_are_counted_over_all_their_branches() {
        let list = |n: usize| format!("[{}]", vec!["[0]"; n].join(","));
        assert!(serde_json::from_str::<Trees>(&list(VALUES_MAX / 2)).is_ok());
        let error = serde_json::from_str::<Trees>(&list(VALUES_MAX / 2 + 1)).expect_err("too many").to_string();
        assert_eq!(read_refusal(&error).expect("marked").1, None);
    }
}
