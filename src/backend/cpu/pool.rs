//! Threads for one op: fork, share numbered tasks, join.
//!
//! A decode step is a hundred short parallel regions, so the price of a fork counts. Waiting workers spin for some
//! microseconds before they park, the caller works too, and it never waits for a worker that has not begun: a region
//! is closed once its tasks are all claimed, and only those who entered it are waited for. On a busy machine a worker
//! without a core therefore costs nothing. (rayon's `install` from outside its pool parks the caller and wakes a
//! worker each time, which alone took longer than a small model's matrix.)
//!
//! Which thread runs a task changes no result: tasks write disjoint outputs.
//!
//! ```text
//! [closed, n] --run opens, epoch n+1--> [open, active = 0..] --tasks all claimed--> [closed, active > 0] --last leaves--> [closed]
//! ```

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Polls before a waiting worker parks: about 50 microseconds, the longest gap between two regions of a step.
const SPINS_BEFORE_PARK: u32 = 1 << 10;
/// Every so many polls a spinning thread offers its core to others.
const SPINS_BEFORE_YIELD: u32 = 1 << 7;

/// The state word: `epoch << 32 | open << 31 | active`.
const OPEN: u64 = 1 << 31;
const ACTIVE: u64 = OPEN - 1;
const EPOCH_ONE: u64 = 1 << 32;

/// A pool of worker threads that lives as long as its backend.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

type Task = dyn Fn(usize) + Sync;

/// The region being run. Written only by `run` while the state is closed and nobody is active.
#[derive(Clone, Copy)]
struct Region {
    task: *const Task,
    n_tasks: usize,
}

