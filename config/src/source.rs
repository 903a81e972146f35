//! The texts a configuration comes from (the file, environment variables, command line arguments), laid one after the
//! other so that one byte range says both which text and where in it.

use serde::de::{Deserialize, Deserializer};
use std::ops::Range;
use toml::Spanned;

/// A value and the bytes it was read from, as offsets into a [`Sources`].
#[derive(Debug, Clone)]
pub(crate) struct At<T>(Spanned<T>);

impl<T> At<T> {
    /// The value.
    pub(crate) fn value(&self) -> &T {
        self.0.get_ref()
    }

    /// Where it was written.
    pub(crate) fn span(&self) -> Range<usize> {
        self.0.span()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for At<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Spanned::deserialize(deserializer).map(Self)
    }
}

impl<T: schemars::JsonSchema> schemars::JsonSchema for At<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> std::borrow::Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        T::json_schema(generator)
    }
}

/// One text.
#[derive(Debug, Clone)]
struct Source {
    label: String,
    text: String,
    base: usize,
}

/// All texts of one configuration.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sources {
    list: Vec<Source>,
}

/// A byte range as people read it: lines and columns are counted from 1, columns in characters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file, the environment variable or the argument.
    pub source: String,
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
    /// The whole line.
    pub line_text: String,
    /// How many characters of the line are meant, at least 1.
    pub width: usize,
}

impl Sources {
    /// Adds a text and returns the offset of its first byte.
    pub(crate) fn push(&mut self, label: impl Into<String>, text: impl Into<String>) -> usize {
        // One byte lies between texts, so that the end of one is never the start of the next.
        let base = self.list.last().map_or(0, |last| last.base + last.text.len() + 1);
        self.list.push(Source { label: label.into(), text: text.into(), base });
        base
    }

    /// Whether a byte range lies in the first text, which is the file.
    pub(crate) fn is_of_file(&self, span: &Range<usize>) -> bool {
        self.list.get(1).is_none_or(|second| span.start < second.base)
    }

    /// The first place of `needle` inside `span`, or `span` where the text spells it otherwise.
    pub(crate) fn find_within(&self, span: Range<usize>, needle: &str) -> Range<usize> {
        let found = self.list.iter().rev().find(|source| source.base <= span.start).and_then(|source| {
            let text = source.text.get(span.start - source.base..span.end - source.base)?;
            text.find(needle)
        });
        found.map_or(span.clone(), |at| span.start + at..span.start + at + needle.len())
    }

    /// Finds a byte range. A range outside every text, which only a text without bytes has, is the start of the first.
    pub(crate) fn place(&self, span: Range<usize>) -> Place {
        let found = self.list.iter().rev().find(|source| source.base <= span.start);
        let Some(source) = found else {
            return Place { source: "configuration".into(), line: 1, column: 1, line_text: String::new(), width: 1 };
        };
        let start = floor_char(&source.text, span.start - source.base);
        let end = floor_char(&source.text, span.end.saturating_sub(source.base).max(start));
        let line_start = source.text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = source.text[line_start..].find('\n').map_or(source.text.len(), |newline| line_start + newline);
        let width = source.text[start..end.min(line_end).max(start)].trim_end().chars().count();
        Place {
            source: source.label.clone(),
            line: source.text[..start].matches('\n').count() + 1,
            column: source.text[line_start..start].chars().count() + 1,
            line_text: source.text[line_start..line_end].trim_end_matches('\r').to_owned(),
            width: width.max(1),
        }
    }
}

fn floor_char(text: &str, offset: usize) -> usize {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    offset
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_lie_in_their_own_text() {
        let mut sources = Sources::default();
        sources.push("a.toml", "x = 1\nköy = 2\n");
        let base = sources.push("PLAYHOUSE_X", "oops");
        let key = sources.place(6..10);
        assert_eq!((key.source.as_str(), key.line, key.column, key.width), ("a.toml", 2, 1, 3));
        assert_eq!(key.line_text, "köy = 2");
        let env = sources.place(base + 1..base + 4);
        assert_eq!((env.source.as_str(), env.line, env.column, env.width), ("PLAYHOUSE_X", 1, 2, 3));
        assert_eq!(sources.place(5..6).width, 1, "a newline is shown as one mark at the end of its line");
    }
}
