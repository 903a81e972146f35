//! Who is connected, and since when each has been waiting. Nothing here does I/O.
//!
//! ```text
//! [Head] --request--> [Busy] --last answer done--> [Idle] --first byte--> [Head]
//!    \--header_timeout--> cut                         \--idle_timeout--> cut
//! ```

use axum::body::Body;
use hyper::body::{Frame, SizeHint};
use playhouse_config::checked::Limits;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
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
    places_per_ip: u32,
    seats: Arc<Mutex<Seats>>,
}

#[derive(Debug, Default)]
struct Seats {
    taken: u32,
    /// Of those, by address.
    by_ip: HashMap<IpAddr, u32>,
    next: u64,
    /// Connections without a request, by when they began to wait.
    waiting: BTreeMap<u64, Waiting>,
}

#[derive(Debug, Clone)]
struct Waiting {
    evict: Arc<Notify>,
    ip: Option<IpAddr>,
}

impl Seats {
    fn take(&mut self, ip: Option<IpAddr>) {
        self.taken += 1;
        if let Some(ip) = ip {
            *self.by_ip.entry(ip).or_default() += 1;
        }
    }

    fn free(&mut self, ip: Option<IpAddr>) {
        self.taken -= 1;
        if let Some(ip) = ip
            && let Some(n) = self.by_ip.get_mut(&ip)
        {
            *n -= 1;
            if *n == 0 {
                self.by_ip.remove(&ip);
            }
        }
    }

    /// Has the longest waiting connection, of everybody or of one address, make room; whether there is one.
    fn evict(&mut self, ip: Option<IpAddr>) -> bool {
        let is_meant = |waiting: &Waiting| ip.is_none() || waiting.ip == ip;
        let longest = self.waiting.iter().find(|(_, waiting)| is_meant(waiting)).map(|(number, _)| *number);
        let Some(waiting) = longest.and_then(|number| self.waiting.remove(&number)) else { return false };
        waiting.evict.notify_one();
        // Its place is free from now on; its own leaving must not free it again, see `Conn::drop`.
        self.free(waiting.ip);
        true
    }
}

/// Why there is no place: those who have one have requests in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// All places are taken.
    All,
    /// All that one address may have.
    Address,
}

impl Full {
    /// For a client of HTTP/1 that has not said anything yet.
    pub(super) fn answer(self) -> &'static [u8] {
        match self {
            Self::All => {
                b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            }
            Self::Address => {
                b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            }
        }
    }
}

