//! Constraints over the embedded model's vocabulary, driven without a model: whatever the masks allow keeps the form.

use super::*;
use crate::basho;
use crate::gguf::GgufFile;

fn tokenizer() -> Tokenizer {
    let file = GgufFile::from_static(basho::LABEL, basho::GGUF).expect("the embedded model is sound");
    Tokenizer::from_gguf(&file).expect("its vocabulary is sound")
}

/// Walks along the masks, choosing by a hash of the step, until a stop id comes or the steps are over.
fn walk(constraint: &Constraint, seed: u64, steps: u64) -> (String, bool) {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer).expect("it has an end-of-text token");
    let stop_ids = tokenizer.stop_ids().to_vec();
    let mut held = grammars.start(constraint, &stop_ids, &[]).expect("the constraint is usable");
    let mut ids = Vec::new();
    for step in 0..steps {
        let mask = held.mask(tokenizer.n_vocab()).expect("within the limits");
        let allowed: Vec<u32> = (0..tokenizer.n_vocab() as u32).filter(|id| mask.allows(*id)).collect();
        assert!(!allowed.is_empty(), "after {:?}", tokenizer.decode(&ids, false));
        if let Some(stop) = allowed.iter().find(|id| stop_ids.contains(id)) {
            held.push(*stop).expect("a stop id is no text");
            return (tokenizer.decode(&ids, false), true);
        }
        let mut hash = (seed * 1000 + step).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        hash ^= hash >> 31;
        let token = allowed[(hash % allowed.len() as u64) as usize];
        held.push(token).expect("the mask allowed it");
        ids.push(token);
    }
    (tokenizer.decode(&ids, false), false)
}

#[test]
fn expressions_are_matched_whole() {
    for seed in 0..8 {
        let (text, ended) = walk(&Constraint::Regex("(moon|rain){1,3} [0-9]{2}".into()), seed, 64);
        assert!(ended, "{text}");
        let form = regex_automata::meta::Regex::new(r"^(moon|rain){1,3} [0-9]{2}$").expect("a good expression");
        assert!(form.is_match(text.trim_start_matches(' ')) || form.is_match(&text), "{text:?}");
    }
}

#[test]
fn schemas_give_json_that_they_accept() {
    let schema = r#"{"type":"object","properties":{"season":{"enum":["spring","autumn"]},"lines":{"type":"integer","minimum":1,"maximum":9}},"required":["season","lines"],"additionalProperties":false}"#;
    for seed in 0..8 {
        let (text, ended) = walk(&Constraint::JsonSchema(schema.into()), seed, 400);
        assert!(ended, "{text}");
        let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(["spring", "autumn"].contains(&value["season"].as_str().expect("a text")), "{text}");
        assert!((1..=9).contains(&value["lines"].as_u64().expect("a number")), "{text}");
    }
}

#[test]
fn a_text_goes_on_where_another_engine_left_it() {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer).expect("it has an end-of-text token");
    let constraint = Constraint::JsonObject;
    let mut first = grammars.start(&constraint, tokenizer.stop_ids(), &[]).expect("usable");
    let mut emitted = Vec::new();
    for _ in 0..5 {
        let mask = first.mask(tokenizer.n_vocab()).expect("within the limits");
        let token = (0..tokenizer.n_vocab() as u32).filter(|id| mask.allows(*id)).last().expect("something is allowed");
        first.push(token).expect("allowed");
        emitted.push(token);
    }
    let mut second = grammars.start(&constraint, tokenizer.stop_ids(), &emitted).expect("usable");
    assert_eq!(first.mask(tokenizer.n_vocab()), second.mask(tokenizer.n_vocab()));
}

#[test]
fn what_cannot_be_held_to_is_refused_in_words() {
    let grammars = Grammars::new(&tokenizer()).expect("it has an end-of-text token");
    let check = |constraint: Constraint| grammars.check(&constraint).expect_err("it is not usable");
    assert!(matches!(check(Constraint::JsonSchema("{".into())), GrammarError::NotJson(_)));
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(check(Constraint::JsonSchema(deep)), GrammarError::TooDeep { found: 100_000 });
    for constraint in [
        Constraint::Regex("(".into()),
        Constraint::Lark("start: nowhere".into()),
        Constraint::JsonSchema(r#"{"type":"nonsense"}"#.into()),
        Constraint::JsonSchema(r#"{"$ref":"https://example.com/schema.json"}"#.into()),
    ] {
        let error = grammars.check(&constraint).expect_err(&format!("{constraint:?}"));
        assert!(!error.to_string().is_empty());
    }
}

#[test]
fn depth_is_that_of_brackets() {
    assert_eq!(depth("[[{}]]"), 3);
    assert_eq!(depth(r#"{"a":"[[[[\"[["}"#), 1);
}
