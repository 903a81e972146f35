//! Normalisation, router and choice of experts of a step of few tokens, in one launch.

use super::matmul::{NormInput, SMALL_COLUMNS, chunk_tiles, chunks};
use super::matrix::{HalfRows, Kind, Matrix, Planes, TILE_K, TileShape};
use super::moe::{Choices, MAX_EXPERTS};
use crate::arena::Buffer;
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};

/// Threads of a block: the lanes that sum a row's squares. Mirrors `NORM_LANES`.
const THREADS: usize = 256;
/// Columns that a thread holds. Mirrors `HELD` of `router.cu`.
const HELD: usize = 16;
/// What a block keeps besides weights and activations: sums, biases, sums of squares. Mirrors `RouterShared`, before what is aligned to 128.
const OWN_BYTES: usize = ((2 * MAX_EXPERTS + THREADS / 32) * 4).next_multiple_of(128);
/// Most bytes of weights and activations that a block keeps: all that it may have on chips with the least shared memory.
const MOST_BYTES: usize = (99 << 10) - OWN_BYTES;

/// The front of a mixture of experts: what [`super::norm::rms_norm`], a product that stores its scores and [`Choices::route`] do.
#[derive(Debug, Clone)]
pub struct Router<'a> {
    /// The rows, and how they are normalised.
    pub norm: NormInput<'a>,
    /// A row for each expert.
    pub matrix: &'a Matrix,
    /// `[n_experts]`.
    pub bias: Option<&'a Buffer<f32>>,
    /// The normalised rows, with their padding: what the experts read.
    pub normed: &'a HalfRows,
    /// f32 `[n, n_experts]`: the scores.
    pub scores: &'a Buffer<f32>,
    /// What is chosen.
    pub choices: &'a Choices,
}

/// Mirrors `RouterArgs` of `router.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RouterArgs {
    w: Planes,
    bias: u64,
    x: u64,
    norm_weight: u64,
    normed: u64,
    scores: u64,
    experts: u64,
    weights: u64,
    out_scale: f32,
    norm_eps: f32,
    n_cols: i32,
    n_tiles: i32,
    normed_stride: i32,
    n_experts: i32,
    n_used: i32,
}

/// Shared memory of a block: a chunk of every stripe, and of the row.
fn block_bytes(kind: Kind, shape: TileShape) -> usize {
    let tile: usize = kind.plane_bytes().iter().sum();
    chunk_tiles(shape.n_tiles) * (shape.n_stripes * tile + TILE_K * 2)
}

fn name(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::F16 => Some("router_f16"),
        Kind::Q8 => Some("router_q8"),
        _ => None,
    }
}

/// Whether [`Router::launch`] takes a router of this kind and shape for `n` tokens: up to 8 of up to 4,096 columns, a chunk of the weights
/// in the shared memory of a block, on a device whose blocks read each other's.
pub fn can_route_together(kind: Kind, shape: TileShape, n: usize, has_clusters: bool) -> bool {
    has_clusters
        && name(kind).is_some()
        && (1..=SMALL_COLUMNS).contains(&n)
        && shape.n_mats == 1
        && shape.n_tiles * TILE_K <= HELD * THREADS
        && block_bytes(kind, shape) <= MOST_BYTES
}

