//! Rotation of queries and keys into the paged cache, and attention over it.

use super::matrix::HalfRows;
use crate::arena::Buffer;
use crate::error::CudaError;
use crate::gpu::{SHARED_OF_DRIVER, shared_of_multiprocessor};
use crate::kernels::{Args, Kernels, Launch};
use half::f16;

/// Tokens of a KV block. Mirrors `KV_BLOCK_TOKENS`.
pub const BLOCK_TOKENS: usize = 32;
/// The slot of a row without a token: nothing is written for it. Mirrors `NO_SLOT`.
pub const NO_SLOT: u32 = u32::MAX;
/// Positions of a split. Mirrors `SPLIT`.
pub const SPLIT: usize = 128;
/// Heads of one token that a block rotates. Mirrors `HEADS_PER_BLOCK` of `rope_kv.cu`.
const ROPE_HEADS: usize = 8;
/// Positions of a tile. Mirrors `KV_TILE`.
const TILE: usize = 64;
/// Most rows of a decode item.
pub const DECODE_ROWS: usize = 16;
/// Rows of a prefill item.
pub const PREFILL_ROWS: usize = 64;
/// Threads of a prefill block.
const PREFILL_THREADS: usize = 128;
/// Head sizes that there are kernels for.
pub const HEAD_DIMS: &[usize] = &[16, 32, 64, 96, 128];

/// Head counts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements of a head: one of [`HEAD_DIMS`].
    pub head_dim: usize,
}

/// How keys and values are kept. Mirrors `kv.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// 2 bytes an element.
    F16,
    /// 34 bytes per 32 elements of one head: 8 bits and an f16 scale, as in `Q8_0`, quants and scales apart.
    Q8_0,
}

impl KvFormat {
    /// Bytes of one kv head of one block: its [`BLOCK_TOKENS`] rows. A last partial group of `Q8_0` takes a whole one.
    pub fn head_bytes(self, head_dim: usize) -> usize {
        BLOCK_TOKENS
            * match self {
                KvFormat::F16 => 2 * head_dim,
                KvFormat::Q8_0 => 34 * head_dim.div_ceil(32),
            }
    }
}

/// Keys and values of one layer: `[block][kv head]` each, a head as [`KvFormat`] says.
#[derive(Debug, Clone)]
pub struct KvLayer {
    /// Of both.
    pub format: KvFormat,
    /// Keys.
    pub k: Buffer<u8>,
    /// Values.
    pub v: Buffer<u8>,
}

impl KvLayer {
    fn check(&self, heads: Heads) -> Result<(), CudaError> {
        let block = heads.n_kv_heads * self.format.head_bytes(heads.head_dim);
        if self.k.len() != self.v.len() || self.k.is_empty() || !self.k.len().is_multiple_of(block) {
            let found = format!("{} and {}", self.k.len(), self.v.len());
            return Err(contract("cache", format!("as many whole blocks of {block} bytes twice"), found));
        }
        Ok(())
    }
}

/// Rows of one sequence that a block works on. Mirrors `AttentionItem`.
///
/// Row `r` is token `first_token + r / group`, head `r % group` of each kv head, `group = n_heads / n_kv_heads`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Item {
    /// The span's first token in the batch.
    pub first_token: i32,
    /// The item's first row in the span.
    pub first_row: i32,
    /// Rows of the whole span; 0 for an unused item.
    pub n_rows: i32,
    /// Where the sequence's block table begins in the tables.
    pub table: i32,
}

impl Item {
    /// The item as the four numbers that a device buffer of items holds.
    pub fn words(self) -> [i32; 4] {
        [self.first_token, self.first_row, self.n_rows, self.table]
    }

    /// Cuts a span of `n_tokens` tokens into items of `rows` rows.
    pub fn cut(
        first_token: usize,
        n_tokens: usize,
        table: usize,
        heads: Heads,
        rows: usize,
    ) -> impl Iterator<Item = Item> {
        let n_rows = n_tokens * (heads.n_heads / heads.n_kv_heads);
        (0..n_rows).step_by(rows).map(move |first_row| Item {
            first_token: first_token as i32,
            first_row: first_row as i32,
            n_rows: n_rows as i32,
            table: table as i32,
        })
    }
}

