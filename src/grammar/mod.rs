//! Texts held to a form: JSON, a schema, an expression, a grammar. Turns a [`Constraint`] and the tokens so far into the
//! set of tokens that may follow.
//!
//! The parsing is `llguidance`'s. Its limits bound what a client's schema may cost, at the start and in every step; what
//! exceeds them is refused by name. No reference to a document elsewhere is ever followed.

use crate::engine::{Constrain, Constrainer, TokenMask};
use crate::text::Tokenizer;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use playhouse_actors::engine::{Constraint, RequestError};
use std::cell::OnceCell;
use std::sync::Arc;

/// The deepest JSON that a schema may be written in.
const SCHEMA_DEPTH_MAX: usize = 64;

/// Why a constraint cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is not JSON.
    #[error("the schema is no JSON: {0}")]
    NotJson(String),
    /// It is too deep.
    #[error("the schema is {found} levels deep, expected at most {SCHEMA_DEPTH_MAX}")]
    TooDeep {
        /// Levels.
        found: usize,
    },
    /// It is wrong, uses what is not supported, or exceeds a limit.
    #[error("{0}")]
    Refused(String),
}

/// Makes the constraints of one vocabulary. Building it takes a second for the largest ones; it is shared after that.
pub struct Grammars {
    factory: ParserFactory,
    n_vocab: usize,
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").field("n_vocab", &self.n_vocab).finish_non_exhaustive()
    }
}

impl Grammars {
    /// For the vocabulary of `tokenizer`.
    ///
    /// # Errors
    /// [`GrammarError::Refused`] for a vocabulary without an end-of-text token.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let ids = tokenizer.special_ids();
        let Some(eos) = ids.eos.or(tokenizer.stop_ids().first().copied()) else {
            return Err(GrammarError::Refused("the vocabulary has no end-of-text token".into()));
        };
        let n_vocab = tokenizer.n_vocab();
        let info = TokRxInfo::new(u32::try_from(n_vocab).expect("ids are 32 bits"), eos);
        let words: Vec<Vec<u8>> = (0..info.vocab_size).map(|id| word(tokenizer, id)).collect();
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(TokTrie::from(&info, &words)));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices).map_err(refused)?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            // A tenth of a second at the start and some milliseconds in a step, at the speeds that llguidance states.
            initial_lexer_fuel: 1_000_000,
            step_lexer_fuel: 100_000,
            step_max_items: 50_000,
            max_lexer_states: 50_000,
            max_grammar_size: 100_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory, n_vocab })
    }

    /// Checks that a constraint can be used.
    ///
    /// # Errors
    /// [`GrammarError`].
    pub fn check(&self, constraint: &Constraint) -> Result<(), GrammarError> {
        self.matcher(constraint).map(drop)
    }

    fn matcher(&self, constraint: &Constraint) -> Result<Matcher, GrammarError> {
        let grammar = match constraint {
            Constraint::JsonObject => TopLevelGrammar::from_json_schema(spaced(serde_json::json!({"type": "object"}))),
            Constraint::JsonSchema(text) => TopLevelGrammar::from_json_schema(schema(text)?),
            Constraint::Regex(text) => TopLevelGrammar::from_regex(text),
            Constraint::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let matcher = Matcher::new(Ok(self.factory.create_parser(grammar).map_err(refused)?));
        match matcher.get_error() {
            Some(error) => Err(GrammarError::Refused(error)),
            None => Ok(matcher),
        }
    }
}

fn refused(error: impl std::fmt::Display) -> GrammarError {
    GrammarError::Refused(error.to_string())
}

/// A token's bytes; those of tokens that are no text are marked, so that no text leads to them.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if !tokenizer.is_control(id) {
        return bytes.to_vec();
    }
    [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
}

fn schema(text: &str) -> Result<serde_json::Value, GrammarError> {
    let found = depth(text);
    if found > SCHEMA_DEPTH_MAX {
        return Err(GrammarError::TooDeep { found });
    }
    serde_json::from_str(text).map(spaced).map_err(|error| GrammarError::NotJson(error.to_string()))
}

/// With one way to write spaces: a model that may write as many as it likes may never write anything else.
fn spaced(mut schema: serde_json::Value) -> serde_json::Value {
    if let Some(fields) = schema.as_object_mut() {
        let spaces = serde_json::json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        fields.insert("x-guidance".into(), spaces);
    }
    schema
}

/// The deepest nesting of brackets outside of strings.
fn depth(json: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => depth += 1,
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

impl Constrainer for Grammars {
    fn start(
        &self,
        constraint: &Constraint,
        stop_ids: &[u32],
        emitted: &[u32],
    ) -> Result<Box<dyn Constrain>, RequestError> {
        let matcher = self.matcher(constraint).map_err(|error| invalid(&error.to_string()))?;
        let mut text = HeldText { matcher, stop_ids: stop_ids.to_vec() };
        emitted.iter().try_for_each(|token| text.push(*token))?;
        Ok(Box::new(text))
    }
}

/// Where a vocabulary comes from when it is needed.
pub type VocabularySource = Box<dyn Fn() -> Result<Tokenizer, String> + Send>;

/// [`Grammars`] that are built when the first request asks for them: most engines never are asked.
pub struct LazyGrammars {
    source: VocabularySource,
    built: OnceCell<Result<Grammars, String>>,
}

impl LazyGrammars {
    /// Reads the vocabulary from `source` when it is needed.
    pub fn new(source: VocabularySource) -> Self {
        Self { source, built: OnceCell::new() }
    }
}

impl Constrainer for LazyGrammars {
    fn start(
        &self,
        constraint: &Constraint,
        stop_ids: &[u32],
        emitted: &[u32],
    ) -> Result<Box<dyn Constrain>, RequestError> {
        let build = || Grammars::new(&(self.source)()?).map_err(|error| error.to_string());
        let grammars = self.built.get_or_init(build).as_ref().map_err(|error| invalid(error))?;
        grammars.start(constraint, stop_ids, emitted)
    }
}

fn invalid(found: &str) -> RequestError {
    let expected = "a form that can be held to within the limits";
    RequestError::InvalidParam { param: "constraint".into(), found: found.into(), expected: expected.into() }
}

/// One text that is held to its form.
struct HeldText {
    matcher: Matcher,
    stop_ids: Vec<u32>,
}

impl Constrain for HeldText {
    fn mask(&mut self, n_vocab: usize) -> Result<TokenMask, RequestError> {
        let mut mask = TokenMask::none(n_vocab);
        if !self.matcher.is_stopped() {
            let allowed = self.matcher.compute_mask().map_err(|error| invalid(&error.to_string()))?;
            allowed.iter_set_entries(|id| {
                if id < n_vocab {
                    mask.allow(u32::try_from(id).expect("ids are 32 bits"));
                }
            });
        }
        if self.matcher.is_stopped() || self.matcher.is_accepting().map_err(|error| invalid(&error.to_string()))? {
            self.stop_ids.iter().for_each(|id| mask.allow(*id));
        }
        Ok(mask)
    }

    fn push(&mut self, token: u32) -> Result<(), RequestError> {
        if self.stop_ids.contains(&token) || self.matcher.is_stopped() {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|error| invalid(&error.to_string()))
    }
}

#[cfg(test)]
mod tests;
