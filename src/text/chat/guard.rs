//! Keeps what users write from becoming control tokens.
//!
//! A template's output is one text, in which `<|im_end|>` may come from the template or from a user who typed it.
//! Before rendering, every place in user text where a control token begins gets a guard character after the token's
//! first character: a Unicode noncharacter that occurs nowhere in the conversation. The guard travels through
//! whatever the template does, and afterwards its places are noted and it is taken out again. Text that only begins
//! a control token is guarded too, since the template may put the other half right behind it.

use serde_json::{Map, Value};

use super::python::GUARDS;

/// Marks user text.
pub(super) struct Guard<'a> {
    texts: Vec<&'a str>,
    mark: char,
}

impl<'a> Guard<'a> {
    /// A guard against these control tokens, for a conversation that `seen` gives the text of.
    ///
    /// `None` if there is nothing to guard against, or if the conversation contains all 32 noncharacters that could
    /// serve as marks.
    pub(super) fn new(control_texts: impl Iterator<Item = &'a str>, seen: &[&Value]) -> Option<Guard<'a>> {
        let texts: Vec<&str> = control_texts.filter(|t| !t.is_empty()).collect();
        let mark = GUARDS.into_iter().find(|mark| !seen.iter().any(|value| contains(value, *mark)))?;
        (!texts.is_empty()).then_some(Guard { texts, mark })
    }

    /// Puts marks into all text of `value`, object keys included; says whether there was anything to mark.
    pub(super) fn mark(&self, value: &mut Value) -> bool {
        match value {
            Value::String(text) => match self.marked(text) {
                Some(marked) => {
                    *text = marked;
                    true
                }
                None => false,
            },
            // No short circuit: all items are to be marked.
            Value::Array(items) => items.iter_mut().fold(false, |any, item| self.mark(item) | any),
            Value::Object(map) => self.mark_map(map),
            _ => false,
        }
    }

    fn mark_map(&self, map: &mut Map<String, Value>) -> bool {
        let mut any = map.values_mut().fold(false, |any, item| self.mark(item) | any);
        if map.keys().any(|key| self.marked(key).is_some()) {
            *map = std::mem::take(map).into_iter().map(|(key, v)| (self.marked(&key).unwrap_or(key), v)).collect();
            any = true;
        }
        any
    }

    fn marked(&self, text: &str) -> Option<String> {
        let mut places: Vec<usize> = Vec::new();
        for control in &self.texts {
            let first = control.chars().next().map_or(1, char::len_utf8);
            let mut from = 0;
            while let Some(found) = text[from..].find(control) {
                places.push(from + found + first);
                from += found + first;
            }
            // The text may end in the beginning of a control token.
            let cuts = control.char_indices().map(|(at, _)| at).skip(1);
            places.extend(cuts.filter(|&n| text.ends_with(&control[..n])).map(|n| text.len() - n + first));
        }
        if places.is_empty() {
            return None;
        }
        places.sort_unstable();
        places.dedup();
        let mut marked = String::with_capacity(text.len() + 3 * places.len());
        let mut from = 0;
        for place in places {
            marked.push_str(&text[from..place]);
            marked.push(self.mark);
            from = place;
        }
        marked.push_str(&text[from..]);
        Some(marked)
    }

    /// Takes the marks out; gives the text and where they were.
    pub(super) fn unmark(&self, marked: &str) -> (String, Vec<usize>) {
        let (mut text, mut places) = (String::with_capacity(marked.len()), Vec::new());
        for (i, part) in marked.split(self.mark).enumerate() {
            if i > 0 {
                places.push(text.len());
            }
            text.push_str(part);
        }
        places.dedup();
        (text, places)
    }
}

fn contains(value: &Value, c: char) -> bool {
    match value {
        Value::String(text) => text.contains(c),
        Value::Array(items) => items.iter().any(|item| contains(item, c)),
        Value::Object(map) => map.iter().any(|(key, item)| key.contains(c) || contains(item, c)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CONTROL: [&str; 3] = ["<|a|>", "<|ab|>", "</s>"];

    fn places(text: &str) -> Vec<usize> {
        let mut value = json!(text);
        let guard = Guard::new(CONTROL.into_iter(), &[&value]).unwrap();
        guard.mark(&mut value);
        let (clean, places) = guard.unmark(value.as_str().unwrap());
        assert_eq!(clean, text);
        places
    }

    #[test]
    fn whole_tokens_and_beginnings_at_the_end() {
        assert_eq!(places("x<|a|>y</s>"), [2, 8]);
        assert_eq!(places("<|a|"), [1]);
        assert_eq!(places("a <"), [3]);
        assert!(places("< | a").is_empty());
        assert_eq!(places("<<<|ab|><|ab"), [3, 9]);
    }

    #[test]
    fn keys_and_nested_values_are_marked_and_another_mark_is_taken_if_needed() {
        let mut value = json!({"a</s>": ["</s>", 1, {"k": "\u{FDD0}</s>"}], "b": null});
        let original = value.clone();
        let guard = Guard::new(CONTROL.into_iter(), &[&original]).unwrap();
        assert_eq!(guard.mark, '\u{FDD1}');
        assert!(guard.mark(&mut value));
        let (clean, places) = guard.unmark(&value.to_string());
        assert_eq!((clean, places.len()), (original.to_string(), 3));
    }
}