/// Arguments of [`Attention::prefill`] and [`Attention::decode`].
#[derive(Debug, Clone)]
pub struct Attention<'a> {
    /// Head counts.
    pub heads: Heads,
    /// f16 `[n, n_heads * head_dim]`, rotated.
    pub q: &'a Buffer<f16>,
    /// The layer's cache.
    pub kv: &'a KvLayer,
    /// f16 `[n, stride]`.
    pub out: &'a HalfRows,
    /// f32 `[n_heads]`.
    pub sinks: Option<&'a Buffer<f32>>,
    /// Block tables of all sequences, one after another.
    pub tables: &'a Buffer<u32>,
    /// Position of each token, `[n]`.
    pub positions: &'a Buffer<u32>,
    /// Multiplies `q . k`.
    pub scale: f32,
    /// Logits become `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
    /// Positions that a token sees, itself included; all if `None`.
    pub window: Option<usize>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct AttentionArgs {
    q: u64,
    k_cache: u64,
    v_cache: u64,
    out: u64,
    sinks: u64,
    items: u64,
    tables: u64,
    positions: u64,
    partial: u64,
    scale: f32,
    softcap: f32,
    n_heads: i32,
    n_kv_heads: i32,
    window: i32,
    max_splits: i32,
    out_stride: i32,
    partial_rows: i32,
}

/// Mirrors `StepArgs` of `attention_step.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct StepArgs {
    attention: AttentionArgs,
    qkv: u64,
    table: u64,
    q_norm: u64,
    k_norm: u64,
    slots: u64,
    tickets: u64,
    norm_eps: f32,
    qkv_stride: i32,
    k_first: i32,
    v_first: i32,
    n_rot: i32,
    interleaved: i32,
}

/// Rows of the largest item that [`Item::cut`] makes of one token in pieces of [`DECODE_ROWS`].
pub fn rows_of_one_token(heads: Heads) -> usize {
    (heads.n_heads / heads.n_kv_heads).min(DECODE_ROWS)
}

/// f32 elements of work space for decoding `n_items` items of up to `rows` rows over at most `max_splits` splits.
pub fn decode_partial_len(heads: Heads, n_items: usize, rows: usize, max_splits: usize) -> usize {
    n_items * heads.n_kv_heads * max_splits * rows * (heads.head_dim + 2)
}

/// Items of a decode launch, and what they have in common.
#[derive(Debug, Clone)]
pub struct DecodeItems<'a> {
    /// [`Item::words`] of each.
    pub items: &'a Buffer<i32>,
    /// How many.
    pub n_items: usize,
    /// Most rows of an item, at most [`DECODE_ROWS`].
    pub rows: usize,
    /// Most splits of [`SPLIT`] positions that an item sees.
    pub max_splits: usize,
}

