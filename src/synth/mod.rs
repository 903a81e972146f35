//! Model files with random weights at the true shape, for benchmarks and tests where the real file is not at hand.
//!
//! ```text
//! Shape (a row in a table) ─┬─ tensors: names, sizes, how to fill them ─┐
//! FileType ── mix: a type per tensor, as llama.cpp's quantiser chooses ─┼─> Plan ── write ──> any Write
//! --vocab or vocab: tokenizer.* keys ────────────────────────────────────┘
//! ```
//!
//! A file has the metadata keys, the tensors and the mix of types that files of the real model have, so that loading
//! it and every kernel do the same work. What it does not have is sense: the text is babble.
//!
//! **Scale.** Weights are normal with variance `1 / columns`, so that a normalised input gives an output of variance
//! 1 whatever the width. The output matrix is scaled so that logits have the standard deviation at which the
//! next-token distribution is neither flat nor one spike, see [`logit_std`].
//!
//! **Speed.** Encoding a few thousand blocks of normal weights with the real encoder gives a pool for each type and
//! scale; tensors are filled with blocks drawn from it. The draw depends on the seed, the tensor and the place only,
//! so the same seed gives the same file on any number of threads.

mod shapes;
mod mix;
mod tensors;
mod vocab;
mod random;
mod fill;

use std::io::Write;

pub use mix::FileType;
pub use shapes::{SHAPES, Shape};

use crate::dtype::DType;
use crate::gguf::Metadata;
use crate::gguf::writer::{GgufWriteError, GgufWriter};
use tensors::Init;

/// A tensor of the file to be written.
#[derive(Debug, Clone)]
pub(crate) struct TensorPlan {
    name: String,
    /// ggml's order: `dims[0]` is the length of a row.
    dims: Vec<u64>,
    dtype: DType,
    init: Init,
}

impl TensorPlan {
    fn n_elems(&self) -> u64 {
        self.dims.iter().product()
    }

    fn n_bytes(&self) -> u64 {
        self.n_elems() / self.dtype.block_elems() as u64 * self.dtype.block_bytes() as u64
    }
}

/// A file that can be written: header and tensors.
#[derive(Debug, Clone)]
pub struct Plan {
    header: GgufWriter,
    tensors: Vec<TensorPlan>,
    seed: u64,
}

/// The standard deviation of logits over `n_vocab` tokens.
///
/// For normal logits of deviation s, the likeliest of n tokens has probability near 0 while s is far below
/// sqrt(2 ln n), and near 1 far above; 0.8 of it leaves some hundred tokens in play.
pub fn logit_std(n_vocab: u64) -> f32 {
    0.8 * libm::sqrtf(2.0 * libm::logf(n_vocab as f32))
}

impl Plan {
    /// Plans a file of this shape and type. `vocab` has the `tokenizer.*` keys to copy; without it, they are made up.
    /// A vocabulary of another length than the shape's gives the embedding and the output that many rows.
    ///
    /// # Errors
    /// What is wrong with `vocab`: its keys are not a GGUF file's.
    pub fn new(
        shape: &Shape,
        file_type: FileType,
        seed: u64,
        vocab: Option<&Metadata>,
    ) -> Result<Self, crate::gguf::GgufError> {
        let mut header = shape.metadata(file_type);
        let n_vocab = match vocab {
            Some(source) => {
                let n = source.strs("tokenizer.ggml.tokens")?.len() as u64;
                for (key, value) in source.iter().filter(|(key, _)| key.starts_with("tokenizer.")) {
                    header.set(key, value.clone());
                }
                n
            }
            None => {
                vocab::set_keys(&mut header, shape);
                shape.n_vocab
            }
        };
        shape.set_n_vocab(&mut header, n_vocab);
        header.set("general.quantization_version", 2u32);
        let tensors = tensors::plan(shape, file_type, n_vocab);
        for t in &tensors {
            header.tensor(t.name.clone(), &t.dims, t.dtype);
        }
        Ok(Self { header, tensors, seed })
    }

    /// Bytes of all tensors without padding.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorPlan::n_bytes).sum()
    }

    /// Names, sizes and types of the tensors, in the order of the file.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[u64], DType)> {
        self.tensors.iter().map(|t| (&t.name[..], &t.dims[..], t.dtype))
    }

    /// Writes only what stands before the data; for tests of the shape that need no weights.
    ///
    /// # Errors
    /// Where `out` fails.
    pub fn write_header<W: Write>(&self, out: W) -> Result<(), GgufWriteError> {
        self.header.clone().begin(out).map(drop)
    }

    /// Writes the file. `progress` hears the bytes of data written so far.
    ///
    /// # Errors
    /// Where `out` fails.
    pub fn write<W: Write>(self, out: W, progress: &mut dyn FnMut(u64)) -> Result<W, GgufWriteError> {
        let mut sink = self.header.begin(out)?;
        let mut written = 0;
        fill::pieces(&self.tensors, self.seed, |piece| {
            sink.write_part(piece)?;
            written += piece.len() as u64;
            progress(written);
            Ok(())
        })?;
        sink.finish()
    }
}

#[cfg(test)]
mod tests;
