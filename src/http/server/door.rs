//! Who is connected, and since when each has been waiting. Nothing here does I/O.
//!
//! ```text
//! [Head] --request--> [Busy] --last answer done--> [Idle] --first byte--> [Head]
//!    \--header_timeout--> cut                         \--idle_timeout--> cut
//! ```

use axum::body::Body;
use hyper::body::{Frame, SizeHint};
use playhouse_config::checked::Limits;
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How often a connection with requests in flight is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The places for connections.
#[derive(Debug)]
pub(super) struct Door {
    places: u32,
    seats: Arc<Mutex<Seats>>,
}

#[derive(Debug, Default)]
struct Seats {
    taken: u32,
    next: u64,
    /// Connections without a request, by when they began to wait.
    waiting: BTreeMap<u64, Arc<Notify>>,
}

impl Door {
    pub(super) fn new(places: u32) -> Self {
        Self { places: places.max(1), seats: Arc::default() }
    }

    /// A place for a new connection. If all are taken, the connection that has waited longest makes room; if all have
    /// requests in flight there is none.
    pub(super) fn enter(&self) -> Option<Arc<Conn>> {
        let mut seats = lock(&self.seats);
        if seats.taken >= self.places {
            let (_, longest) = seats.waiting.pop_first()?;
            longest.notify_one();
            // Its place is counted as free now; its own leaving must not free it again, see `Conn::drop`.
        } else {
            seats.taken += 1;
        }
        let number = seats.next;
        seats.next += 1;
        let evict = Arc::new(Notify::new());
        seats.waiting.insert(number, evict.clone());
        drop(seats);
        let state =
            State { phase: Phase::Head, since: Instant::now(), number, n_busy: 0, is_h2: false, has_place: true };
        let clocks = Mutex::default();
        Some(Arc::new(Conn { seats: self.seats.clone(), evict, state: Mutex::new(state), clocks }))
    }
}

/// A panic between two assignments of plain numbers cannot happen: the state is whole even if a holder panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// A request's headers are awaited, and must come soon.
    Head,
    /// Requests are in flight.
    Busy,
    /// Nothing is expected.
    Idle,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    since: Instant,
    /// Its number among those that wait.
    number: u64,
    n_busy: u32,
    is_h2: bool,
    /// False once another connection was given the place.
    has_place: bool,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Conn {
    seats: Arc<Mutex<Seats>>,
    evict: Arc<Notify>,
    state: Mutex<State>,
    /// Of answers on their way.
    clocks: Mutex<Vec<Arc<Clock>>>,
}

impl Conn {
    /// Waits until somebody else needs the place.
    pub(super) async fn evicted(&self) {
        self.evict.notified().await;
    }

    /// Bytes came in.
    pub(super) fn heard(&self) {
        let mut state = lock(&self.state);
        // What an HTTP/2 client sends between requests need not be the beginning of one.
        if state.phase == Phase::Idle && !state.is_h2 {
            (state.phase, state.since) = (Phase::Head, Instant::now());
        }
    }

    /// A request's headers are complete.
    pub(super) fn begin(self: &Arc<Self>, is_h2: bool) -> InFlight {
        let mut state = lock(&self.state);
        state.is_h2 = is_h2;
        state.n_busy += 1;
        if state.n_busy == 1 {
            state.phase = Phase::Busy;
            // It may have been told to make room a moment ago.
            state.has_place &= lock(&self.seats).waiting.remove(&state.number).is_some();
        }
        drop(state);
        let clock = Arc::new(Clock::default());
        lock(&self.clocks).push(clock.clone());
        InFlight { conn: self.clone(), clock }
    }

    fn ended(&self, clock: &Arc<Clock>) {
        lock(&self.clocks).retain(|other| !Arc::ptr_eq(other, clock));
        let mut state = lock(&self.state);
        state.n_busy -= 1;
        if state.n_busy == 0 {
            if state.has_place {
                let mut seats = lock(&self.seats);
                state.number = seats.next;
                seats.next += 1;
                seats.waiting.insert(state.number, self.evict.clone());
            }
            (state.phase, state.since) = (Phase::Idle, Instant::now());
        }
    }