impl Attention<'_> {
    /// Enqueues attention of items of up to 64 rows, `items` holding `n_items` of them ([`Item::words`]).
    ///
    /// # Errors
    /// [`CudaError::Contract`]; a failed launch.
    pub fn prefill(&self, kernels: &Kernels, items: &Buffer<i32>, n_items: usize) -> Result<(), CudaError> {
        self.check(items, n_items)?;
        let name = prefill_name(self.kv.format, self.heads.head_dim);
        let slabs = self.kv.format == KvFormat::F16 && self.heads.head_dim >= SLAB && kernels.has_wgmma();
        let shared = match slabs {
            true => slab_bytes(self.heads.head_dim),
            false => prefill_bytes(self.kv.format, self.heads.head_dim),
        };
        let kernel = kernels.get("attention_prefill", name, shared)?;
        let grid = (n_items as u32, self.heads.n_kv_heads as u32, 1);
        let block = (PREFILL_THREADS as u32, 1, 1);
        let launch = Launch { grid, block, shared_bytes: shared, overlap: true };
        // SAFETY: AttentionArgs mirrors the kernel's parameter; `check` held the buffers against the shapes.
        unsafe { kernel.launch(kernels.gpu(), launch, Args::new().with(self.args(items, 0, 0, 1))) }
    }

    /// Enqueues attention of items of few rows in two kernels. `partial` has [`decode_partial_len`] elements.
    ///
    /// # Errors
    /// [`CudaError::Contract`]; a failed launch.
    pub fn decode(&self, kernels: &Kernels, decode: &DecodeItems<'_>, partial: &Buffer<f32>) -> Result<(), CudaError> {
        self.check_decode(decode, partial)?;
        let DecodeItems { items, n_items, rows, max_splits } = *decode;
        let (split, merge) = decode_names(self.kv.format, self.heads.head_dim);
        let stage = stage_bytes(self.kv.format, self.heads.head_dim);
        let args = self.args(items, partial.ptr(), rows, max_splits);
        let n_kv_heads = self.heads.n_kv_heads as u32;
        let grid = (n_items as u32, n_kv_heads, max_splits as u32);
        let info = kernels.gpu().info();
        let n_stages = decode_stages(n_items * self.heads.n_kv_heads * max_splits, stage, info.n_sms, info.capability);
        let launch = Launch { grid, block: (32, 1, 1), shared_bytes: n_stages * stage, overlap: true };
        let kernel = kernels.get("attention_decode", split, SPLIT_STAGES * stage)?;
        let with_stages = Args::new().with(args).with(n_stages as i32);
        // SAFETY: as in `prefill`; `partial` holds every split of every item, and a block has the stages that it is told of.
        unsafe { kernel.launch(kernels.gpu(), launch, with_stages)? };
        let grid = (n_items as u32, n_kv_heads, rows as u32);
        let launch = Launch { grid, block: (32, 1, 1), shared_bytes: 0, overlap: true };
        let kernel = kernels.get("attention_decode", merge, 0)?;
        // SAFETY: as above.
        unsafe { kernel.launch(kernels.gpu(), launch, Args::new().with(args)) }
    }

    /// Enqueues the rotation of `rope` for `n` tokens, the writing of their keys and values, and the attention of their items, which
    /// have one token each, in one kernel: the bits of [`rope_kv`] and [`Attention::decode`]. The `q` of attention and the `q_out` of
    /// `rope` are not touched. `tickets` has an element for each item and kv head, zero between launches.
    ///
    /// # Errors
    /// [`CudaError::Contract`]; a failed launch.
    pub fn decode_step(
        &self,
        kernels: &Kernels,
        rope: (&RopeKv<'_>, usize),
        decode: &DecodeItems<'_>,
        partial: &Buffer<f32>,
        tickets: &Buffer<u32>,
    ) -> Result<(), CudaError> {
        self.check_decode(decode, partial)?;
        self.check_step(rope, decode, tickets)?;
        let rope = rope.0.args();
        let args = StepArgs {
            attention: self.args(decode.items, partial.ptr(), decode.rows, decode.max_splits),
            qkv: rope.qkv,
            table: rope.table,
            q_norm: rope.q_norm,
            k_norm: rope.k_norm,
            slots: rope.slots,
            tickets: tickets.ptr(),
            norm_eps: rope.norm_eps,
            qkv_stride: rope.qkv_stride,
            k_first: rope.k_first,
            v_first: rope.v_first,
            n_rot: rope.n_rot,
            interleaved: rope.interleaved,
        };
        let shared = step_bytes(self.kv.format, self.heads.head_dim);
        let n_units = decode.n_items * self.heads.n_kv_heads * decode.max_splits;
        let launch = Launch { grid: (n_units as u32, 1, 1), block: (256, 1, 1), shared_bytes: shared, overlap: true };
        let kernel = kernels.get("attention_step", step_name(self.kv.format, self.heads.head_dim), shared)?;
        // SAFETY: StepArgs mirrors the kernel's parameter; `check_decode` and `check_step` held every buffer against the shapes.
        unsafe { kernel.launch(kernels.gpu(), launch, Args::new().with(args)) }
    }

    /// Holds a rotation, and the tickets, against the attention that they are for.
    fn check_step(
        &self,
        (rope, n): (&RopeKv<'_>, usize),
        decode: &DecodeItems<'_>,
        tickets: &Buffer<u32>,
    ) -> Result<(), CudaError> {
        rope.check(n)?;
        let layer = |kv: &KvLayer, heads: Heads| (kv.k.ptr(), kv.v.ptr(), kv.format, heads);
        if layer(rope.kv, rope.heads) != layer(self.kv, self.heads) {
            let found = format!("{:?} of {:?} and {:?} of {:?}", rope.heads, rope.kv, self.heads, self.kv);
            return Err(contract("rotation and attention", "one layer and its heads", found));
        }
        let n_tickets = decode.n_items * self.heads.n_kv_heads;
        match tickets.len() < n_tickets {
            true => Err(contract("tickets", n_tickets, tickets.len())),
            false => Ok(()),
        }
    }

    fn check_decode(&self, decode: &DecodeItems<'_>, partial: &Buffer<f32>) -> Result<(), CudaError> {
        let DecodeItems { items, n_items, rows, max_splits } = *decode;
        self.check(items, n_items)?;
        if rows == 0 || rows > DECODE_ROWS || max_splits == 0 {
            let expected = format!("1 to {DECODE_ROWS} rows, 1 or more splits");
            return Err(contract("decode", expected, format!("{rows} rows, {max_splits} splits")));
        }
        let needed = decode_partial_len(self.heads, n_items, rows, max_splits);
        if partial.len() < needed {
            return Err(contract("partial", needed, partial.len()));
        }
        Ok(())
    }

    fn args(&self, items: &Buffer<i32>, partial: u64, rows: usize, max_splits: usize) -> AttentionArgs {
        AttentionArgs {
            q: self.q.ptr(),
            k_cache: self.kv.k.ptr(),
            v_cache: self.kv.v.ptr(),
            out: self.out.data.ptr(),
            sinks: self.sinks.map_or(0, Buffer::ptr),
            items: items.ptr(),
            tables: self.tables.ptr(),
            positions: self.positions.ptr(),
            partial,
            scale: self.scale,
            softcap: self.softcap.unwrap_or(0.0),
            n_heads: self.heads.n_heads as i32,
            n_kv_heads: self.heads.n_kv_heads as i32,
            window: self.window.map_or(0, |w| w as i32),
            max_splits: max_splits as i32,
            out_stride: self.out.stride as i32,
            partial_rows: rows as i32,
        }
    }

    fn check(&self, items: &Buffer<i32>, n_items: usize) -> Result<(), CudaError> {
        check_heads(self.heads)?;
        let width = self.heads.n_heads * self.heads.head_dim;
        if n_items == 0 || items.len() < 4 * n_items {
            return Err(contract("items", format!("1 or more items of 4 numbers, {n_items} said"), items.len()));
        }
        if self.out.stride < width || !self.q.len().is_multiple_of(width) {
            return Err(contract(
                "q and out",
                format!("rows of {width}"),
                format!("{} and stride {}", self.q.len(), self.out.stride),
            ));
        }
        self.kv.check(self.heads)?;
        match self.sinks {
            Some(sinks) if sinks.len() != self.heads.n_heads => Err(contract("sinks", self.heads.n_heads, sinks.len())),
            _ => Ok(()),
        }
    }
}

/// Shared memory of a tile of keys and one of values. Mirrors `STAGE` of `attention.cuh`.
fn stage_bytes(format: KvFormat, head_dim: usize) -> u32 {
    let row = match format {
        KvFormat::F16 => head_dim * 2 + 16,
        KvFormat::Q8_0 => head_dim + 16 + 2 * head_dim.div_ceil(32),
    };
    (2 * TILE * row) as u32
}

/// Stages that hold a whole split. Mirrors `SPLIT_TILES`.
const SPLIT_STAGES: u32 = 2;

/// Stages of a block of the decode kernel: a whole split's, so that all of it is on its way at once, or one where there are so many
/// blocks that the device holds them in several rounds either way, for it holds twice as many then.
fn decode_stages(n_blocks: usize, stage_bytes: u32, n_sms: u32, capability: (u32, u32)) -> u32 {
    let of_block = (SPLIT_STAGES * stage_bytes) as usize + SHARED_OF_DRIVER;
    // A multiprocessor has 32 blocks at most.
    let at_once = (shared_of_multiprocessor(capability) / of_block).clamp(1, 32) * n_sms as usize;
    if n_blocks > 2 * at_once { 1 } else { SPLIT_STAGES }
}

/// Shared memory of a unit of a step: two stages, scores, the new key and value, the largest scores. Mirrors `UnitShared`.
fn step_bytes(format: KvFormat, head_dim: usize) -> u32 {
    2 * stage_bytes(format, head_dim) + 8192 + 1024 + 512
}

/// Shared memory of a prefill block whose warps work by themselves: two stages and the merged sums.
fn prefill_bytes(format: KvFormat, head_dim: usize) -> u32 {
    2 * stage_bytes(format, head_dim) + merged_bytes(format, head_dim)
}

/// Shared memory of a prefill block's merged sums. Mirrors `SHARED` of `attention_prefill.cu`.
fn merged_bytes(format: KvFormat, head_dim: usize) -> u32 {
    let eights = if (format, head_dim) == (KvFormat::F16, 128) { 12 } else { head_dim / 8 };
    (2 * eights * PREFILL_THREADS * 8) as u32
}

/// Elements of a row that a warpgroup's kernel keeps together: smaller heads have none.
const SLAB: usize = 32;

/// Shared memory of a prefill block whose warps are a warpgroup: two stages of keys and values, and 64 rows of merged sums. Mirrors
/// `Slabs` of `attention_prefill.cu`.
fn slab_bytes(head_dim: usize) -> u32 {
    (2 * 2 * TILE * 2 * head_dim + PREFILL_ROWS * 4 * head_dim) as u32
}

macro_rules! names {
    ($format:expr, $head_dim:expr, $name:ident) => {
        match ($format, $head_dim) {
            (KvFormat::F16, 16) => $name!("", "16"),
            (KvFormat::F16, 32) => $name!("", "32"),
            (KvFormat::F16, 64) => $name!("", "64"),
            (KvFormat::F16, 96) => $name!("", "96"),
            (KvFormat::F16, _) => $name!("", "128"),
            (KvFormat::Q8_0, 16) => $name!("q8_", "16"),
            (KvFormat::Q8_0, 32) => $name!("q8_", "32"),
            (KvFormat::Q8_0, 64) => $name!("q8_", "64"),
            (KvFormat::Q8_0, 96) => $name!("q8_", "96"),
            (KvFormat::Q8_0, _) => $name!("q8_", "128"),
        }
    };
}

fn prefill_name(format: KvFormat, head_dim: usize) -> &'static str {
    macro_rules! name {
        ($format:literal, $dim:literal) => {
            concat!("attention_prefill_", $format, $dim)
        };
    }
    names!(format, head_dim, name)
}

