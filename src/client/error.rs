//! Why a request was not taken.

use crate::grammar::GrammarError;
use crate::text::{TemplateError, TextError};
use playhouse_actors::Refusal;
use playhouse_actors::messages::Failure;

/// A parameter that is out of bounds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{param}` is {found}, expected {expected}")]
pub struct Invalid {
    /// The parameter, as clients write it.
    pub param: &'static str,
    /// What it was.
    pub found: String,
    /// What it may be.
    pub expected: String,
}

/// Why a request was not accepted. Nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// A parameter is out of bounds.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The model has no chat template, so it takes text and no conversations.
    #[error("model `{model}` has no chat template: ask it to go on with a text instead")]
    NoTemplate {
        /// The model.
        model: String,
    },
    /// The chat template refused the conversation.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// No text can be held to its constraint.
    #[error("the constraint cannot be used: {0}")]
    Constraint(#[from] GrammarError),
    /// The text cannot be turned into tokens.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The house refused it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It was accepted and failed, and there is no stream that could say so.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The program is ending.
    #[error("the host stopped while the request was prepared")]
    Stopped,
}
