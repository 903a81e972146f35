//! A checked reader and a writer of GGUF files.
/// Bytes of tensor data: a cheap handle on a range of a file's memory map or of memory.
#[derive(Debug, Clone)]
pub struct TensorBytes;