fn decode_names(format: KvFormat, head_dim: usize) -> (&'static str, &'static str) {
    macro_rules! name {
        ($format:literal, $dim:literal) => {
            (concat!("attention_decode_", $format, $dim), concat!("attention_merge_", $dim))
        };
    }
    names!(format, head_dim, name)
}

fn step_name(format: KvFormat, head_dim: usize) -> &'static str {
    macro_rules! name {
        ($format:literal, $dim:literal) => {
            concat!("attention_step_", $format, $dim)
        };
    }
    names!(format, head_dim, name)
}

fn check_heads(heads: Heads) -> Result<(), CudaError> {
    if !HEAD_DIMS.contains(&heads.head_dim) {
        return Err(contract("head size", format!("one of {HEAD_DIMS:?}"), heads.head_dim));
    }
    if heads.n_kv_heads == 0 || !heads.n_heads.is_multiple_of(heads.n_kv_heads) || heads.n_heads == 0 {
        return Err(contract(
            "heads",
            "query heads in whole groups",
            format!("{} over {}", heads.n_heads, heads.n_kv_heads),
        ));
    }
    Ok(())
}

/// Arguments of [`rope_kv`].
#[derive(Debug, Clone)]
pub struct RopeKv<'a> {
    /// Head counts.
    pub heads: Heads,
    /// f32 `[n, stride]`: q from 0, k from `k_first`, v from `v_first`.
    pub qkv: &'a Buffer<f32>,
    /// Elements from one token to the next.
    pub stride: usize,
    /// First element of k.
    pub k_first: usize,
    /// First element of v.
    pub v_first: usize,
    /// f32 `[n_ctx, n_rot]`: cosines, then sines.
    pub table: &'a Buffer<f32>,
    /// Rotated elements per head.
    pub n_rot: usize,
    /// Pairs `(2i, 2i + 1)`, else `(i, i + n_rot / 2)`.
    pub interleaved: bool,
    /// Per-head normalisation of q and k, `[head_dim]`, and its epsilon.
    pub norm: Option<(&'a Buffer<f32>, &'a Buffer<f32>, f32)>,
    /// `[n]`.
    pub positions: &'a Buffer<u32>,
    /// `[n]`.
    pub slots: &'a Buffer<u32>,
    /// f16 `[n, n_heads * head_dim]`.
    pub q_out: &'a Buffer<f16>,
    /// The layer's cache.
    pub kv: &'a KvLayer,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RopeKvArgs {
    qkv: u64,
    table: u64,
    q_norm: u64,
    k_norm: u64,
    positions: u64,
    slots: u64,
    q_out: u64,
    k_cache: u64,
    v_cache: u64,
    norm_eps: f32,
    qkv_stride: i32,
    k_first: i32,
    v_first: i32,
    n_heads: i32,
    n_kv_heads: i32,
    head_dim: i32,
    n_rot: i32,
    interleaved: i32,
}

