//! What the tree holds of its router, whichever that is at the moment: a name, not a table. Tickets that find no router
//! are parked here, so that none is lost between two.

use super::{Concluded, RouterMsg};
use crate::engine::RequestId;
use crate::journal::Ticket;
use crate::messages::{Failure, Generate, Refusal, ReplicaId, Terminal};
use crate::stream::TokenStream;
use ractor::{ActorRef, MessagingErr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::Span;

/// Requests that may wait in the router's mailbox; ractor's mailboxes have no bound of their own.
const INBOX_MAX: usize = 4096;

/// Speaks to the router, whichever it is: it outlives a restart of the router.
#[derive(Debug, Clone, Default)]
pub struct RouterHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Who is the router now: a name, not a table.
    current: RwLock<Option<ActorRef<RouterMsg>>>,
    /// What came while there was no router and must not be lost: tickets. `None` when no router comes any more.
    parked: Mutex<Option<Vec<RouterMsg>>>,
    next_id: AtomicU64,
    inbox: Arc<Semaphore>,
    /// Until when a drain lets requests go on: what the next router must know, too.
    draining: Mutex<Option<Instant>>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            current: RwLock::new(None),
            parked: Mutex::new(Some(Vec::new())),
            next_id: AtomicU64::new(1),
            inbox: Arc::new(Semaphore::new(INBOX_MAX)),
            draining: Mutex::new(None),
        }
    }
}

impl RouterHandle {
    /// Asks for a stream.
    ///
    /// # Errors
    /// [`Refusal`]; nothing was accepted.
    pub async fn generate(&self, request: Generate) -> Result<TokenStream, Refusal> {
        self.generate_on(request, None).await
    }

    pub(crate) async fn generate_on(
        &self,
        request: Generate,
        prefer: Option<ReplicaId>,
    ) -> Result<TokenStream, Refusal> {
        let _room = self.shared.inbox.try_acquire().map_err(|_| Refusal::Overloaded)?;
        let (reply, answer) = ractor::concurrency::oneshot();
        let Some(router) = self.current() else { return Err(Refusal::RouterLost) };
        match router.send_message(RouterMsg::Generate { request, prefer, span: Span::current(), reply: reply.into() }) {
            Ok(()) => answer.await.unwrap_or(Err(Refusal::RouterLost)),
            Err(_) => Err(Refusal::RouterLost),
        }
    }

    /// Ends a request. One that has ended already is none of anybody's business.
    pub fn cancel(&self, id: RequestId) {
        self.tell(RouterMsg::Cancel(id));
    }

    /// The router's actor now, for raw messages.
    pub fn current(&self) -> Option<ActorRef<RouterMsg>> {
        self.shared.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells the router, if there is one.
    pub(crate) fn tell(&self, message: RouterMsg) {
        if let Some(router) = self.current() {
            // A router that is gone is replaced, and told everything again by those who know.
            let _ = router.send_message(message);
        }
    }

    /// Tells the router, or the next one if there is none now.
    pub(crate) fn post(&self, message: RouterMsg) {
        let refused = match self.current() {
            Some(router) => match router.send_message(message) {
                Err(MessagingErr::SendErr(message)) => Some(message),
                _ => None,
            },
            None => Some(message),
        };
        let Some(message) = refused else { return };
        if let Some(parked) = &mut *self.parked() {
            return parked.push(message);
        }
        self.end(message);
    }

    fn parked(&self) -> MutexGuard<'_, Option<Vec<RouterMsg>>> {
        self.shared.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No router comes any more: the client of a ticket learns it.
    fn end(&self, message: RouterMsg) {
        if let RouterMsg::Returned(open) = message {
            Ticket::reopen(open, self.clone()).conclude(Terminal::Failed(Failure::Draining));
        }
    }

    pub(crate) fn concluded(&self, id: RequestId, terminal: &Terminal) {
        let outcome = match terminal {
            Terminal::Completed { .. } | Terminal::Embedded { .. } => Concluded::Completed,
            Terminal::Failed(Failure::Poison { .. }) => Concluded::Poisoned,
            Terminal::Failed(_) => Concluded::Failed,
            Terminal::Cancelled => Concluded::Cancelled,
        };
        self.tell(RouterMsg::Concluded { id, outcome });
    }

    /// Makes `router` the one; what was parked goes to it.
    pub(crate) fn install(&self, router: Option<ActorRef<RouterMsg>>) {
        *self.shared.current.write().unwrap_or_else(PoisonError::into_inner) = router.clone();
        if router.is_none() {
            return;
        }
        let parked = self.parked().as_mut().map(std::mem::take);
        parked.into_iter().flatten().for_each(|message| self.post(message));
    }

    /// The host ends, in peace or by a failure of its root: whoever still waits learns it, and whoever comes later.
    pub(crate) fn close(&self) {
        self.install(None);
        let parked = self.parked().take();
        parked.into_iter().flatten().for_each(|message| self.end(message));
    }

    pub(super) fn draining(&self) -> MutexGuard<'_, Option<Instant>> {
        // One word: whole whoever panics.
        self.shared.draining.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn next_id(&self) -> RequestId {
        RequestId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }
}
