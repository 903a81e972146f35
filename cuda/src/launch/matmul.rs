//! Products `y = W x`: a small kernel for up to 8 columns, a large one for more, the same bits from both.

use super::matrix::{HalfRows, Kind, Matrix, Planes, TILE_K, TILE_ROWS, TileShape};
use super::wide::{self, Wide};
use crate::arena::Buffer;
use crate::error::CudaError;
use crate::gpu::{SHARED_OF_DRIVER, shared_of_multiprocessor};
use crate::kernels::{Args, Kernels, Launch};
use half::f16;

/// Columns that the small kernel takes.
pub const SMALL_COLUMNS: usize = 8;
/// Columns from which Hopper's own kernel takes a product of one matrix.
const WIDE_COLUMNS: usize = 129;
/// Stripes of 16 rows that a block of the large kernel takes.
const STRIPES_PER_BLOCK: usize = 8;
/// Stages that a block of the large kernel keeps in shared memory. Mirrors `STAGES`.
fn stages(capability: (u32, u32)) -> usize {
    if capability == (9, 0) { 6 } else { 4 }
}

/// Shared memory of a block of the large kernel: a tile of x and eight tiles of W per stage.
fn large_bytes(kind: Kind, columns: usize, capability: (u32, u32)) -> usize {
    let tile: usize = kind.plane_bytes().iter().sum();
    stages(capability) * (columns * TILE_K * 2 + STRIPES_PER_BLOCK * tile)
}

/// Most columns of a block: chips of the second rank have too little shared memory for 128.
fn most_columns(capability: (u32, u32)) -> usize {
    if matches!(capability, (8, 0) | (9 | 10, _)) { 128 } else { 64 }
}
/// Rows are summed in at most this many chunks of k.
const MAX_CHUNKS: usize = 8;
/// A chunk is at least this many tiles of 64 k.
const MIN_CHUNK_TILES: usize = 4;

/// What is done with `out = W x + bias`.
#[derive(Debug, Clone)]
pub enum Output {
    /// `y = out`.
    Store(Rows<f32>),
    /// `y += out`.
    Add(Rows<f32>),
    /// `y = out` in f16, saturating.
    StoreHalf(HalfRows),
    /// `y = gate(out of the gate rows, out of the up rows)` in f16, for gated matrices.
    Gated(HalfRows, Gate),
}

/// f32 rows `[rows, stride]`.
#[derive(Debug, Clone)]
pub struct Rows<T: crate::arena::Element> {
    /// The elements.
    pub data: Buffer<T>,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// The gate of a feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gate {
    /// `silu(g) * u`.
    SwiGlu,
    /// GPT-OSS: both clamped, `g * sigmoid(alpha g) * (u + 1)`.
    Clamped {
        /// 1.702.
        alpha: f32,
        /// 7.
        limit: f32,
    },
}

impl Gate {
    /// The kernels' `alpha` and `limit`; no limit is none.
    pub(crate) fn numbers(self) -> (f32, f32) {
        match self {
            Gate::SwiGlu => (1.0, 0.0),
            Gate::Clamped { alpha, limit } => (alpha, limit),
        }
    }
}

/// Which matrix of a stack each product uses, on the device.
#[derive(Debug, Clone)]
pub enum Experts {
    /// There is one matrix.
    One,
    /// Few rows: job `j` is row `j / per_row` of x with matrix `mats[j]`, and writes row `j` of y.
    Jobs {
        /// `[n_jobs]`.
        mats: Buffer<i32>,
        /// Jobs per row of x.
        per_row: usize,
    },
    /// Many rows: column `c` is row `gather[c]` of x (none if negative; row `c` without a gather) with matrix
    /// `mats[c / column_tile]`.
    Tiles {
        /// `[n / column_tile]`, negative for tiles without work.
        mats: Buffer<i32>,
        /// `[n]`.
        gather: Option<Buffer<i32>>,
        /// Columns that share a matrix: 32, 64 or 128.
        column_tile: usize,
    },
}