/// Enqueues the rotation of `n` tokens' queries and keys, and the writing of keys and values.
///
/// # Errors
/// [`CudaError::Contract`]; a failed launch.
pub fn rope_kv(kernels: &Kernels, op: &RopeKv<'_>, n: usize) -> Result<(), CudaError> {
    op.check(n)?;
    let launch = Launch {
        grid: (n as u32, (op.heads.n_heads + 2 * op.heads.n_kv_heads).div_ceil(ROPE_HEADS) as u32, 1),
        block: (32, ROPE_HEADS as u32, 1),
        shared_bytes: 0,
        overlap: true,
    };
    let name = if op.kv.format == KvFormat::F16 { "rope_kv" } else { "rope_kv_q8" };
    // SAFETY: RopeKvArgs mirrors the kernel's parameter; `check` held the buffers against the shapes, and slots and
    // positions are validated where the batch is made.
    unsafe { kernels.get("rope_kv", name, 0)?.launch(kernels.gpu(), launch, Args::new().with(op.args())) }
}

impl RopeKv<'_> {
    fn check(&self, n: usize) -> Result<(), CudaError> {
        check_heads(self.heads)?;
        let Heads { n_heads, n_kv_heads, head_dim } = self.heads;
        let needed = self.v_first.max(self.k_first) + n_kv_heads * head_dim;
        if n == 0 || self.stride < needed || self.qkv.len() < n * self.stride {
            return Err(contract(
                "qkv",
                format!("{n} rows of {needed} or more"),
                format!("{} of {}", self.qkv.len(), self.stride),
            ));
        }
        if self.n_rot > head_dim || !self.n_rot.is_multiple_of(2) || self.positions.len() < n || self.slots.len() < n {
            return Err(contract(
                "rotation",
                format!("an even part of {head_dim}, {n} positions and slots"),
                self.n_rot,
            ));
        }
        if self.q_out.len() < n * n_heads * head_dim {
            let expected = format!("{n} rows of {}", n_heads * head_dim);
            return Err(contract("q_out", expected, self.q_out.len()));
        }
        if let Some((q, k, _)) = self.norm.filter(|(q, k, _)| q.len() != head_dim || k.len() != head_dim) {
            return Err(contract("norm", format!("{head_dim} weights twice"), format!("{} and {}", q.len(), k.len())));
        }
        self.kv.check(self.heads)
    }

    fn args(&self) -> RopeKvArgs {
        RopeKvArgs {
            qkv: self.qkv.ptr(),
            table: self.table.ptr(),
            q_norm: self.norm.map_or(0, |n| n.0.ptr()),
            k_norm: self.norm.map_or(0, |n| n.1.ptr()),
            positions: self.positions.ptr(),
            slots: self.slots.ptr(),
            q_out: self.q_out.ptr(),
            k_cache: self.kv.k.ptr(),
            v_cache: self.kv.v.ptr(),
            norm_eps: self.norm.map_or(0.0, |n| n.2),
            qkv_stride: self.stride as i32,
            k_first: self.k_first as i32,
            v_first: self.v_first as i32,
            n_heads: self.heads.n_heads as i32,
            n_kv_heads: self.heads.n_kv_heads as i32,
            head_dim: self.heads.head_dim as i32,
            n_rot: self.n_rot as i32,
            interleaved: i32::from(self.interleaved),
        }
    }
}

