//! What the engine asks of a constraint: which tokens may follow. The engine does not know what they spell.

use super::TokenMask;
use playhouse_actors::engine::{Constraint, RequestError};

/// Starts constrained texts.
pub trait Constrainer: Send {
    /// A text that is held to `constraint`, after the tokens it has already. Stop ids may be chosen where it may end.
    ///
    /// # Errors
    /// [`RequestError::InvalidParam`] if the constraint cannot be used.
    fn start(
        &self,
        constraint: &Constraint,
        stop_ids: &[u32],
        emitted: &[u32],
    ) -> Result<Box<dyn Constrain>, RequestError>;
}

/// One constrained text.
pub trait Constrain: Send {
    /// The tokens that may follow, of a vocabulary of `n_vocab`.
    ///
    /// # Errors
    /// [`RequestError`] if a limit is exceeded: the request fails.
    fn mask(&mut self, n_vocab: usize) -> Result<TokenMask, RequestError>;

    /// Takes note of the token that was chosen.
    ///
    /// # Errors
    /// [`RequestError`] if it was not allowed, or a limit is exceeded.
    fn push(&mut self, token: u32) -> Result<(), RequestError>;
}