/// The operands of a product.
#[derive(Debug, Clone)]
pub struct Product<'a> {
    /// W.
    pub matrix: &'a Matrix,
    /// x, rows of f16.
    pub x: &'a HalfRows,
    /// Columns: rows of x, or jobs.
    pub n: usize,
    /// `[n_mats, n_rows]`.
    pub bias: Option<&'a Buffer<f32>>,
    /// Of the up rows, if gated.
    pub bias_up: Option<&'a Buffer<f32>>,
    /// Which matrix.
    pub experts: Experts,
    /// What becomes of it.
    pub output: Output,
}

/// Rows that a product of few columns normalises itself: [`Product::launch_normalised`].
#[derive(Debug, Clone)]
pub struct NormInput<'a> {
    /// f32 `[n, n_cols]`.
    pub x: &'a Buffer<f32>,
    /// f32 `[n_cols]`.
    pub weight: &'a Buffer<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

/// Mirrors `MatmulArgs` of `matmul.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct MatmulArgs {
    w: Planes,
    x: u64,
    y: u64,
    bias: u64,
    bias_up: u64,
    mat_of: u64,
    gather: u64,
    partial: u64,
    out_scale: f32,
    x_full: u64,
    norm_weight: u64,
    norm_eps: f32,
    n_cols: i32,
    alpha: f32,
    limit: f32,
    n_rows: i32,
    n_stripes: i32,
    n_tiles: i32,
    x_stride: i32,
    y_stride: i32,
    n: i32,
    jobs_per_row: i32,
    epilogue: i32,
    early: i32,
}

impl MatmulArgs {
    /// With room for early operands, or without.
    pub(super) fn with_early(self, early: bool) -> Self {
        Self { early: early.into(), ..self }
    }
}

/// How a product is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// One warp per chunk of k of 16 rows.
    Small {
        /// Chunks, warps of a block.
        n_chunks: usize,
    },
    /// Blocks of 128 rows and `columns` columns.
    Large {
        /// 32, 64 or 128.
        columns: usize,
        /// Blocks along k: 1, or one per chunk with the sums added by a second kernel.
        splits: usize,
    },
    /// Blocks and clusters of Hopper's own kernel.
    Wide(Wide),
}

/// Chunks that k is summed in: a function of k alone, so that a row's sum is.
pub fn chunks(n_tiles: usize) -> usize {
    n_tiles.div_ceil(chunk_tiles(n_tiles))
}

/// Tiles of a chunk but the last. Mirrors `chunk_tiles` of `tiles.cuh`.
pub(super) fn chunk_tiles(n_tiles: usize) -> usize {
    n_tiles.div_ceil(MAX_CHUNKS).max(MIN_CHUNK_TILES)
}

/// Chooses how to run a product of `n` columns. The choice changes speed, never bits.
///
/// A large product whose blocks would not fill the device once splits k: Llama-3-8B's 4096 x 4096 at 64 columns has
/// 32 blocks for 132 multiprocessors, and 256 with its 8 chunks. Blocks of f16 that fill half of it walk their chunks instead: they do little
/// but read W, and the sums of chunks are two thirds as many bytes again, written and read (9,216 x 3,072 at 64 columns: 38 MB
/// beside 57). An H200 took half to two thirds of the time for the two shapes of Phi-3-mini, with a build that had one chunk.
pub fn plan(
    kind: Kind,
    TileShape { n_stripes, n_tiles, .. }: TileShape,
    n: usize,
    n_sms: usize,
    column_tile: Option<usize>,
) -> Plan {
    if n <= SMALL_COLUMNS && column_tile.is_none() {
        return Plan::Small { n_chunks: chunks(n_tiles) };
    }
    let columns = column_tile.unwrap_or(if n <= 32 {
        32
    } else if n <= 64 {
        64
    } else {
        128
    });
    let blocks = n_stripes.div_ceil(STRIPES_PER_BLOCK) * n.div_ceil(columns);
    let enough = if kind == Kind::F16 { n_sms.div_ceil(2) } else { n_sms };
    let splits = if blocks >= enough { 1 } else { chunks(n_tiles) };
    Plan::Large { columns, splits }
}

