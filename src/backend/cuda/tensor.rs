//! Activation buffers: rows of f32, or the f16 rows that the next product reads.

use super::plan::tensor_len;
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::{Arena, Buffer};
use playhouse_cuda::launch::matmul::Rows;
use playhouse_cuda::launch::matrix::{HalfRows, TILE_K};

/// An activation buffer of the interpreter. What it holds is what the last op wrote.
#[derive(Debug)]
pub struct CudaTensor {
    data: Buffer<f32>,
    cols: usize,
    content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// f32 `[rows, cols]`.
    Full,
    /// f16 `[rows, stride]`, zero from `cols` on.
    Half { stride: usize },
}

impl CudaTensor {
    pub(super) fn new(arena: &Arena, rows: usize, cols: usize) -> Result<Self, CudaError> {
        let data = arena.alloc(tensor_len(rows, cols), &format!("activations {rows} x {cols}"))?;
        data.zero()?;
        Ok(Self { data, cols, content: Content::Full })
    }

    /// The f32 rows, to read or to add to.
    pub(super) fn full(&self, cols: usize) -> Result<Rows<f32>, CudaError> {
        match self.content {
            Content::Full if self.cols == cols => Ok(Rows { data: self.data.clone(), stride: cols }),
            content => Err(wrong(format!("f32 rows of {cols}"), format!("{content:?} of {}", self.cols))),
        }
    }

    /// The f32 rows, to be overwritten.
    pub(super) fn fill_full(&mut self, cols: usize) -> Result<Rows<f32>, CudaError> {
        self.content = Content::Full;
        self.full(cols)
    }

    /// The f16 rows, if that is what the buffer holds.
    pub(super) fn half(&self) -> Option<HalfRows> {
        match self.content {
            Content::Half { stride } => Some(HalfRows { data: self.data.cast(), stride }),
            Content::Full => None,
        }
    }

    /// f16 rows to be overwritten, padded with zeros for a product.
    pub(super) fn fill_half(&mut self, cols: usize) -> Result<HalfRows, CudaError> {
        self.fill_half_strided(cols, cols.next_multiple_of(TILE_K))
    }

    /// f16 rows to be overwritten, without padding.
    pub(super) fn fill_half_packed(&mut self, cols: usize) -> Result<HalfRows, CudaError> {
        self.fill_half_strided(cols, cols)
    }

    fn fill_half_strided(&mut self, cols: usize, stride: usize) -> Result<HalfRows, CudaError> {
        if self.cols != cols {
            return Err(wrong(format!("rows of {cols}"), self.cols));
        }
        if self.content != (Content::Half { stride }) {
            self.data.zero()?;
            self.content = Content::Half { stride };
        }
        Ok(HalfRows { data: self.data.cast(), stride })
    }

    /// The first `out.len()` elements as f32, after everything enqueued.
    pub(super) fn read(&self, out: &mut [f32]) -> Result<(), CudaError> {
        let Some(half) = self.half() else {
            return self.data.slice(0..out.len()).read(out);
        };
        let n_rows = out.len().div_ceil(self.cols);
        let mut host = vec![half::f16::ZERO; n_rows * half.stride];
        half.data.slice(0..host.len()).read(&mut host)?;
        for (row, out) in host.chunks(half.stride).zip(out.chunks_mut(self.cols)) {
            out.iter_mut().zip(row).for_each(|(o, h)| *o = h.to_f32());
        }
        Ok(())
    }

    /// The f32 buffer, whatever it holds.
    pub(super) fn data(&self) -> &Buffer<f32> {
        &self.data
    }

    /// Whether it holds f32.
    pub(super) fn is_full(&self) -> bool {
        self.content == Content::Full
    }
}

fn wrong(expected: impl ToString, found: impl ToString) -> CudaError {
    CudaError::Contract { op: "activations".into(), expected: expected.to_string(), found: found.to_string() }
}