fn contract(what: &str, expected: impl ToString, found: impl ToString) -> CudaError {
    CudaError::Contract { op: format!("attention: {what}"), expected: expected.to_string(), found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const FORMATS: [KvFormat; 2] = [KvFormat::F16, KvFormat::Q8_0];
    /// What a block may have on chips with little shared memory, and on Hopper.
    const LITTLE: u32 = 99 << 10;
    const MUCH: u32 = 227 << 10;

    fn each() -> impl Iterator<Item = (KvFormat, usize)> {
        FORMATS.into_iter().flat_map(|format| HEAD_DIMS.iter().map(move |dim| (format, *dim)))
    }

    #[test]
    fn every_format_and_head_size_has_kernels_of_its_own() {
        for name in [prefill_name, step_name, |format, dim| decode_names(format, dim).0] {
            let names: BTreeSet<&str> = each().map(|(format, dim)| name(format, dim)).collect();
            assert_eq!(names.len(), FORMATS.len() * HEAD_DIMS.len());
            for (format, dim) in each() {
                let end = if format == KvFormat::F16 { format!("_{dim}") } else { format!("_q8_{dim}") };
                assert!(name(format, dim).ends_with(&end), "{} is not of {dim}", name(format, dim));
            }
        }
        assert!(each().all(|(format, dim)| decode_names(format, dim).1 == format!("attention_merge_{dim}")));
    }

    #[test]
    fn blocks_have_the_shared_memory_that_they_ask_for() {
        for (format, dim) in each() {
            let most = [2 * stage_bytes(format, dim), step_bytes(format, dim), prefill_bytes(format, dim)];
            assert!(most.into_iter().all(|bytes| bytes <= LITTLE), "{format:?} {dim}: {most:?}");
            assert!(slab_bytes(dim) <= MUCH && slab_bytes(dim).is_multiple_of(128));
            // What follows a stage is read sixteen bytes at a time.
            assert!(stage_bytes(format, dim).is_multiple_of(16), "{format:?} {dim}");
        }
    }

    #[test]
    fn many_blocks_have_one_stage_each() {
        let stages = |heads: usize, dim, n_sequences: usize| {
            decode_stages(n_sequences * heads * 5, stage_bytes(KvFormat::F16, dim), 132, (9, 0))
        };
        // Llama-3-8B after 512 tokens: three blocks of two stages on a multiprocessor, 396 at once.
        assert_eq!([1, 16, 19, 20, 64, 256].map(|n| stages(8, 128, n)), [2, 2, 2, 1, 1, 1]);
        // Qwen2.5-0.5B: six.
        assert_eq!([64, 158, 159, 256].map(|n| stages(2, 64, n)), [2, 2, 1, 1]);
        assert_eq!(decode_stages(10_000, stage_bytes(KvFormat::F16, 128), 128, (8, 9)), 1);
    }

    #[test]
    fn items_hold_each_row_once() {
        for (n_heads, n_kv_heads) in [(14, 2), (32, 32), (64, 8), (17, 1), (3, 1)] {
            let heads = Heads { n_heads, n_kv_heads, head_dim: 64 };
            for n_tokens in [1, 2, 3, 17, 31, 33, 127] {
                for rows in [DECODE_ROWS, PREFILL_ROWS] {
                    let items: Vec<Item> = Item::cut(5, n_tokens, 9, heads, rows).collect();
                    let n_rows = n_tokens * n_heads / n_kv_heads;
                    assert_eq!(items.len(), n_rows.div_ceil(rows));
                    for (i, item) in items.iter().enumerate() {
                        assert_eq!(item.words(), [5, (i * rows) as i32, n_rows as i32, 9]);
                    }
                }
            }
            assert!(rows_of_one_token(heads) <= DECODE_ROWS.min(n_heads / n_kv_heads));
        }
    }

    #[test]
    fn work_space_and_cache_are_what_their_rows_take() {
        let heads = Heads { n_heads: 14, n_kv_heads: 2, head_dim: 64 };
        assert_eq!(decode_partial_len(heads, 3, rows_of_one_token(heads), 4), 3 * 2 * 4 * 7 * (64 + 2));
        assert_eq!(KvFormat::F16.head_bytes(96), 32 * 192);
        assert_eq!(KvFormat::Q8_0.head_bytes(96), 32 * 3 * 34);
        assert_eq!(KvFormat::Q8_0.head_bytes(16), 32 * 34, "a part of a group takes a whole one");
    }
}