impl Router<'_> {
    /// Enqueues all of it for `n` tokens. Only where [`can_route_together`].
    ///
    /// # Errors
    /// [`CudaError::Contract`]; a failed launch.
    pub fn launch(&self, kernels: &Kernels, n: usize) -> Result<(), CudaError> {
        self.choices.check(n)?;
        let (kind, shape) = (self.matrix.kind(), self.matrix.shape());
        let kernel = match name(kind).filter(|_| can_route_together(kind, shape, n, kernels.has_clusters())) {
            Some(name) => kernels.get("router", name, MOST_BYTES as u32)?,
            None => {
                let expected = format!("up to {SMALL_COLUMNS} tokens, a router that a cluster of blocks holds");
                return Err(contract("router", expected, format!("{n} tokens, {kind:?}, {shape:?}")));
            }
        };
        self.check(n)?;
        let n_chunks = chunks(shape.n_tiles) as u32;
        let mut launch = Launch::new((n_chunks, n as u32, 1), (THREADS as u32, 1, 1));
        launch.shared_bytes = block_bytes(kind, shape) as u32;
        launch.overlap = true;
        // SAFETY: RouterArgs mirrors the kernel's parameter; the checks held every buffer against the shapes.
        unsafe { kernel.launch_clusters(kernels.gpu(), launch, n_chunks, Args::new().with(self.args())) }
    }

    fn args(&self) -> RouterArgs {
        RouterArgs {
            w: self.matrix.planes(),
            bias: self.bias.map_or(0, Buffer::ptr),
            x: self.norm.x.ptr(),
            norm_weight: self.norm.weight.ptr(),
            normed: self.normed.data.ptr(),
            scores: self.scores.ptr(),
            experts: self.choices.experts.ptr(),
            weights: self.choices.weights.ptr(),
            out_scale: self.matrix.out_scale(),
            norm_eps: self.norm.eps,
            n_cols: self.matrix.n_cols() as i32,
            n_tiles: self.matrix.shape().n_tiles as i32,
            normed_stride: self.normed.stride as i32,
            n_experts: self.choices.n_experts as i32,
            n_used: self.choices.n_used as i32,
        }
    }

    /// Holds the buffers against the shapes; [`Choices::check`] has held the choices.
    fn check(&self, n: usize) -> Result<(), CudaError> {
        let (n_cols, n_experts) = (self.matrix.n_cols(), self.choices.n_experts);
        if self.matrix.is_gated() || self.matrix.n_rows() != n_experts {
            return Err(contract("experts", format!("a row for each of {n_experts}"), self.matrix.n_rows()));
        }
        if self.norm.weight.len() != n_cols || self.norm.x.len() < n * n_cols {
            let found = format!("{} of {}", self.norm.x.len(), self.norm.weight.len());
            return Err(contract("x", format!("{n} rows of {n_cols}"), found));
        }
        let HalfRows { data, stride } = self.normed;
        if *stride < self.matrix.padded_cols() || data.len() < n * stride {
            let expected = format!("{n} rows of {} or more", self.matrix.padded_cols());
            return Err(contract("normalised rows", expected, format!("{} elements, stride {stride}", data.len())));
        }
        if self.scores.len() < n * n_experts {
            return Err(contract("scores", n * n_experts, self.scores.len()));
        }
        match self.bias {
            Some(bias) if bias.len() != n_experts => Err(contract("bias", n_experts, bias.len())),
            _ => Ok(()),
        }
    }
}

fn contract(what: &str, expected: impl ToString, found: impl ToString) -> CudaError {
    CudaError::Contract {
        op: format!("Router::launch: {what}"),
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(n_experts: usize, n_cols: usize) -> TileShape {
        TileShape { n_mats: 1, n_stripes: n_experts.div_ceil(16), n_tiles: n_cols.div_ceil(TILE_K) }
    }

    #[test]
    fn routers_of_models_fit_into_a_cluster() {
        // GPT-OSS-20B and 120B, Mixtral, Qwen3-30B-A3B.
        for (n_experts, n_cols) in [(32, 2880), (128, 2880), (8, 4096), (128, 2048)] {
            for n in [1, 8] {
                assert!(can_route_together(Kind::F16, shape(n_experts, n_cols), n, true), "{n_experts} of {n_cols}");
            }
        }
        assert_eq!(block_bytes(Kind::F16, shape(32, 2880)), 6 * (2 * 2048 + 128));
    }

    #[test]
    fn what_does_not_fit_keeps_its_three_launches() {
        let fits = |kind, n_experts, n_cols, n| can_route_together(kind, shape(n_experts, n_cols), n, true);
        assert!(!can_route_together(Kind::F16, shape(32, 2880), 1, false), "a device without clusters");
        assert!(!fits(Kind::F16, 32, 2880, 0) && !fits(Kind::F16, 32, 2880, 9));
        assert!(!fits(Kind::Q6, 32, 2880, 1), "a kind that routers hardly have");
        assert!(!fits(Kind::F16, 8, 4097, 1) && fits(Kind::F16, 8, 4095, 1), "columns that a thread holds");
        assert!(!fits(Kind::F16, 256, 2880, 1) && fits(Kind::Q8, 256, 2560, 1), "shared memory");
        assert!(!can_route_together(Kind::F16, TileShape { n_mats: 2, ..shape(32, 2880) }, 1, true));
    }

    #[test]
    fn chunks_are_as_short_and_few_as_the_kernel_takes() {
        for n_tiles in 1..=HELD * THREADS / TILE_K {
            assert!(chunks(n_tiles) <= 8, "a cluster of more blocks would not be portable");
            assert!(
                chunk_tiles(n_tiles) * TILE_K <= HELD / 8 * THREADS,
                "a thread normalises an eighth of what it sums"
            );
        }
    }
}
