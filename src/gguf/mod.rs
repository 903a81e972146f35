//! A checked reader and a writer of GGUF files.

use std::ops::{Deref, Range};
use std::sync::Arc;

/// Bytes of tensor data: a cheap handle on a range of a file's memory map or of memory.
#[derive(Debug, Clone)]
pub struct TensorBytes {
    all: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl TensorBytes {
    /// Bytes in memory.
    pub fn from_vec(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { all: Arc::new(bytes), range }
    }
}

impl Deref for TensorBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.all[self.range.clone()]
    }
}