    /// When to look again; `None` if the connection is overdue.
    pub(super) fn overdue(&self, limits: &Limits) -> Option<Instant> {
        let now = Instant::now();
        let state = lock(&self.state);
        let deadline = match state.phase {
            Phase::Head => state.since + limits.header_timeout,
            Phase::Idle => state.since + limits.idle_timeout,
            Phase::Busy => {
                let patience = u64::try_from(limits.client_timeout.as_millis()).unwrap_or(u64::MAX);
                let stalled = lock(&self.clocks).iter().any(|clock| clock.stalled_for() > patience);
                return (!stalled).then(|| now + LOOK_EVERY.min(limits.client_timeout));
            }
        };
        (now < deadline).then_some(deadline)
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut seats = lock(&self.seats);
        // One that was told to make room has given its place away already.
        let is_waiting = seats.waiting.remove(&state.number).is_some();
        if state.has_place && (is_waiting || state.phase == Phase::Busy) {
            seats.taken -= 1;
        }
    }
}

/// Since when a finished piece of an answer has been waiting to be taken.
#[derive(Debug)]
struct Clock {
    start: Instant,
    /// Milliseconds after `start`; 0 while the answer has nothing to give.
    waiting_since: AtomicU64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { start: Instant::now(), waiting_since: AtomicU64::new(0) }
    }
}

impl Clock {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn stalled_for(&self) -> u64 {
        match self.waiting_since.load(Ordering::Relaxed) {
            0 => 0,
            since => self.now().saturating_sub(since),
        }
    }
}

/// A request between its headers and the last byte of its answer.
#[derive(Debug)]
pub(super) struct InFlight {
    conn: Arc<Conn>,
    clock: Arc<Clock>,
}

impl InFlight {
    /// Goes with the answer until that is sent.
    pub(super) fn carry(self, body: Body) -> Body {
        Body::new(Tracked { body, in_flight: self })
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.conn.ended(&self.clock);
    }
}

/// An answer that knows how long its reader has kept it waiting.
struct Tracked {
    body: Body,
    in_flight: InFlight,
}

impl hyper::body::Body for Tracked {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        // hyper asks for the next piece when there is room for it: until then the reader has yet to take this one.
        let clock = &self.in_flight.clock;
        let since = if polled.is_ready() { clock.now().max(1) } else { 0 };
        clock.waiting_since.store(since, Ordering::Relaxed);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_longest_waiting_makes_room_and_the_busy_stay() {
        let door = Door::new(2);
        let (first, second) = (door.enter().expect("free"), door.enter().expect("free"));
        let request = first.begin(false);
        let third = door.enter().expect("the second makes room");
        tokio::time::timeout(Duration::from_secs(5), second.evicted()).await.expect("told to go");
        drop(second);
        let other = third.begin(false);
        assert!(door.enter().is_none(), "both have requests in flight");
        drop(request);
        let fourth = door.enter().expect("the first waits again");
        tokio::time::timeout(Duration::from_secs(5), first.evicted()).await.expect("told to go");
        drop((first, other, third, fourth));
        assert_eq!(lock(&door.seats).taken, 0);
        assert!(lock(&door.seats).waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_has_two_deadlines() {
        let limits = Limits::default();
        let door = Door::new(8);
        let conn = door.enter().expect("free");
        assert_eq!(conn.overdue(&limits), Some(Instant::now() + limits.header_timeout));
        drop(conn.begin(false));
        assert_eq!(conn.overdue(&limits), Some(Instant::now() + limits.idle_timeout));
        conn.heard();
        assert_eq!(conn.overdue(&limits), Some(Instant::now() + limits.header_timeout));
        tokio::time::advance(limits.header_timeout).await;
        assert_eq!(conn.overdue(&limits), None);
    }
}