/// Whom an address stands for: with IPv6 a client has a whole network of 64 bits.
pub(super) fn client_of(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

impl Door {
    pub(super) fn new(limits: &Limits) -> Self {
        let (places, places_per_ip) = (limits.connections.max(1), limits.connections_per_ip.max(1));
        Self { places, places_per_ip, seats: Arc::default() }
    }

    /// A place for a new connection. If all are taken, or all that its address may have, the one among them that has
    /// waited longest makes room.
    ///
    /// # Errors
    /// [`Full`]: all of them have requests in flight.
    pub(super) fn enter(&self, ip: Option<IpAddr>) -> Result<Arc<Conn>, Full> {
        let ip = ip.map(client_of);
        let mut seats = lock(&self.seats);
        let n_of_ip = ip.and_then(|ip| seats.by_ip.get(&ip)).copied().unwrap_or(0);
        if n_of_ip >= self.places_per_ip && !seats.evict(ip) {
            return Err(Full::Address);
        }
        if seats.taken >= self.places && !seats.evict(None) {
            return Err(Full::All);
        }
        seats.take(ip);
        let number = seats.next;
        seats.next += 1;
        let evict = Arc::new(Notify::new());
        seats.waiting.insert(number, Waiting { evict: evict.clone(), ip });
        drop(seats);
        let state = State {
            phase: Phase::Head,
            since: Instant::now(),
            number,
            n_busy: 0,
            is_h2: false,
            has_begun: false,
            is_cut: false,
            has_place: true,
        };
        let clocks = Mutex::default();
        Ok(Arc::new(Conn { seats: self.seats.clone(), evict, ip, state: Mutex::new(state), clocks }))
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
    /// Part of a request's headers came.
    has_begun: bool,
    is_cut: bool,
    /// False once another connection was given the place.
    has_place: bool,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Conn {
    seats: Arc<Mutex<Seats>>,
    evict: Arc<Notify>,
    ip: Option<IpAddr>,
    state: Mutex<State>,
    /// Of answers on their way.
    clocks: Mutex<Vec<Arc<Clock>>>,
}

impl Conn {
    /// Waits until somebody else needs the place.
    pub(super) async fn evicted(&self) {
        self.evict.notified().await;
    }

    /// Bytes came in; whether they are the beginning of HTTP/2.
    pub(super) fn heard(&self, is_h2: bool) {
        let mut state = lock(&self.state);
        state.is_h2 |= is_h2;
        state.has_begun |= state.phase != Phase::Busy;
        // What an HTTP/2 client sends between requests need not be the beginning of one.
        if state.phase == Phase::Idle && !state.is_h2 {
            (state.phase, state.since) = (Phase::Head, Instant::now());
        }
    }

    /// A request's headers are complete.
    pub(super) fn begin(self: &Arc<Self>, is_h2: bool) -> InFlight {
        let mut state = lock(&self.state);
        state.is_h2 = is_h2;
        state.has_begun = false;
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
                seats.waiting.insert(state.number, Waiting { evict: self.evict.clone(), ip: self.ip });
            }
            (state.phase, state.since) = (Phase::Idle, Instant::now());
        }
    }

    /// It is about to be closed, although its client did nothing wrong but to wait.
    pub(super) fn cut(&self) {
        lock(&self.state).is_cut = true;
    }

    /// Whether it was cut when it had said part of a request.
    pub(super) fn is_cut_short(&self) -> bool {
        let state = lock(&self.state);
        state.is_cut && state.has_begun && state.phase == Phase::Head && !state.is_h2
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
            seats.free(self.ip);
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

    fn door(connections: u32, connections_per_ip: u32) -> Door {
        Door::new(&Limits { connections, connections_per_ip, ..Limits::default() })
    }

    #[tokio::test]
    async fn an_address_has_its_share_and_takes_nobody_elses() {
        let door = door(4, 2);
        let ip = |text: &str| Some(text.parse::<IpAddr>().expect("an address"));
        let one = ip("192.0.2.1");
        let other = door.enter(ip("192.0.2.2")).expect("free");
        let (first, second) = (door.enter(one).expect("free"), door.enter(one).expect("free"));
        let third = door.enter(one).expect("the first of its own makes room");
        tokio::time::timeout(Duration::from_secs(5), first.evicted()).await.expect("told to go");
        drop(first);
        let requests = (second.begin(false), third.begin(false));
        assert_eq!(door.enter(one).err(), Some(Full::Address));
        assert_eq!(door.enter(ip("::ffff:192.0.2.1")).err(), Some(Full::Address), "the same address");
        assert!(door.enter(ip("192.0.2.3")).is_ok(), "others have room");
        drop((requests, second, third, other));
        let network = [ip("2001:db8::1"), ip("2001:db8::2"), ip("2001:db8:0:1::1")].map(|ip| door.enter(ip));
        let [a, b, c] = network.map(|entered| entered.expect("free"));
        let busy = (a.begin(true), b.begin(true));
        assert_eq!(door.enter(ip("2001:db8::3")).err(), Some(Full::Address), "a network of 64 bits is one client");
        drop((busy, a, b, c));
        assert!(lock(&door.seats).by_ip.is_empty() && lock(&door.seats).taken == 0);
    }

    #[tokio::test]
    async fn the_longest_waiting_makes_room_and_the_busy_stay() {
        let door = door(2, 2);
        let (first, second) = (door.enter(None).expect("free"), door.enter(None).expect("free"));
        let request = first.begin(false);
        let third = door.enter(None).expect("the second makes room");
        tokio::time::timeout(Duration::from_secs(5), second.evicted()).await.expect("told to go");
        drop(second);
        let other = third.begin(false);
        assert_eq!(door.enter(None).err(), Some(Full::All), "both have requests in flight");
        drop(request);
        let fourth = door.enter(None).expect("the first waits again");
        tokio::time::timeout(Duration::from_secs(5), first.evicted()).await.expect("told to go");
        drop((first, other, third, fourth));
        assert_eq!(lock(&door.seats).taken, 0);
        assert!(lock(&door.seats).waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_has_two_deadlines() {
        let limits = Limits::default();
        let door = door(8, 8);
        let conn = door.enter(None).expect("free");
        assert_eq!(conn.overdue(&limits), Some(Instant::now() + limits.header_timeout));
        drop(conn.begin(false));
        assert_eq!(conn.overdue(&limits), Some(Instant::now() + limits.idle_timeout));
        conn.heard(false);
        assert_eq!(conn.overdue(&limits), Some(Instant::now() + limits.header_timeout));
        tokio::time::advance(limits.header_timeout).await;
        assert_eq!(conn.overdue(&limits), None);
    }
}
