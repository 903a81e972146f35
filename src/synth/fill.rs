//! Makes the bytes of tensors: blocks drawn from pools of encoded normal weights, in parallel, ahead of the writer.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rayon::prelude::*;

use super::TensorPlan;
use super::random::Stream;
use super::tensors::Init;
use crate::dtype::DType;
use crate::gguf::writer::GgufWriteError;

/// Bytes that are handed to the writer at once.
const PIECE_BYTES: usize = 8 << 20;
/// Bytes that one task fills; also the step of the place in a stream's key, so the result does not depend on threads.
const TASK_BYTES: usize = 256 << 10;
/// Elements of a pool. Small enough to encode quickly and to stay in a core's cache; large enough that two rows have
/// a block in common at the same place only once in 512 blocks.
const POOL_ELEMS: usize = 1 << 17;
/// Elements of a chunk, the unit that is drawn: one block, or 32 elements where a block is one.
const MIN_CHUNK_ELEMS: usize = 32;
/// The pieces between the filling and the writing thread.
const N_BUFFERS: usize = 3;

/// Encoded blocks of normal weights of one type and deviation.
struct Pool {
    bytes: Vec<u8>,
    chunk_bytes: usize,
    /// A power of two.
    n_chunks: usize,
}

impl Pool {
    fn new(dtype: DType, std: f32, seed: u64) -> Self {
        let chunk_elems = dtype.block_elems().max(MIN_CHUNK_ELEMS);
        let chunk_bytes = chunk_elems / dtype.block_elems() * dtype.block_bytes();
        let n_chunks = POOL_ELEMS / chunk_elems;
        let mut bytes = vec![0; n_chunks * chunk_bytes];
        let key = u64::from(dtype.id()) << 32 | u64::from(std.to_bits());
        bytes.par_chunks_mut(64 * chunk_bytes).enumerate().for_each(|(i, out)| {
            let mut weights = vec![0.0; out.len() / chunk_bytes * chunk_elems];
            Stream::new(seed, key, i as u64).fill_normal(&mut weights, 0.0, std);
            dtype.encode(&weights, out).expect("whole blocks of a type that can be encoded");
        });
        Self { bytes, chunk_bytes, n_chunks }
    }

    /// Fills `out` with chunks drawn from the pool; the last may be cut.
    fn fill(&self, out: &mut [u8], stream: &mut Stream) {
        const PICKS: usize = 4;
        for group in out.chunks_mut(PICKS * self.chunk_bytes) {
            let mut bits = stream.next();
            for chunk in group.chunks_mut(self.chunk_bytes) {
                let at = (bits as usize & (self.n_chunks - 1)) * self.chunk_bytes;
                chunk.copy_from_slice(&self.bytes[at..at + chunk.len()]);
                bits >>= u64::BITS as usize / PICKS;
            }
        }
    }
}

/// A key of a pool: the deviation by its bits, so that it can be hashed.
type PoolKey = (DType, u32);

fn pools(tensors: &[TensorPlan], seed: u64) -> HashMap<PoolKey, Pool> {
    let mut pools = HashMap::new();
    for t in tensors {
        if let Init::Weights(std) = t.init {
            pools.entry((t.dtype, std.to_bits())).or_insert_with(|| Pool::new(t.dtype, std, seed));
        }
    }
    pools
}

/// Calls `write` with the bytes of all tensors in order, in pieces that never span two tensors.
pub(super) fn pieces(
    tensors: &[TensorPlan],
    seed: u64,
    mut write: impl FnMut(&[u8]) -> Result<(), GgufWriteError>,
) -> Result<(), GgufWriteError> {
    let pools = pools(tensors, seed);
    let (full, filled) = sync_channel::<Vec<u8>>(N_BUFFERS);
    let (back, empty) = sync_channel::<Vec<u8>>(N_BUFFERS);
    std::thread::scope(|scope| {
        let fill = || fill_all(tensors, &pools, seed, full, empty);
        scope.spawn(fill);
        // An error drops our ends of both channels, and with them the filling thread ends.
        let (filled, back) = (filled, back);
        for _ in 0..N_BUFFERS {
            // There is room for all. A filling thread that has nothing to do may have gone.
            let _ = back.send(Vec::new());
        }
        for piece in &filled {
            write(&piece)?;
            let _ = back.send(piece);
        }
        Ok(())
    })
}

