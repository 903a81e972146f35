//! One question to an actor, and its answer if there is one.

use ractor::rpc::CallResult;
use ractor::{ActorRef, Message, RpcReplyPort};
use std::time::Duration;

/// Asks; `None` if the actor is gone, drops the question, or takes longer than `patience` (without one, it is waited for
/// as long as it lives).
pub(crate) async fn ask<M: Message, T: Send + 'static>(
    actor: &ActorRef<M>,
    question: impl FnOnce(RpcReplyPort<T>) -> M,
    patience: Option<Duration>,
) -> Option<T> {
    match ractor::rpc::call(actor, question, patience).await {
        Ok(CallResult::Success(answer)) => Some(answer),
        Ok(CallResult::Timeout | CallResult::SenderError) | Err(_) => None,
    }
}