impl Plan {
    /// f32 elements of work space for `n` columns.
    fn partial_len(self, shape: TileShape, n: usize) -> usize {
        match self {
            Plan::Large { splits, .. } if splits > 1 => splits * n * shape.n_stripes * TILE_ROWS,
            _ => 0,
        }
    }
}

/// f32 elements of work space that a product of `n` columns may need.
pub fn partial_len(kind: Kind, shape: TileShape, n: usize, n_sms: usize, column_tile: Option<usize>) -> usize {
    plan(kind, shape, n, n_sms, column_tile).partial_len(shape, n)
}

impl Product<'_> {
    fn plan(&self, kernels: &Kernels) -> Plan {
        let shape = self.matrix.shape();
        let (n, column_tile) = match &self.experts {
            Experts::One => (self.n, None),
            Experts::Jobs { .. } => (1, None),
            Experts::Tiles { column_tile, .. } => (self.n, Some(*column_tile)),
        };
        let info = kernels.gpu().info();
        if matches!(self.experts, Experts::One) && self.n >= WIDE_COLUMNS && kernels.has_wgmma() {
            let wide = wide::choose(self.matrix.kind(), shape.n_stripes, self.n, info.n_sms as usize);
            if let Some(wide) = wide {
                return Plan::Wide(wide);
            }
        }
        match plan(self.matrix.kind(), shape, n, info.n_sms as usize, column_tile) {
            Plan::Large { columns, splits } if column_tile.is_none() => {
                Plan::Large { columns: columns.min(most_columns(info.capability)), splits }
            }
            plan => plan,
        }
    }

    /// f32 elements of work space that [`Product::launch`] needs.
    pub fn partial_len(&self, kernels: &Kernels) -> usize {
        self.plan(kernels).partial_len(self.matrix.shape(), self.n)
    }

    /// Enqueues the product. `partial` is work space of at least [`partial_len`] elements.
    ///
    /// # Errors
    /// [`CudaError::Contract`] for shapes that do not go together; a failed launch.
    pub fn launch(&self, kernels: &Kernels, partial: &Buffer<f32>) -> Result<(), CudaError> {
        self.check()?;
        match self.plan(kernels) {
            Plan::Small { n_chunks } => self.launch_small(kernels, n_chunks, None),
            Plan::Large { columns, splits } => self.launch_large(kernels, columns, splits, partial),
            Plan::Wide(wide) => self.launch_wide(kernels, wide, self.args(0, None)),
        }
    }

    /// Enqueues the product of rows that the kernel normalises itself, instead of `x`; the same bits as [`super::norm::rms_norm`]
    /// and the product of what it gives. Only where [`Product::can_normalise`].
    ///
    /// # Errors
    /// As [`Product::launch`].
    pub fn launch_normalised(&self, kernels: &Kernels, norm: &NormInput<'_>) -> Result<(), CudaError> {
        self.check()?;
        self.check_norm(norm)?;
        self.launch_small(kernels, chunks(self.matrix.shape().n_tiles), Some(norm))
    }

    /// Holds rows to normalise against the product.
    pub(super) fn check_norm(&self, norm: &NormInput<'_>) -> Result<(), CudaError> {
        let n_cols = self.matrix.n_cols();
        if norm.weight.len() != n_cols || norm.x.len() < self.n * n_cols || !self.can_normalise() {
            let expected = format!("up to {SMALL_COLUMNS} rows of {n_cols} for one matrix");
            let found = format!("{} of {}", norm.x.len(), norm.weight.len());
            return Err(contract("rows to normalise", expected, found));
        }
        Ok(())
    }

    /// Whether [`Product::launch_normalised`] takes this product: few columns of one matrix that fit into shared memory.
    pub fn can_normalise(&self) -> bool {
        let one = matches!(self.experts, Experts::One);
        one && self.n <= SMALL_COLUMNS && staged_bytes(self.matrix.shape().n_tiles, self.n).is_some()
    }

    fn launch_small(&self, kernels: &Kernels, n_chunks: usize, norm: Option<&NormInput<'_>>) -> Result<(), CudaError> {
        let shape = self.matrix.shape();
        let info = kernels.gpu().info();
        let has_jobs = matches!(self.experts, Experts::Jobs { .. });
        let (jobs, columns) = if has_jobs { (self.n, 1) } else { (1, self.n) };
        let n_blocks = small_blocks(shape.n_stripes, n_chunks, jobs, info.n_sms as usize);
        let is_worth_it = self.matrix.kind() == Kind::F16 || leaves_room(n_blocks, n_chunks, info.n_sms as usize);
        let shared = small_shared(shape.n_tiles, columns, is_worth_it && !has_jobs, info.capability);
        let name = small_name(self.matrix.kind(), shared.is_some());
        let kernel = kernels.get("matmul_small", name, most_shared(info.capability))?;
        let mut launch = Launch::new((n_blocks as u32, jobs as u32, 1), (32, n_chunks as u32, 1));
        launch.shared_bytes = shared.map_or(0, |shared| shared.bytes);
        launch.overlap = true;
        let args = self.args(0, norm).with_early(shared.is_some_and(|shared| shared.early));
        // SAFETY: MatmulArgs mirrors the kernel's parameter; `check` held every buffer against the shapes.
        unsafe { kernel.launch(kernels.gpu(), launch, Args::new().with(args)) }
    }

    fn launch_large(
        &self,
        kernels: &Kernels,
        columns: usize,
        splits: usize,
        partial: &Buffer<f32>,
    ) -> Result<(), CudaError> {
        let shape = self.matrix.shape();
        let needed = Plan::Large { columns, splits }.partial_len(shape, self.n);
        if partial.len() < needed {
            return Err(contract("partial", format!("{needed} elements"), partial.len()));
        }
        let capability = kernels.gpu().info().capability;
        let shared_bytes = large_bytes(self.matrix.kind(), columns, capability) as u32;
        let kernel = kernels.get("matmul_large", large_name(self.matrix.kind(), columns), shared_bytes)?;
        let row_blocks = shape.n_stripes.div_ceil(STRIPES_PER_BLOCK) as u32;
        let mut launch = Launch::new((row_blocks, self.n.div_ceil(columns) as u32, splits as u32), (256, 1, 1));
        launch.shared_bytes = shared_bytes;
        launch.overlap = true;
        let args = self.args(partial.ptr(), None);
        // SAFETY: as above; `partial` holds the sums of every chunk.
        unsafe { kernel.launch(kernels.gpu(), launch, Args::new().with(args))? };
        if splits > 1 {
            let rows = shape.n_stripes * TILE_ROWS;
            let mut launch = Launch::new((rows.div_ceil(256) as u32, self.n as u32, 1), (256, 1, 1));
            launch.overlap = true;
            let reduce = kernels.get("matmul_large", "matmul_reduce", 0)?;
            let args = Args::new().with(args).with(splits as i32).with(columns as i32);
            // SAFETY: as above.
            unsafe { reduce.launch(kernels.gpu(), launch, args)? };
        }
        Ok(())
    }

    pub(super) fn args(&self, partial: u64, norm: Option<&NormInput<'_>>) -> MatmulArgs {
        let shape = self.matrix.shape();
        let ptr = |buffer: Option<&Buffer<f32>>| buffer.map_or(0, Buffer::ptr);
        let (y, y_stride, epilogue) = match &self.output {
            Output::Store(rows) => (rows.data.ptr(), rows.stride, 0),
            Output::Add(rows) => (rows.data.ptr(), rows.stride, 1),
            Output::StoreHalf(rows) => (rows.data.ptr(), rows.stride, 2),
            Output::Gated(rows, _) => (rows.data.ptr(), rows.stride, 3),
        };
        let (alpha, limit) = match &self.output {
            Output::Gated(_, gate) => gate.numbers(),
            _ => (1.0, 0.0),
        };
        let (mat_of, gather, jobs_per_row) = match &self.experts {
            Experts::One => (0, 0, 1),
            Experts::Jobs { mats, per_row } => (mats.ptr(), 0, *per_row),
            Experts::Tiles { mats, gather, .. } => (mats.ptr(), gather.as_ref().map_or(0, Buffer::ptr), 1),
        };
        MatmulArgs {
            w: self.matrix.planes(),
            x: self.x.data.ptr(),
            y,
            bias: ptr(self.bias),
            bias_up: ptr(self.bias_up),
            mat_of,
            gather,
            partial,
            out_scale: self.matrix.out_scale(),
            x_full: norm.map_or(0, |norm| norm.x.ptr()),
            norm_weight: norm.map_or(0, |norm| norm.weight.ptr()),
            norm_eps: norm.map_or(0.0, |norm| norm.eps),
            n_cols: self.matrix.n_cols() as i32,
            alpha,
            limit,
            n_rows: self.matrix.n_rows() as i32,
            n_stripes: shape.n_stripes as i32,
            n_tiles: shape.n_tiles as i32,
            x_stride: self.x.stride as i32,
            y_stride: y_stride as i32,
            n: if matches!(self.experts, Experts::Jobs { .. }) { 1 } else { self.n as i32 },
            jobs_per_row: jobs_per_row as i32,
            epilogue,
            early: 0,
        }
    }

    pub(super) fn check(&self) -> Result<(), CudaError> {
        if self.n == 0 {
            return Err(contract("n", "at least one column", 0));
        }
        if self.x.stride < self.matrix.padded_cols() || !self.x.stride.is_multiple_of(8) {
            return Err(contract(
                "stride of x",
                format!("{} or more, whole 16 bytes", self.matrix.padded_cols()),
                self.x.stride,
            ));
        }
        if !self.x.data.ptr().is_multiple_of(16) {
            return Err(contract("address of x", "a multiple of 16", format!("{:#x}", self.x.data.ptr())));
        }
        let x_rows = match &self.experts {
            Experts::One => self.n,
            Experts::Jobs { per_row, .. } => self.n.div_ceil(*per_row),
            Experts::Tiles { gather: None, .. } => self.n,
            Experts::Tiles { gather: Some(_), .. } => 1,
        };
        if self.x.data.len() < x_rows * self.x.stride {
            return Err(contract("x", format!("{x_rows} rows of {}", self.x.stride), self.x.data.len()));
        }
        let (len, stride) = match &self.output {
            Output::Store(rows) | Output::Add(rows) => (rows.data.len(), rows.stride),
            Output::StoreHalf(rows) | Output::Gated(rows, _) => (rows.data.len(), rows.stride),
        };
        if stride < self.matrix.n_rows() || len < (self.n - 1) * stride + self.matrix.n_rows() {
            return Err(contract(
                "y",
                format!("{} rows of {} or more", self.n, self.matrix.n_rows()),
                format!("{len} elements, stride {stride}"),
            ));
        }
        let gated = matches!(self.output, Output::Gated(..));
        if gated != self.matrix.is_gated() {
            return Err(contract(
                "output",
                "gated for gated matrices and for no others",
                format!("a matrix that is {}gated", if gated { "not " } else { "" }),
            ));
        }
        for bias in self.bias.iter().chain(&self.bias_up) {
            let expected = self.matrix.shape().n_mats * self.matrix.n_rows();
            if bias.len() != expected {
                return Err(contract("bias", expected, bias.len()));
            }
        }
        match &self.experts {
            Experts::One => Ok(()),
            Experts::Jobs { mats, .. } if mats.len() < self.n => Err(contract("experts", self.n, mats.len())),
            Experts::Tiles { mats, gather, column_tile }
                if gather.as_ref().is_some_and(|gather| gather.len() < self.n)
                    || mats.len() < self.n.div_ceil(*column_tile)
                    || ![32, 64, 128].contains(column_tile) =>
            {
                Err(contract(
                    "experts",
                    format!("{} columns in tiles of 32, 64 or 128", self.n),
                    format!("{} tiles of {column_tile}", mats.len()),
                ))
            }
            _ => Ok(()),
        }
    }
}

