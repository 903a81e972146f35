//! Valid blocks of random weights, for models that need the true shape and speed but not the true weights.
//!
//! Encoding gigabytes of fresh random numbers would be slower than a disk. So a pool of normally distributed weights
//! is encoded once, and each place of a tensor gets a unit of it (32 elements, or a block of 256), picked by a counter.
//! What is written is what the encoder makes of normal weights: codes, scales and minima are distributed as in a real
//! file of such weights. Places are independent of each other, so any part can be made at any time by any thread.

use rayon::prelude::*;

use super::{DType, DTypeError};

/// Positions that [`RandomBlocks::fill`] can start at are multiples of this many elements.
pub const FILL_ELEMS: usize = 256;

/// Elements in the pool: 32,768 units of 32, or 4,096 of 256.
const POOL_ELEMS: usize = 1 << 20;
/// Elements encoded or filled by one task; a multiple of [`FILL_ELEMS`].
const TASK_ELEMS: usize = 1 << 14;

/// A source of blocks whose elements are distributed as `N(0, sigma^2)`, then encoded.
#[derive(Debug, Clone)]
pub struct RandomBlocks {
    dtype: DType,
    seed: u64,
    /// Bytes of one unit.
    unit_bytes: usize,
    pool: Vec<u8>,
}

impl RandomBlocks {
    /// Encodes the pool, on rayon's threads: some 10 to 100 ms. The same arguments give the same bytes everywhere.
    ///
    /// # Errors
    /// [`DTypeError::NotFinite`] or [`DTypeError::TooLarge`] if the format cannot hold elements of about `5 * sigma`.
    pub fn new(dtype: DType, sigma: f32, seed: u64) -> Result<RandomBlocks, DTypeError> {
        let bytes_of = |n_elems: usize| n_elems / dtype.block_elems() * dtype.block_bytes();
        let mut pool = vec![0; bytes_of(POOL_ELEMS)];
        pool.par_chunks_mut(bytes_of(TASK_ELEMS)).enumerate().try_for_each(|(task_idx, bytes)| {
            let first = (task_idx * TASK_ELEMS) as u64;
            let x: Vec<f32> = (first..first + TASK_ELEMS as u64).map(|i| sigma * normal(seed, i)).collect();
            dtype.encode(&x, bytes)
        })?;
        Ok(RandomBlocks { dtype, seed, unit_bytes: bytes_of(dtype.block_elems().max(32)), pool })
    }

    /// Fills `out` with the encoded elements of tensor number `tensor` from element `first_elem` on, on rayon's threads.
    /// Filling a tensor in one call or in many gives the same bytes.
    ///
    /// # Errors
    /// [`DTypeError::PartialBlock`] if `first_elem` is not a multiple of [`FILL_ELEMS`], or `out` is not whole blocks.
    pub fn fill(&self, tensor: u64, first_elem: u64, out: &mut [u8]) -> Result<(), DTypeError> {
        let (elems, bytes) = (self.dtype.block_elems(), self.dtype.block_bytes());
        if !first_elem.is_multiple_of(FILL_ELEMS as u64) || !out.len().is_multiple_of(bytes) {
            // The elements that these bytes would be, rounded up so that a part of a block shows.
            let n_elems = (first_elem as usize % FILL_ELEMS).max(out.len().div_ceil(bytes) * elems);
            return Err(DTypeError::PartialBlock { dtype: self.dtype, n_elems });
        }
        let unit_elems = elems.max(32);
        let task_bytes = TASK_ELEMS / unit_elems * self.unit_bytes;
        let stream = mix(self.seed ^ mix(tensor));
        let n_units = (self.pool.len() / self.unit_bytes) as u64;
        out.par_chunks_mut(task_bytes).enumerate().for_each(|(task_idx, out)| {
            let first_unit = first_elem / unit_elems as u64 + (task_idx * TASK_ELEMS / unit_elems) as u64;
            for (unit_idx, out) in out.chunks_mut(self.unit_bytes).enumerate() {
                let pick = mix(stream ^ (first_unit + unit_idx as u64)) % n_units;
                let first = pick as usize * self.unit_bytes;
                out.copy_from_slice(&self.pool[first..first + out.len()]);
            }
        });
        Ok(())
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014) over the counter's step: 64 well-mixed bits.
#[inline]
fn mix(counter: u64) -> u64 {
    let z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Number `i` of a sequence of standard normal numbers (Box and Muller 1958), `libm`'s functions so that it is the
/// same everywhere. At most 5.8 in magnitude.
fn normal(seed: u64, i: u64) -> f32 {
    let bits = mix(seed ^ mix(i));
    // 24 bits each; the first in (0, 1].
    let u = ((bits >> 40) + 1) as f32 / 16_777_216.0;
    let v = (bits & 0x00ff_ffff) as f32 / 16_777_216.0;
    libm::sqrtf(-2.0 * libm::logf(u)) * libm::cosf(std::f32::consts::TAU * v)
}
