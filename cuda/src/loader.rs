//! The way of weights to the GPU: read by many threads into page-locked chunks, copied on a stream of their own, and handed over
//! on the device as they arrive.
//!
//! ```text
//! readers ── chunk ──▶ copy stream ──▶ staging buffer ──▶ the device's stream: what the caller enqueues on arrival
//! ```
//!
//! A chunk has a place on the host and one on the device. The host's is free again once its copy is done, the device's once
//! what the caller enqueued has run: events say so, and no stream is drained between chunks. Bytes become visible to the
//! device's stream in the order of the chunks.

use crate::arena::{Arena, Buffer};
use crate::error::CudaError;
use crate::gpu::Gpu;
use crate::pinned::Pinned;
use crate::stream::{Event, Stream};
use cudarc::driver::sys;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Bytes that a reader takes at a time: large enough for one system call each, small enough to keep all readers busy.
const READ: usize = 2 << 20;

/// Sizes of a loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoaderSizes {
    /// Bytes of a chunk.
    pub chunk_bytes: usize,
    /// Chunks: 2 or more.
    pub n_chunks: usize,
    /// Threads that read. One copies about 8 GB/s from the page cache.
    pub n_readers: usize,
}

impl Default for LoaderSizes {
    fn default() -> Self {
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { chunk_bytes: 32 << 20, n_chunks: 4, n_readers: n_cores.min(8) }
    }
}

/// Where bytes come from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// Memory, such as a file's map.
    Bytes(&'a [u8]),
    /// A file, read at offsets from its start.
    File {
        /// Open for reading.
        file: &'a File,
        /// For messages.
        name: &'a str,
    },
}

/// A run of bytes.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    /// Where they are.
    pub source: Source<'a>,
    /// The first.
    pub offset: u64,
    /// How many.
    pub len: usize,
}

/// A chunk on the device.
#[derive(Debug)]
pub struct Arrival<'a> {
    /// Which of the chunks asked for.
    pub chunk: usize,
    /// Its pieces, in order. They are overwritten after what is enqueued on the device's stream before the call returns.
    pub pieces: &'a [Buffer<u8>],
    /// Bytes that have arrived so far, this chunk's included.
    pub done_bytes: u64,
    /// Bytes asked for in all.
    pub total_bytes: u64,
}

/// Why bytes did not arrive. The loader is usable afterwards.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error("cannot read {len} bytes at {offset} of {name}")]
    Read {
        /// The file.
        name: String,
        /// Where.
        offset: u64,
        /// How many bytes were wanted.
        len: usize,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The device.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Chunks, the threads that fill them, and the stream that copies them.
#[derive(Debug)]
pub struct Loader {
    gpu: Gpu,
    sizes: LoaderSizes,
    stream: Stream,
    slots: Vec<Slot>,
    turn: usize,
    readers: Readers,
}

#[derive(Debug)]
struct Slot {
    host: Pinned<u8>,
    device: Buffer<u8>,
    /// The host's place is free after this.
    copied: Event,
    /// The device's place is free after this.
    consumed: Event,
}

/// A chunk that is being read. Dropping it waits for the readers, who must not outlive what they read from.
struct Reading<'a> {
    pieces: &'a [Piece<'a>],
    chunk: usize,
    slot: usize,
    latch: Arc<Latch>,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let _ = self.latch.wait();
    }
}

impl Loader {
    /// Takes page-locked memory, as much on the device, and starts the readers.
    ///
    /// # Errors
    /// [`CudaError::Contract`] for sizes without sense; [`CudaError::OutOfMemory`]; a failed driver call.
    pub fn new(gpu: &Gpu, sizes: LoaderSizes) -> Result<Loader, CudaError> {
        if sizes.chunk_bytes == 0 || sizes.n_chunks < 2 || sizes.n_readers == 0 {
            return Err(contract("sizes", "bytes, 2 or more chunks, a reader", format!("{sizes:?}")));
        }
        let total = sizes.n_chunks as u64 * (sizes.chunk_bytes as u64).next_multiple_of(crate::arena::ALIGN);
        let arena = Arena::new(gpu, "staging", total)?;
        arena.commit(total)?;
        let slot = |_| {
            Ok(Slot {
                host: Pinned::new(gpu, sizes.chunk_bytes)?,
                device: arena.alloc(sizes.chunk_bytes, "a chunk")?,
                copied: Event::new(gpu)?,
                consumed: Event::new(gpu)?,
            })
        };
        let slots = (0..sizes.n_chunks).map(slot).collect::<Result<Vec<Slot>, CudaError>>()?;
        let readers = Readers::start(sizes.n_readers);
        Ok(Loader { gpu: gpu.clone(), sizes, stream: Stream::new(gpu)?, slots, turn: 0, readers })
    }