/// The filling thread; ends early when nobody listens.
fn fill_all(
    tensors: &[TensorPlan],
    pools: &HashMap<PoolKey, Pool>,
    seed: u64,
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
) {
    for (idx, t) in tensors.iter().enumerate() {
        let mut at = 0;
        let n_bytes = t.n_bytes();
        while at < n_bytes {
            let len = (n_bytes - at).min(piece_bytes(t.dtype) as u64) as usize;
            let Ok(mut piece) = empty.recv() else { return };
            piece.resize(len, 0);
            fill_piece(t, pools, (seed, idx as u64, at), &mut piece);
            at += len as u64;
            if full.send(piece).is_err() {
                return;
            }
        }
    }
}

/// A multiple of the chunk size near [`TASK_BYTES`], so that tasks begin at blocks.
fn task_bytes(dtype: DType) -> usize {
    let chunk_bytes = dtype.block_elems().max(MIN_CHUNK_ELEMS) / dtype.block_elems() * dtype.block_bytes();
    TASK_BYTES / chunk_bytes * chunk_bytes
}

fn piece_bytes(dtype: DType) -> usize {
    PIECE_BYTES / TASK_BYTES * task_bytes(dtype)
}

/// Fills the piece that begins `at` bytes into tensor `idx`.
fn fill_piece(t: &TensorPlan, pools: &HashMap<PoolKey, Pool>, (seed, idx, at): (u64, u64, u64), out: &mut [u8]) {
    let task = task_bytes(t.dtype);
    out.par_chunks_mut(task).enumerate().for_each(|(i, out)| {
        let mut stream = Stream::new(seed, idx, at / task as u64 + i as u64);
        match t.init {
            Init::Weights(std) => pools[&(t.dtype, std.to_bits())].fill(out, &mut stream),
            Init::Vector(mean, std) => {
                let mut values = vec![0.0f32; out.len() / size_of::<f32>()];
                stream.fill_normal(&mut values, mean, std);
                out.copy_from_slice(bytemuck::cast_slice(&values));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(dtype: DType, init: Init) -> TensorPlan {
        TensorPlan { name: "t".into(), dims: vec![256, 3000], dtype, init }
    }

    #[test]
    fn bytes_depend_on_the_place_and_not_on_threads() {
        for t in [plan(DType::Q4_K, Init::Weights(0.1)), plan(DType::F32, Init::Vector(0.0, 1.0))] {
            let tensors = [t];
            let make = |n_threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
                pool.install(|| {
                    let mut out = vec![0; tensors[0].n_bytes() as usize];
                    fill_piece(&tensors[0], &pools(&tensors, 7), (7, 0, 0), &mut out);
                    out
                })
            };
            let once = make(1);
            assert!(once == make(3));
            let task = task_bytes(tensors[0].dtype);
            let mut second = vec![0; 1000];
            fill_piece(&tensors[0], &pools(&tensors, 7), (7, 0, task as u64), &mut second);
            assert!(once[task..task + 1000] == second);
        }
    }

    #[test]
    fn a_failing_writer_ends_the_filling() {
        let tensors = [TensorPlan { dims: vec![256, 200_000], ..plan(DType::F32, Init::Vector(0.0, 1.0)) }];
        let result = pieces(&tensors, 1, |_| Err(std::io::Error::other("full").into()));
        assert!(matches!(result, Err(GgufWriteError::Io(_))));
    }
}