struct Shared {
    state: AtomicU64,
    region: UnsafeCell<Option<Region>>,
    next: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `region` is written only while the state is closed with no active worker, and read only by workers that
// entered while it was open; the acquire/release pair on `state` orders the two. The task it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `region` is followed only inside the region's lifetime, see `Pool::run`.
unsafe impl Send for Shared {}

impl Pool {
    /// A pool of `n_threads` threads, the caller of [`Pool::run`] included.
    pub(crate) fn new(n_threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            region: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicU32::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let spawn = |i: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("cpu-{i}")).spawn(move || shared.work()).ok()
        };
        // A thread the system refuses is one thread less, not an error: the caller does the work.
        let workers = (1..n_threads).map_while(spawn).collect();
        Self { shared, workers }
    }

    /// Threads that take part in a region.
    pub(crate) fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0)` to `task(n_tasks - 1)`, in any order, on any thread, and returns when all are done.
    ///
    /// # Panics
    /// If a task panicked.
    pub(crate) fn run(&mut self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() || n_tasks <= 1 {
            (0..n_tasks).for_each(task);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: this erases the lifetime of `task`. Workers follow the pointer only between entering and leaving an
        // open region, and `close_and_wait` below, which runs even if a task panics here, returns only once the
        // region is closed and everyone who entered has left.
        let task_ptr = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const Task>(task) };
        // SAFETY: the state is closed with no active worker (the last `run` left it so, and `&mut self` excludes
        // another), hence nobody reads `region`.
        unsafe { *shared.region.get() = Some(Region { task: task_ptr, n_tasks }) };
        shared.next.store(0, Ordering::Relaxed);
        shared.open();
        let mine = catch_unwind(AssertUnwindSafe(|| shared.claim(n_tasks, task)));
        shared.close_and_wait();
        if let Err(panic) = mine {
            shared.panicked.store(false, Ordering::Relaxed);
            resume_unwind(panic);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a task of the CPU backend panicked on a worker");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.notify();
        for worker in self.workers.drain(..) {
            // A worker's panics are caught and reported by `run`; there is nothing left to say here.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn open(&self) {
        let closed = self.state.load(Ordering::Relaxed);
        self.state.store((closed & !(OPEN | ACTIVE)).wrapping_add(EPOCH_ONE) | OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.notify();
        }
    }

    fn notify(&self) {
        // Taking the lock orders this after a worker's decision to sleep, so that no wake-up is lost.
        drop(self.lock.lock());
        self.wake.notify_all();
    }

    fn close_and_wait(&self) {
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut polls = 0u32;
        while self.state.load(Ordering::Acquire) & ACTIVE != 0 {
            relax(&mut polls);
        }
    }

    /// Runs tasks until all are claimed.
    fn claim(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= n_tasks {
                return;
            }
            task(i);
        }
    }

    /// A worker's life.
    fn work(&self) {
        let mut seen = 0;
        while let Some(epoch) = self.enter(seen) {
            seen = epoch;
            // SAFETY: this worker entered an open region, so `region` was written before and stays until it leaves.
            let region = unsafe { *self.region.get() };
            if let Some(Region { task, n_tasks }) = region {
                // SAFETY: `run` keeps the task alive until everyone who entered has left.
                let task = unsafe { &*task };
                if catch_unwind(AssertUnwindSafe(|| self.claim(n_tasks, task))).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for an open region newer than `seen` and enters it; `None` when the pool ends.
    fn enter(&self, seen: u64) -> Option<u64> {
        let mut polls = 0u32;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let state = self.state.load(Ordering::Acquire);
            if is_new(state, seen) {
                let entered = self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed);
                if entered.is_ok() {
                    return Some(state >> 32);
                }
            } else if polls >= SPINS_BEFORE_PARK {
                self.park(seen);
                polls = 0;
            } else {
                relax(&mut polls);
            }
        }
    }

    /// Sleeps until an open region newer than `seen` may exist, or the pool ends.
    fn park(&self, seen: u64) {
        let Ok(mut guard) = self.lock.lock() else { return };
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !is_new(self.state.load(Ordering::SeqCst), seen) && !self.stop.load(Ordering::SeqCst) {
            match self.wake.wait(guard) {
                Ok(again) => guard = again,
                Err(_) => break,
            }
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

fn is_new(state: u64, seen: u64) -> bool {
    state & OPEN != 0 && state >> 32 != seen
}

fn relax(polls: &mut u32) {
    *polls += 1;
    if polls.is_multiple_of(SPINS_BEFORE_YIELD) {
        std::thread::yield_now();
    } else {
        std::hint::spin_loop();
    }
}

/// A slice that tasks write to in disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct Shards<'a> {
    ptr: *mut f32,
    len: usize,
    _owner: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a `&mut [f32]` cut into parts; `f32` may be written from any thread, and `part` obliges its caller to
// keep the parts disjoint.
unsafe impl Send for Shards<'_> {}
// SAFETY: as above.
unsafe impl Sync for Shards<'_> {}

impl<'a> Shards<'a> {
    /// Borrows a slice for one region.
    pub(crate) fn new(all: &'a mut [f32]) -> Self {
        Self { ptr: all.as_mut_ptr(), len: all.len(), _owner: std::marker::PhantomData }
    }

    /// The elements `first .. first + len`.
    ///
    /// # Safety
    /// No two parts that live at the same time may overlap.
    #[allow(clippy::mut_from_ref, reason = "the parts are disjoint by the caller's promise")]
    pub(crate) unsafe fn part(&self, first: usize, len: usize) -> &'a mut [f32] {
        assert!(first.checked_add(len).is_some_and(|end| end <= self.len), "part {first}+{len} of {}", self.len);
        // SAFETY: inside the slice by the assertion, disjoint from other parts by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(first), len) }
    }
}

/// Cuts `n` items into parts of at most `most`, so that `n_threads` threads have about four each to share.
pub(crate) fn part_len(n: usize, n_threads: usize, multiple: usize, most: usize) -> usize {
    if n_threads <= 1 {
        return most;
    }
    n.div_ceil(4 * n_threads).next_multiple_of(multiple).clamp(multiple, most.max(multiple))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_exactly_once() {
        for n_threads in [1, 2, 3, 8] {
            let mut pool = Pool::new(n_threads);
            for n_tasks in [0, 1, 2, 3, 17, 127, 1000] {
                let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n_tasks, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{n_threads} threads, {n_tasks} tasks");
            }
        }
    }

    #[test]
    fn ten_thousand_regions_in_a_row_lose_nothing() {
        let mut pool = Pool::new(4);
        let total = AtomicUsize::new(0);
        for _ in 0..10_000 {
            pool.run(5, &|i| {
                total.fetch_add(i, Ordering::Relaxed);
            });
        }
        assert_eq!(total.into_inner(), 100_000);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3);
        for bad in 0..8 {
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert_ne!(i, bad, "task {i}"))));
            assert!(caught.is_err(), "task {bad} panicked unseen");
        }
        let done = AtomicUsize::new(0);
        pool.run(8, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 8);
    }
}
