//! One thread of low priority for what takes milliseconds, such as reading a long body as JSON: it neither holds up the
//! streams of a thread that carries connections nor takes a processor from one. Work waits in a queue for each client, and
//! the clients take turns: whoever sends much waits for itself.

use std::any::Any;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// How much the thread gives way, of at most 19: a tenth of what others have is left to it where every processor is taken.
const NICE: i32 = 10;

type Job = Box<dyn FnOnce() + Send>;

/// The way to the thread, which ends with it.
#[derive(Debug)]
pub(super) struct Lane(Arc<Waiting>);

#[derive(Default)]
struct Waiting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// In the order of their turns; none is without a job.
    clients: VecDeque<(Option<IpAddr>, VecDeque<Job>)>,
    is_closed: bool,
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting").field("clients", &self.lock().clients.len()).finish()
    }
}

impl State {
    fn add(&mut self, client: Option<IpAddr>, job: Job) {
        match self.clients.iter_mut().find(|(waiting, _)| *waiting == client) {
            Some((_, jobs)) => jobs.push_back(job),
            None => self.clients.push_back((client, VecDeque::from([job]))),
        }
    }

    /// The first job of the client whose turn it is; the client's next turn comes after all others'.
    fn next(&mut self) -> Option<Job> {
        let (client, mut jobs) = self.clients.pop_front()?;
        let job = jobs.pop_front();
        if !jobs.is_empty() {
            self.clients.push_back((client, jobs));
        }
        job
    }
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole after every statement: nobody panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a job; `None` once nobody can send one.
    fn next(&self) -> Option<Job> {
        let state = self.lock();
        let is_idle = |state: &mut State| state.clients.is_empty() && !state.is_closed;
        let mut state = self.changed.wait_while(state, is_idle).unwrap_or_else(PoisonError::into_inner);
        state.next()
    }
}

impl Lane {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system has none left.
    pub(super) fn start() -> std::io::Result<Self> {
        let waiting = Arc::new(Waiting::default());
        let jobs = waiting.clone();
        std::thread::Builder::new().name("front-lane".into()).spawn(move || {
            // Of this thread alone, on Linux. Where it may not, it is a thread like others.
            let _ = rustix::process::nice(NICE);
            while let Some(job) = jobs.next() {
                job();
            }
        })?;
        Ok(Self(waiting))
    }

    /// Has `work` done when it is this client's turn. Nothing is done for one that no longer waits.
    ///
    /// # Errors
    /// What `work` panicked with.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        client: Option<IpAddr>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Box<dyn Any + Send>> {
        let (done, result) = oneshot::channel();
        let job = Box::new(move || {
            if !done.is_closed() {
                let _ = done.send(catch_unwind(AssertUnwindSafe(work)));
            }
        });
        self.0.lock().add(client, job);
        self.0.changed.notify_one();
        result.await.expect("the thread answers every job while there is a lane")
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_take_turns() {
        let (told, heard) = std::sync::mpsc::channel();
        let mut state = State::default();
        let client = |last: u8| Some(IpAddr::from([192, 0, 2, last]));
        for (from, name) in [(1, "a1"), (1, "a2"), (1, "a3"), (2, "b1"), (3, "c1"), (2, "b2")] {
            let told = told.clone();
            state.add(client(from), Box::new(move || told.send(name).expect("heard")));
        }
        while let Some(job) = state.next() {
            job();
        }
        drop((told, state));
        assert_eq!(heard.iter().collect::<Vec<_>>(), ["a1", "b1", "c1", "a2", "b2", "a3"]);
    }

    #[tokio::test]
    async fn a_panic_reaches_whoever_asked_and_nobody_else() {
        let lane = Lane::start().expect("a thread");
        let panicked: Result<(), _> = lane.run(None, || panic!("moon")).await;
        assert_eq!(panicked.expect_err("it panicked").downcast_ref::<&str>(), Some(&"moon"));
        assert_eq!(lane.run(None, || 3).await.ok(), Some(3));
    }
}
