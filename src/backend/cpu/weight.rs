//! Resident weights: encoded rows where the file has them, or f32 vectors decoded once.

use super::matmul::{self, Mat};
use crate::backend::{BackendError, WeightSource};
use crate::dtype::DType;
use crate::gguf::TensorBytes;
use std::borrow::Cow;

/// A weight as the CPU holds it.
///
/// Matrices stay encoded in the file's memory map. Vectors (norms, biases, sinks) are decoded to f32 when they are
/// loaded, because they are small and read element by element.
#[derive(Debug, Clone)]
pub struct CpuWeight {
    name: String,
    dtype: DType,
    n_mats: usize,
    n_rows: usize,
    n_cols: usize,
    row_bytes: usize,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    Encoded(TensorBytes),
    Decoded(Vec<f32>),
}

impl CpuWeight {
    /// Checks the source's sizes and takes hold of its bytes.
    pub(super) fn new(source: WeightSource<'_>) -> Result<Self, BackendError> {
        let WeightSource { name, dtype, n_mats, n_rows, n_cols, bytes, .. } = source;
        let refuse = |reason: String| BackendError::Unsupported { device: "cpu".into(), tensor: name.into(), reason };
        let row_bytes = dtype.row_bytes(n_cols).ok_or_else(|| {
            refuse(format!("rows of {n_cols} elements are no whole number of {} blocks", dtype.name()))
        })?;
        let expected = n_mats.checked_mul(n_rows).and_then(|n| n.checked_mul(row_bytes));
        if expected != Some(bytes.len()) || bytes.is_empty() {
            return Err(refuse(format!(
                "expected {n_mats} x {n_rows} rows of {row_bytes} bytes ({}), found {} bytes",
                dtype.name(),
                bytes.len()
            )));
        }
        let mut weight =
            Self { name: name.into(), dtype, n_mats, n_rows, n_cols, row_bytes, data: Data::Encoded(bytes) };
        if n_rows == 1 || (dtype == DType::F32 && !weight.is_aligned()) {
            weight.decode_all();
        }
        Ok(weight)
    }

    fn is_aligned(&self) -> bool {
        bytemuck::try_cast_slice::<u8, f32>(self.bytes()).is_ok()
    }

    fn decode_all(&mut self) {
        let mut all = vec![0.0; self.n_mats * self.n_rows * self.n_cols];
        for (row, out) in all.chunks_exact_mut(self.n_cols).enumerate() {
            matmul::decode_row(
                super::Isa::best(),
                self.dtype,
                &self.bytes()[row * self.row_bytes..][..self.row_bytes],
                out,
            );
        }
        self.data = Data::Decoded(all);
        self.dtype = DType::F32;
        self.row_bytes = 4 * self.n_cols;
    }

    fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Encoded(bytes) => bytes,
            Data::Decoded(all) => bytemuck::cast_slice(all),
        }
    }

    /// The tensor's name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `(n_mats, n_rows, n_cols)`.
    pub fn shape(&self) -> (usize, usize, usize) {
        (self.n_mats, self.n_rows, self.n_cols)
    }

    /// Where the bytes lie and how many they are, to count shared ones once.
    pub(super) fn extent(&self) -> (usize, u64) {
        (self.bytes().as_ptr() as usize, self.bytes().len() as u64)
    }

    /// Matrix `mat` of the stack.
    pub(super) fn mat(&self, mat: usize) -> Mat<'_> {
        let len = self.n_rows * self.row_bytes;
        Mat {
            dtype: self.dtype,
            bytes: &self.bytes()[mat * len..][..len],
            row_bytes: self.row_bytes,
            n_rows: self.n_rows,
            n_cols: self.n_cols,
        }
    }

    /// All elements, if they are f32.
    pub(super) fn f32s(&self) -> Option<&[f32]> {
        match &self.data {
            Data::Decoded(all) => Some(all),
            Data::Encoded(bytes) if self.dtype == DType::F32 => bytemuck::try_cast_slice(bytes).ok(),
            Data::Encoded(_) => None,
        }
    }

    /// A vector of `n` elements.
    ///
    /// # Panics
    /// If this is no vector of `n` elements: shapes are validated when a model is loaded.
    pub(super) fn vector(&self, n: usize) -> &[f32] {
        let all = self.f32s().unwrap_or_default();
        assert_eq!(all.len(), n, "`{}` {:?} is not a vector of {n}", self.name, self.shape());
        all
    }

    /// Row `i` of `n` elements, counted over all stacked matrices.
    ///
    /// # Panics
    /// If rows are not `n` long.
    pub(super) fn row(&self, i: usize, n: usize) -> Cow<'_, [f32]> {
        assert_eq!(self.n_cols, n, "`{}` {:?} has no rows of {n}", self.name, self.shape());
        if let Some(all) = self.f32s() {
            return Cow::Borrowed(&all[i * n..][..n]);
        }
        let mut out = vec![0.0; n];
        matmul::decode_row(
            super::Isa::best(),
            self.dtype,
            &self.bytes()[i * self.row_bytes..][..self.row_bytes],
            &mut out,
        );
        Cow::Owned(out)
    }
}