fn contract(what: &str, expected: impl ToString, found: impl ToString) -> CudaError {
    CudaError::Contract {
        op: format!("Product::launch: {what}"),
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

/// Most bytes of activations that a block of the small kernel keeps: with what it has besides, less than a block may have on any chip, which
/// is 99 KiB on those of the second rank.
const STAGED_BYTES: u32 = 88 << 10;
/// Blocks of the small kernel that a multiprocessor holds at once where they have [`MAX_CHUNKS`] warps.
pub(super) const SMALL_BLOCKS: usize = 2;
/// Warps of the small kernel that a multiprocessor holds at once: as many as its registers allow. The shared memory of blocks of fewer
/// warps is less as well, since k is shorter.
const SMALL_WARPS: usize = SMALL_BLOCKS * MAX_CHUNKS;

/// Shared memory that a block of the small kernel asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SmallShared {
    pub(super) bytes: u32,
    /// Whether there is room for operands that are made before the predecessor has ended.
    pub(super) early: bool,
}

/// What a block of the small kernel has besides x and early operands: sums of chunks and of squares, and what the driver keeps.
const OWN_BYTES: usize = 2 * MAX_CHUNKS * TILE_ROWS * SMALL_COLUMNS * 4 + 8 * 8 * 4 + SHARED_OF_DRIVER;
/// Early operands of a warp: tiles of f16. Mirrors `EARLY` of `small.cuh`.
const EARLY_BYTES: usize = 4 * TILE_ROWS * TILE_K * 2;

/// Where kernels overlap with their predecessors, and have the shared memory for it.
fn has_early(capability: (u32, u32)) -> bool {
    capability == (9, 0)
}

/// Most shared memory that a block of the small kernel asks for.
pub(super) fn most_shared(capability: (u32, u32)) -> u32 {
    if has_early(capability) {
        (shared_of_multiprocessor(capability) / SMALL_BLOCKS - OWN_BYTES) as u32
    } else {
        STAGED_BYTES
    }
}

/// Whether blocks of the small kernel leave so much of the device that they start long before their predecessor ends, if it does as well.
/// In a full device they start when it ends, and have nothing to do meanwhile: operands that go by shared memory then are a detour, which
/// took 7 % of Llama-3-8B Q4_K_M's and 6 % of Phi-3-mini's tokens a second on an H200. F16 needs no turning, and gains 6 % by the tiles
/// that are in flight beside its two in registers.
pub(super) fn leaves_room(n_blocks: usize, n_chunks: usize, n_sms: usize) -> bool {
    5 * n_blocks <= 3 * (SMALL_WARPS / n_chunks * n_sms)
}

/// What a block needs for `n` rows of activations, if that is not too much. Operands are made early, if that is `worth_it`, where all blocks
/// that the registers hold have room for them. The matrix has to be known before the predecessor has ended, which that of an expert is not.
pub(super) fn small_shared(n_tiles: usize, n: usize, worth_it: bool, capability: (u32, u32)) -> Option<SmallShared> {
    let staged = staged_bytes(n_tiles, n)?;
    let n_chunks = chunks(n_tiles);
    let with_early = staged as usize + n_chunks * EARLY_BYTES;
    let room = (shared_of_multiprocessor(capability) / (SMALL_WARPS / n_chunks)).saturating_sub(OWN_BYTES);
    let early = worth_it && has_early(capability) && with_early <= room;
    Some(SmallShared { bytes: if early { with_early as u32 } else { staged }, early })
}

/// Shared memory for `n` rows of activations, if that is not too much. Mirrors `shared_stride`.
pub(super) fn staged_bytes(n_tiles: usize, n: usize) -> Option<u32> {
    let bytes = n * (n_tiles * TILE_K + 8) * 2;
    u32::try_from(bytes).ok().filter(|bytes| *bytes <= STAGED_BYTES)
}

/// Blocks of `n_chunks` warps that share the stripes of each job: as many as the device holds at once, each with as many stripes as the
/// others.
fn small_blocks(n_stripes: usize, n_chunks: usize, jobs: usize, n_sms: usize) -> usize {
    let most = (SMALL_WARPS / n_chunks * n_sms / jobs).max(1);
    let rounds = n_stripes.div_ceil(most);
    n_stripes.div_ceil(rounds)
}

macro_rules! small_names {
    ($kind:expr, $staged:expr, $($variant:ident $text:literal),*) => {
        match ($kind, $staged) {
            $(
                (Kind::$variant, true) => concat!("matmul_small_", $text),
                (Kind::$variant, false) => concat!("matmul_small_wide_", $text),
            )*
        }
    };
}

fn small_name(kind: Kind, staged: bool) -> &'static str {
    small_names!(kind, staged, F16 "f16", Q8 "q8", Q4 "q4", Q4G16 "q4g16", Mx4 "mx4", Q5 "q5", Q6 "q6")
}