    /// Bytes that a chunk's pieces may have together.
    pub fn chunk_bytes(&self) -> usize {
        self.sizes.chunk_bytes
    }

    /// Brings chunks to the device, each made of pieces, and calls `arrived` for each in order: what that enqueues on the device's
    /// stream runs when the chunk is there. Returns when everything is enqueued.
    ///
    /// # Errors
    /// [`LoadError`] for a chunk that is too large or cannot be read, a failed driver call; what `arrived` returns. No chunk
    /// after the failed one arrives.
    pub fn load<'a, E: From<LoadError>>(
        &mut self,
        chunks: &'a [Vec<Piece<'a>>],
        mut arrived: impl FnMut(Arrival<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let total_bytes = chunks.iter().flatten().map(|piece| piece.len as u64).sum();
        self.check(chunks).map_err(LoadError::from)?;
        let mut waiting = chunks.iter().enumerate();
        let mut reading: VecDeque<Reading<'_>> = VecDeque::new();
        let mut done_bytes = 0;
        loop {
            // One place is left to the copy that is on its way, so that waiting for a place is not waiting for the last copy.
            while reading.len() + 1 < self.slots.len() {
                let Some((chunk, pieces)) = waiting.next() else { break };
                reading.push_back(self.begin(chunk, pieces).map_err(LoadError::from)?);
            }
            let Some(next) = reading.pop_front() else { return Ok(()) };
            next.latch.wait()?;
            done_bytes += next.pieces.iter().map(|piece| piece.len as u64).sum::<u64>();
            self.finish(&next, (done_bytes, total_bytes), &mut arrived)?;
        }
    }

    fn check(&self, chunks: &[Vec<Piece<'_>>]) -> Result<(), CudaError> {
        for (i, chunk) in chunks.iter().enumerate() {
            let bytes: usize = chunk.iter().map(|piece| piece.len).sum();
            if bytes == 0 || bytes > self.sizes.chunk_bytes {
                let expected = format!("1 to {} bytes", self.sizes.chunk_bytes);
                return Err(contract("a chunk", expected, format!("{bytes} in chunk {i}")));
            }
            for piece in chunk {
                if let Source::Bytes(bytes) = piece.source {
                    let end = piece.offset.checked_add(piece.len as u64);
                    if end.is_none_or(|end| end > bytes.len() as u64) {
                        let found = format!("{} from {} in chunk {i}", piece.len, piece.offset);
                        return Err(contract("a piece", format!("a part of {} bytes", bytes.len()), found));
                    }
                }
            }
        }
        Ok(())
    }

    /// Gives a chunk to the readers once its place on the host is free.
    fn begin<'a>(&mut self, chunk: usize, pieces: &'a [Piece<'a>]) -> Result<Reading<'a>, CudaError> {
        let slot = self.turn;
        self.slots[slot].copied.synchronize()?;
        self.turn = (self.turn + 1) % self.slots.len();
        let mut target = &mut self.slots[slot].host[..];
        let latch = Latch::new();
        for piece in pieces {
            let (own, rest) = target.split_at_mut(piece.len);
            for (i, part) in own.chunks_mut(READ).enumerate() {
                self.readers.push(Job::new(piece.source, piece.offset + (i * READ) as u64, part, &latch));
            }
            target = rest;
        }
        Ok(Reading { pieces, chunk, slot, latch })
    }

    /// Copies a chunk that was read, and hands it over.
    fn finish<E: From<LoadError>>(
        &mut self,
        reading: &Reading<'_>,
        (done_bytes, total_bytes): (u64, u64),
        arrived: &mut impl FnMut(Arrival<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let slot = &self.slots[reading.slot];
        let bytes = reading.pieces.iter().map(|piece| piece.len).sum();
        self.copy(slot, bytes).map_err(LoadError::from)?;
        let mut at = 0;
        let place = |piece: &Piece<'_>| {
            at += piece.len;
            slot.device.slice(at - piece.len..at)
        };
        let pieces: Vec<Buffer<u8>> = reading.pieces.iter().map(place).collect();
        let result = arrived(Arrival { chunk: reading.chunk, pieces: &pieces, done_bytes, total_bytes });
        // Even after a failure something may have been enqueued.
        let consumed = slot.consumed.record(None).map_err(LoadError::from);
        result?;
        Ok(consumed?)
    }

    fn copy(&self, slot: &Slot, bytes: usize) -> Result<(), CudaError> {
        let (own, stream) = (Some(&self.stream), self.stream.raw());
        slot.consumed.hold(own)?;
        // SAFETY: both places hold `bytes`; neither is touched before its event has passed.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(slot.device.ptr(), slot.host.as_ptr().cast(), bytes, stream) };
        self.gpu.check(result, || format!("cuMemcpyHtoDAsync({bytes})"))?;
        slot.copied.record(own)?;
        slot.copied.hold(None)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // The places are freed next: nothing may be on its way. A failed device refuses.
        let _ = self.gpu.bind();
        let _ = self.stream.synchronize();
        let _ = self.gpu.synchronize();
    }
}

/// Counts the jobs of a chunk down, keeping the first failure.
#[derive(Debug, Default)]
struct Latch {
    state: Mutex<(usize, Option<LoadError>)>,
    done: Condvar,
}

impl Latch {
    fn new() -> Arc<Latch> {
        Arc::default()
    }

    fn arm(&self) {
        self.lock().0 += 1;
    }

    fn release(&self, result: Result<(), LoadError>) {
        let mut state = self.lock();
        state.0 -= 1;
        if let (Err(error), None) = (result, &state.1) {
            state.1 = Some(error);
        }
        if state.0 == 0 {
            self.done.notify_all();
        }
    }

    fn wait(&self) -> Result<(), LoadError> {
        let mut state = self.done.wait_while(self.lock(), |state| state.0 > 0).unwrap_or_else(|e| e.into_inner());
        state.1.take().map_or(Ok(()), Err)
    }

    fn lock(&self) -> MutexGuard<'_, (usize, Option<LoadError>)> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Bytes to bring from a borrowed place to a borrowed place. Both outlive it: the latch opens before the chunk's [`Reading`] is
/// gone, and that before [`Loader::load`] returns or unwinds.
#[derive(Debug)]
struct Job {
    from: Origin,
    target: *mut u8,
    len: usize,
    latch: Arc<Latch>,
}

#[derive(Debug)]
enum Origin {
    Bytes(*const u8),
    File { fd: RawFd, name: String, offset: u64 },
}

// SAFETY: the pointers are used by one thread at a time, and what they point to outlives the job.
unsafe impl Send for Job {}

impl Job {
    fn new(source: Source<'_>, offset: u64, target: &mut [u8], latch: &Arc<Latch>) -> Job {
        let from = match source {
            Source::Bytes(bytes) => Origin::Bytes(bytes[offset as usize..][..target.len()].as_ptr()),
            Source::File { file, name } => Origin::File { fd: file.as_raw_fd(), name: name.to_owned(), offset },
        };
        latch.arm();
        Job { from, target: target.as_mut_ptr(), len: target.len(), latch: latch.clone() }
    }

    fn run(self) {
        // SAFETY: the target is a part of a chunk that nobody else touches before the latch opens.
        let target = unsafe { std::slice::from_raw_parts_mut(self.target, self.len) };
        let result = match self.from {
            Origin::Bytes(bytes) => {
                // SAFETY: `len` bytes begin there, and stay until the latch opens.
                target.copy_from_slice(unsafe { std::slice::from_raw_parts(bytes, self.len) });
                Ok(())
            }
            Origin::File { fd, name, offset } => {
                // SAFETY: the descriptor stays open until the latch opens, and is not closed here.
                let file = ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
                let read = file.read_exact_at(target, offset);
                read.map_err(|source| LoadError::Read { name, offset, len: self.len, source })
            }
        };
        self.latch.release(result);
    }
}

/// Threads that run jobs in the order in which they come.
#[derive(Debug)]
struct Readers {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: Mutex<(VecDeque<Job>, bool)>,
    changed: Condvar,
}

impl Readers {
    fn start(n: usize) -> Readers {
        let queue = Arc::<Queue>::default();
        let thread = |i: usize| {
            let queue = queue.clone();
            let builder = std::thread::Builder::new().name(format!("reader {i}"));
            builder.spawn(move || queue.work()).expect("the system grants a thread")
        };
        Readers { threads: (0..n).map(thread).collect(), queue }
    }

    fn push(&self, job: Job) {
        self.queue.lock().0.push_back(job);
        self.queue.changed.notify_one();
    }
}

impl Queue {
    fn work(&self) {
        loop {
            let idle = |state: &mut (VecDeque<Job>, bool)| state.0.is_empty() && !state.1;
            let mut state = self.changed.wait_while(self.lock(), idle).unwrap_or_else(|e| e.into_inner());
            let Some(job) = state.0.pop_front() else { return };
            drop(state);
            job.run();
        }
    }

    fn lock(&self) -> MutexGuard<'_, (VecDeque<Job>, bool)> {
        self.jobs.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.queue.lock().1 = true;
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A reader that panicked has nothing left to say.
            let _ = thread.join();
        }
    }
}

fn contract(what: &str, expected: impl ToString, found: impl ToString) -> CudaError {
    CudaError::Contract { op: format!("Loader: {what}"), expected: expected.to_string(), found: found.to_string() }
}
