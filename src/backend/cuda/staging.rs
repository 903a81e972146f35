//! The way of weights from the file's map to the GPU: in chunks through page-locked memory, repacked on arrival.

use playhouse_cuda::CudaError;
use playhouse_cuda::arena::Buffer;
use playhouse_cuda::gpu::Gpu;
use playhouse_cuda::kernels::Kernels;
use playhouse_cuda::launch::matrix::{Matrix, Part, RowRange};
use playhouse_cuda::loader::{LoadError, Loader, LoaderSizes, Piece, Source};

/// Most bytes of a chunk: a third of a millisecond on the bus. Page-locking memory takes longer than filling it.
const MOST: usize = 16 << 20;
/// Least bytes of a chunk: sixteen rows of any matrix.
const LEAST: usize = 4 << 20;

/// A ring of chunks on the host and on the device: while one is repacked, the next are copied and read.
pub(super) struct Staging {
    loader: Loader,
}

impl Staging {
    /// For weights of which the largest has `largest` bytes.
    pub(super) fn new(gpu: &Gpu, largest: usize) -> Result<Self, CudaError> {
        let n_cores = std::thread::available_parallelism().map_or(1, usize::from);
        let chunk_bytes = largest.clamp(LEAST, MOST);
        let sizes = LoaderSizes { chunk_bytes, n_readers: n_cores.min(16), ..LoaderSizes::default() };
        Ok(Self { loader: Loader::new(gpu, sizes)? })
    }

    /// Copies `bytes` to `target` as they are.
    pub(super) fn copy(&mut self, bytes: &[u8], target: &Buffer<u8>) -> Result<(), CudaError> {
        let step = self.loader.chunk_bytes();
        let piece =
            |at: usize| Piece { source: Source::Bytes(bytes), offset: at as u64, len: step.min(bytes.len() - at) };
        let chunks: Vec<Vec<Piece<'_>>> = (0..bytes.len()).step_by(step).map(|at| vec![piece(at)]).collect();
        let result = self.loader.load(&chunks, |arrival| {
            let (first, piece) = (arrival.chunk * step, &arrival.pieces[0]);
            Ok::<(), LoadError>(target.slice(first..first + piece.len()).copy_from(piece)?)
        });
        result.map_err(cuda)
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
        let per_chunk = (self.loader.chunk_bytes() / sources.len() / row_bytes / step * step).max(step);
        let of_mat = |mat: usize| {
            let rows = move |first: usize| RowRange { part, mat, first, n_rows: per_chunk.min(n_rows - first) };
            (0..n_rows).step_by(per_chunk).map(rows)
        };
        let ranges: Vec<RowRange> = (0..n_mats).flat_map(of_mat).collect();
        let piece = |rows: &RowRange, bytes| {
            let offset = ((rows.mat * n_rows + rows.first) * row_bytes) as u64;
            Piece { source: Source::Bytes(bytes), offset, len: rows.n_rows * row_bytes }
        };
        let chunks: Vec<Vec<Piece<'_>>> =
            ranges.iter().map(|rows| sources.iter().map(|bytes| piece(rows, *bytes)).collect()).collect();
        let result = self.loader.load(&chunks, |arrival| {
            let pieces: Vec<&Buffer<u8>> = arrival.pieces.iter().collect();
            Ok::<(), LoadError>(matrix.fill_rows(kernels, ranges[arrival.chunk], format, &pieces)?)
        });
        result.map_err(cuda)
    }
}

/// Bytes in memory can always be read: what is left are the device's failures.
fn cuda(error: LoadError) -> CudaError {
    match error {
        LoadError::Cuda(error) => error,
        read @ LoadError::Read { .. } => {
            let (expected, found) = ("bytes in memory".to_owned(), read.to_string());
            CudaError::Contract { op: "Staging".into(), expected, found }
        }
    }
}
