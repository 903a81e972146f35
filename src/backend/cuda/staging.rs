//! The way of weights from the file's map to the GPU: in chunks through page-locked memory, repacked on arrival.

use playhouse_cuda::CudaError;
use playhouse_cuda::arena::{Arena, Buffer};
use playhouse_cuda::gpu::Gpu;
use playhouse_cuda::kernels::Kernels;
use playhouse_cuda::launch::matrix::{Matrix, Part, RowRange};
use playhouse_cuda::pinned::Pinned;
use rayon::prelude::*;

/// Bytes of a chunk.
const CHUNK: usize = 16 << 20;
/// Bytes that one thread copies at a time.
const PIECE: usize = 1 << 20;

/// Two chunks on the host and on the device: while one is repacked, the other is filled.
pub(super) struct Staging {
    gpu: Gpu,
    slots: Vec<(Pinned<u8>, Buffer<u8>)>,
    turn: usize,
}

impl Staging {
    pub(super) fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        let arena = Arena::new(gpu, "staging", 2 * CHUNK as u64)?;
        arena.commit(2 * CHUNK as u64)?;
        let slot = |_| Ok((Pinned::new(gpu, CHUNK)?, arena.alloc(CHUNK, "staging")?));
        Ok(Self { gpu: gpu.clone(), slots: (0..2).map(slot).collect::<Result<_, CudaError>>()?, turn: 0 })
    }

    /// Copies `bytes` to `target` as they are.
    pub(super) fn copy(&mut self, bytes: &[u8], target: &Buffer<u8>) -> Result<(), CudaError> {
        for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
            let first = i * CHUNK;
            self.next()?;
            let (pinned, _) = &mut self.slots[self.turn];
            copy_parallel(chunk, &mut pinned[..chunk.len()]);
            pinned.copy_to(&target.slice(first..first + chunk.len()), chunk.len())?;
        }
        Ok(())
    }

    /// Repacks all rows of a part of every matrix; two sources for a gated one.
    pub(super) fn fill(
        &mut self,
        kernels: &Kernels,
        matrix: &Matrix,
        (part, Part { format, n_rows }): (usize, Part),
        sources: &[&[u8]],
    ) -> Result<(), CudaError> {
        let n_mats = matrix.shape().n_mats;
        let row_bytes = sources[0].len() / (n_mats * n_rows);
        let step = matrix.row_step();
        let per_chunk = (CHUNK / sources.len() / row_bytes / step * step).max(step);
        for mat in 0..n_mats {
            for first in (0..n_rows).step_by(per_chunk) {
                let n = per_chunk.min(n_rows - first);
                let bytes = n * row_bytes;
                if bytes * sources.len() > CHUNK {
                    let (expected, found) = (format!("at most {CHUNK} bytes in {step} rows"), bytes.to_string());
                    return Err(CudaError::Contract { op: "Staging::fill".into(), expected, found });
                }
                self.next()?;
                let (pinned, device) = &mut self.slots[self.turn];
                for (source, target) in sources.iter().zip(pinned.chunks_mut(bytes)) {
                    copy_parallel(&source[(mat * n_rows + first) * row_bytes..][..bytes], target);
                }
                pinned.copy_to(device, bytes * sources.len())?;
                let parts: Vec<Buffer<u8>> =
                    (0..sources.len()).map(|i| device.slice(i * bytes..(i + 1) * bytes)).collect();
                let rows = RowRange { part, mat, first, n_rows: n };
                matrix.fill_rows(kernels, rows, format, &parts.iter().collect::<Vec<_>>())?;
            }
        }
        Ok(())
    }

    /// Turns to the next slot once nothing uses it.
    fn next(&mut self) -> Result<(), CudaError> {
        self.turn = (self.turn + 1) % self.slots.len();
        self.gpu.synchronize()
    }
}

/// Copies with many threads: one alone fills a third of a bus.
fn copy_parallel(source: &[u8], target: &mut [u8]) {
    source.par_chunks(PIECE).zip(target.par_chunks_mut(PIECE)).for_each(|(s, t)| t.copy_from_slice(s));
}