macro_rules! large_names {
    ($kind:expr, $columns:expr, $($variant:ident $text:literal),*) => {
        match ($kind, $columns) {
            $(
                (Kind::$variant, 32) => concat!("matmul_large_32_", $text),
                (Kind::$variant, 64) => concat!("matmul_large_64_", $text),
                (Kind::$variant, _) => concat!("matmul_large_128_", $text),
            )*
        }
    };
}

fn large_name(kind: Kind, columns: usize) -> &'static str {
    large_names!(kind, columns, F16 "f16", Q8 "q8", Q4 "q4", Q4G16 "q4g16", Mx4 "mx4", Q5 "q5", Q6 "q6")
}

/// f16 elements that hold `rows` rows of activations for products with matrices of `n_cols` columns.
pub fn half_rows_len(rows: usize, n_cols: usize) -> usize {
    rows * n_cols.next_multiple_of(TILE_K)
}

/// Takes f16 rows for products with matrices of `n_cols` columns, zeroed, so that the padding is.
///
/// # Errors
/// [`CudaError::OutOfMemory`].
pub fn half_rows(arena: &crate::arena::Arena, what: &str, rows: usize, n_cols: usize) -> Result<HalfRows, CudaError> {
    let data = arena.alloc::<f16>(half_rows_len(rows, n_cols), what)?;
    data.zero()?;
    Ok(HalfRows { data, stride: n_cols.next_multiple_of(TILE_K) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_depend_on_k_alone_and_are_few() {
        assert_eq!(chunks(1), 1);
        assert_eq!(chunks(14), 4); // Qwen2.5-0.5B: 896
        assert_eq!(chunks(64), 8); // Llama-3-8B: 4096
        assert_eq!(chunks(224), 8); // 14336
        for n_tiles in 1..1000 {
            let n = chunks(n_tiles);
            assert!((1..=MAX_CHUNKS).contains(&n));
            assert!((n - 1) * chunk_tiles(n_tiles) < n_tiles, "no chunk of {n_tiles} is empty");
        }
    }

    #[test]
    fn blocks_of_the_small_kernel_share_the_stripes_evenly() {
        assert_eq!(small_blocks(56, 8, 1, 132), 56);
        assert_eq!(small_blocks(1792, 8, 1, 132), 256); // seven each
        assert_eq!(small_blocks(360, 8, 4, 132), 60); // six each, four jobs side by side
        assert_eq!(small_blocks(1, 8, 1000, 132), 1);
        assert_eq!(small_blocks(608, 4, 1, 132), 304); // Qwen2.5-0.5B's gate and up: two each
        assert_eq!(small_blocks(9496, 4, 1, 132), 528); // its head: 18 each but the last
        assert_eq!(staged_bytes(64, 8), Some(8 * 4104 * 2));
        assert_eq!(staged_bytes(224, 8), None);
    }

    #[test]
    fn a_multiprocessor_has_the_shared_memory_of_the_blocks_that_its_registers_hold() {
        for n_tiles in 1..400 {
            for n in 1..=SMALL_COLUMNS {
                let Some(shared) = small_shared(n_tiles, n, true, (9, 0)) else { continue };
                let n_blocks = SMALL_WARPS / chunks(n_tiles);
                assert!(
                    n_blocks * (shared.bytes as usize + OWN_BYTES) <= shared_of_multiprocessor((9, 0)),
                    "{n_blocks} blocks of {shared:?}, {n_tiles} tiles"
                );
                assert!(shared.bytes <= most_shared((9, 0)), "{shared:?}");
            }
        }
    }

    #[test]
    fn operands_are_made_early_where_there_is_room() {
        let early = |n_tiles, n, worth_it, capability| {
            small_shared(n_tiles, n, worth_it, capability).map(|shared| shared.early)
        };
        // One sequence of every model: Qwen2.5-0.5B, Phi-3-mini, Llama-3-8B, and their down products.
        for n_tiles in [14, 76, 48, 128, 64, 224, 45] {
            assert_eq!(early(n_tiles, 1, true, (9, 0)), Some(true), "{n_tiles}");
            assert_eq!(early(n_tiles, 1, false, (9, 0)), Some(false), "{n_tiles}");
            assert_eq!(early(n_tiles, 1, true, (8, 6)), Some(false), "no overlap, less shared memory");
        }
        assert_eq!(early(64, 8, true, (9, 0)), Some(false), "eight rows of 4,096 take the room");
        assert_eq!(early(224, 8, true, (9, 0)), None);
        // Qwen2.5-0.5B's q, k and v, o, gate and up, down; Llama-3-8B's o, gate and up.
        assert_eq!([(72, 4), (56, 4), (304, 4), (56, 8)].map(|(n, chunks)| leaves_room(n, chunks, 132)), [true; 4]);
        assert_eq!([(256, 8), (256, 8)].map(|(n, chunks)| leaves_room(n, chunks, 132)), [false; 2]);
        assert_eq!(most_shared((8, 9)), STAGED_BYTES);
        // What the driver keeps of a block comes on top.
        assert!(
            STAGED_BYTES as usize + OWN_BYTES - SHARED_OF_DRIVER <= 99 << 10,
            "a block of a chip of the second rank"
        );
    }

    #[test]
    fn few_columns_go_to_the_small_kernel_and_many_fill_the_device() {
        let plan =
            |n_stripes, n_tiles, n, tile| plan(Kind::Q4, TileShape { n_mats: 1, n_stripes, n_tiles }, n, 132, tile);
        assert_eq!(plan(256, 64, 1, None), Plan::Small { n_chunks: 8 });
        assert_eq!(plan(256, 64, 8, None), Plan::Small { n_chunks: 8 });
        assert_eq!(plan(256, 64, 64, None), Plan::Large { columns: 64, splits: 8 });
        assert_eq!(plan(256, 64, 4096, None), Plan::Large { columns: 128, splits: 1 });
        assert_eq!(plan(360, 45, 64, Some(32)), Plan::Large { columns: 32, splits: 8 });
    }

    #[test]
    fn half_a_device_of_f16_walks_its_chunks() {
        let splits = |kind, n_rows: usize, n_cols: usize, n| {
            let shape =
                TileShape { n_mats: 1, n_stripes: n_rows.div_ceil(TILE_ROWS), n_tiles: n_cols.div_ceil(TILE_K) };
            match plan(kind, shape, n, 132, None) {
                Plan::Large { splits, .. } => splits,
                other => panic!("{other:?}"),
            }
        };
        // Phi-3-mini's q, k and v, and its gate and up: 72 and 128 blocks.
        assert_eq!([9216, 16_384].map(|n_rows| splits(Kind::F16, n_rows, 3072, 64)), [1, 1]);
        assert_eq!([9216, 16_384].map(|n_rows| splits(Kind::Q4, n_rows, 3072, 64)), [8, 8]);
        // 24 and 65 blocks are too few, 66 are half.
        assert_eq!([3072, 8320, 8336].map(|n_rows| splits(Kind::F16, n_rows, 3072, 33)), [8, 8, 1]);
        // Two tiles of columns are twice the blocks.
        assert_eq!([64, 128, 129].map(|n| splits(Kind::F16, 4608, 4096, n)), [8, 8, 1]);
    }

    #[test]
    fn work_space_is_what_the_plan_writes() {
        let shape = TileShape { n_mats: 1, n_stripes: 200, n_tiles: 48 };
        assert_eq!(partial_len(Kind::Q8, shape, 64, 132, None), 8 * 64 * 200 * TILE_ROWS);
        assert_eq!(partial_len(Kind::Q8, shape, 8, 132, None), 0);
        assert_eq!(partial_len(Kind::F16, TileShape { n_stripes: 1024, ..shape }, 64, 132, None), 0);
    }
}
