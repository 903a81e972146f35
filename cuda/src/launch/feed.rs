//! What a step needs of the host, brought to the device by one kernel; tokens that the step before chose come from the device itself.
//!
//! The kernel reads the host's memory over the bus. A copy would be done by another engine of the chip, and kernels on either side of it
//! would wait for it.

use crate::arena::{Buffer, Element};
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};
use crate::pinned::Pinned;
use std::marker::PhantomData;

/// Most arrays of a launch. Mirrors `COPIES`.
pub const MAX_PIECES: usize = 6;
/// An id with this bit is the row of the step before whose choice the token is.
pub const CHOSEN: u32 = 1 << 31;
/// Bytes of a quad of words.
const QUAD: u64 = 16;
/// Most blocks of a piece: enough to keep the bus busy.
const MAX_BLOCKS: usize = 32;

/// An array on its way.
#[derive(Debug, Clone, Copy)]
pub struct Piece<'a> {
    raw: RawPiece,
    memory: PhantomData<&'a ()>,
}

/// Mirrors `Piece` in feed.cu.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct RawPiece {
    from: u64,
    to: u64,
    n_words: u64,
}

impl<'a> Piece<'a> {
    /// The first `n` elements of `from`, to the first `n` of `to`. Whole quads of words are copied: up to twelve bytes after them are
    /// overwritten, in the buffer or in the padding that ends it.
    ///
    /// # Errors
    /// [`CudaError::Contract`] if either side is shorter, is not aligned to a quad, or has elements that are not whole words.
    pub fn new<T: Element>(from: &'a Pinned<T>, to: &'a Buffer<T>, n: usize) -> Result<Piece<'a>, CudaError> {
        if n > from.len() || n > to.len() {
            return Err(contract(format!("at most {} (host) and {} (device) elements", from.len(), to.len()), n));
        }
        let raw = RawPiece { from: from.device_ptr(), to: to.ptr(), n_words: (n * size_of::<T>() / 4) as u64 };
        if !size_of::<T>().is_multiple_of(4) || !raw.from.is_multiple_of(QUAD) || !raw.to.is_multiple_of(QUAD) {
            let expected = "words, aligned to sixteen bytes".to_owned();
            return Err(contract(expected, format!("{} bytes at {:x} and {:x}", size_of::<T>(), raw.from, raw.to)));
        }
        Ok(Piece { raw, memory: PhantomData })
    }

    /// Whether there is nothing to bring.
    pub fn is_empty(&self) -> bool {
        self.raw.n_words == 0
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct FeedArgs {
    pieces: [RawPiece; MAX_PIECES],
    chosen: u64,
    n_tokens: u64,
}

/// Enqueues bringing the first `n` words of `inputs.0` to `inputs.1`, and `others` to their places. The inputs begin with `n_tokens` ids, of
/// which those with [`CHOSEN`] become what that row of `chosen` holds when everything enqueued before has run. Nothing of the host's
/// memory may change before this has run.
///
/// # Errors
/// [`CudaError::Contract`], also for a row that `chosen` does not have; a failed launch.
pub fn feed(
    kernels: &Kernels,
    (inputs, to, n): (&Pinned<u32>, &Buffer<u32>, usize),
    n_tokens: usize,
    chosen: &Buffer<u32>,
    others: &[Piece<'_>],
) -> Result<(), CudaError> {
    if n_tokens > n || others.len() >= MAX_PIECES {
        return Err(contract(
            format!("at most {n} ids, {} other pieces", MAX_PIECES - 1),
            format!("{n_tokens}, {}", others.len()),
        ));
    }
    let pieces: Vec<RawPiece> = [Piece::new(inputs, to, n)?].iter().chain(others).map(|piece| piece.raw).collect();
    let beyond = |id: &&u32| **id & CHOSEN != 0 && (**id & !CHOSEN) as usize >= chosen.len();
    if let Some(id) = inputs[..n_tokens].iter().find(beyond) {
        return Err(contract(format!("rows below {}", chosen.len()), id & !CHOSEN));
    }
    let none = RawPiece { from: 0, to: 0, n_words: 0 };
    let mut args = FeedArgs { pieces: [none; MAX_PIECES], chosen: chosen.ptr(), n_tokens: n_tokens as u64 };
    args.pieces[..pieces.len()].copy_from_slice(&pieces);
    let most = pieces.iter().map(|piece| piece.n_words as usize).max().unwrap_or(0);
    let mut launch = Launch::new((blocks(most) as u32, pieces.len() as u32, 1), (256, 1, 1));
    launch.overlap = true;
    // SAFETY: FeedArgs mirrors the kernel's parameter; pieces and rows were held against their buffers, which wait for the device before they
    // give their memory back.
    unsafe { kernels.get("feed", "feed", 0)?.launch(kernels.gpu(), launch, Args::new().with(args)) }
}

/// Blocks for pieces of up to `n_words`: a thread has a quad, or more of them where there are too many.
fn blocks(n_words: usize) -> usize {
    n_words.div_ceil(4 * 256).clamp(1, MAX_BLOCKS)
}

fn contract(expected: String, found: impl ToString) -> CudaError {
    CudaError::Contract { op: "feed".into(), expected, found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_a_quad_until_the_bus_is_busy() {
        let found = [0, 1, 1024, 1025, 32 * 1024, 32 * 1024 + 1, 1 << 24].map(blocks);
        assert_eq!(found, [1, 1, 1, 2, 32, 32, 32]);
    }
}
