//! Encoded rows times f32 columns.
//!
//! `out[row][col] = sum_k decode(row)[k] * col[k]`, each in the order of [`super::lanes`], whatever the number of
//! rows and columns that are computed together. A few columns are multiplied as the row is decoded, in registers, four
//! rows at a time so that the additions of one row hide behind those of the others. For more columns, [`PANEL_ROWS`] rows are
//! decoded once into an f32 panel that stays in the L2 cache while the columns pass over it four at a time.

use super::lanes::{Lanes, chunks, dispatch, padded};
use super::pool::{Pool, part_len};
use super::unpack::{Format, with_format};
use super::{Ctx, Isa};
use crate::dtype::DType;
use std::cell::RefCell;

/// Rows decoded at a time when there are several columns.
const PANEL_ROWS: usize = 16;
/// Most rows in one task.
pub(super) const TASK_ROWS: usize = 64;
/// Multiply-adds below which a fork costs more than it saves (about 5 microseconds on one core).
const SERIAL_MACS: usize = 1 << 15;

/// Rows of one matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub(crate) dtype: DType,
    /// `n_rows` rows of `row_bytes`.
    pub(crate) bytes: &'a [u8],
    pub(crate) row_bytes: usize,
    pub(crate) n_rows: usize,
    pub(crate) n_cols: usize,
}

impl<'a> Mat<'a> {
    /// All elements, where they are aligned f32.
    pub(super) fn f32s(&self) -> Option<&'a [f32]> {
        let all = (self.dtype == DType::F32).then(|| bytemuck::try_cast_slice(self.bytes).ok())?;
        all.filter(|all: &&[f32]| all.len() == self.n_rows * self.n_cols)
    }

    /// The encoded row `i`.
    pub(super) fn row(&self, i: usize) -> &'a [u8] {
        &self.bytes[i * self.row_bytes..][..self.row_bytes]
    }
}

/// Matrices of the same shape that are multiplied with the same columns, row by row together.
pub(crate) struct Group<'a> {
    pub(crate) mats: Vec<Mat<'a>>,
    /// Each `n_cols` long.
    pub(crate) cols: Vec<&'a [f32]>,
}

/// A finished part of a group: rows `first_row ..` of every matrix, for all columns.
pub(crate) struct Done<'a> {
    /// Index of the group.
    pub(crate) group: usize,
    pub(crate) first_row: usize,
    pub(crate) n_rows: usize,
    pub(crate) n_cols: usize,
    /// `[n_mats][n_rows][n_cols]`
    values: &'a [f32],
}

impl Done<'_> {
    /// `[n_rows][n_cols]` of one matrix.
    fn mat(&self, mat: usize) -> &[f32] {
        let len = self.n_rows * self.n_cols;
        &self.values[mat * len..][..len]
    }

    /// The rows of column `col` of one matrix, `bias` (of the whole matrix) added.
    pub(crate) fn column(&self, mat: usize, col: usize, bias: Option<&[f32]>, out: &mut [f32]) {
        let values = self.mat(mat).iter().skip(col).step_by(self.n_cols);
        match bias {
            Some(bias) => {
                let bias = &bias[self.first_row..][..self.n_rows];
                out.iter_mut().zip(values).zip(bias).for_each(|((out, v), b)| *out = v + b);
            }
            None => out.iter_mut().zip(values).for_each(|(out, v)| *out = *v),
        }
    }
}

thread_local! {
    /// Products of one task, and the panel of decoded rows.
    static SCRATCH: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Multiplies all groups in one parallel region and hands each finished part to `sink`, on the thread that made it.
pub(crate) fn multiply(ctx: &mut Ctx, groups: &[Group<'_>], sink: &(dyn Fn(Done<'_>) + Sync)) {
    let isa = ctx.isa;
    let tasks = tasks(groups, &ctx.pool);
    let run = |task: &(usize, usize, usize)| {
        let &(group, first_row, n_rows) = task;
        let Group { mats, cols } = &groups[group];
        SCRATCH.with_borrow_mut(|(out, panel)| {
            out.resize((mats.len() * n_rows * cols.len()).max(out.len()), 0.0);
            let out = &mut out[..mats.len() * n_rows * cols.len()];
            for (mat, out) in mats.iter().zip(out.chunks_exact_mut(n_rows * cols.len())) {
                rows(isa, mat, first_row, n_rows, cols, panel, out);
            }
            sink(Done { group, first_row, n_rows, n_cols: cols.len(), values: out });
        });
    };
    let macs: usize =
        groups.iter().map(|g| g.mats.iter().map(|m| m.n_rows * m.n_cols).sum::<usize>() * g.cols.len()).sum();
    if macs < SERIAL_MACS {
        tasks.iter().for_each(run);
    } else {
        ctx.pool.run(tasks.len(), &|i| run(&tasks[i]));
    }
}

/// `(group, first row, rows)` of every task.
fn tasks(groups: &[Group<'_>], pool: &Pool) -> Vec<(usize, usize, usize)> {
    let mut tasks = Vec::new();
    for (g, Group { mats, cols }) in groups.iter().enumerate() {
        let n_rows = mats[0].n_rows;
        assert!(mats.iter().all(|m| m.n_rows == n_rows), "matrices of a group have the same rows");
        if cols.is_empty() {
            continue;
        }
        let len = part_len(n_rows, pool.n_threads(), PANEL_ROWS, TASK_ROWS);
        tasks.extend((0..n_rows).step_by(len).map(|first| (g, first, len.min(n_rows - first))));
    }
    tasks
}

/// Rows `first_row .. first_row + n_rows` of `mat` times each of `cols`; `out` `[n_rows][cols]`.
pub(crate) fn rows(
    isa: Isa,
    mat: &Mat<'_>,
    first_row: usize,
    n_rows: usize,
    cols: &[&[f32]],
    panel: &mut Vec<f32>,
    out: &mut [f32],
) {
    assert!(first_row + n_rows <= mat.n_rows, "rows {first_row}+{n_rows} of {}", mat.n_rows);
    assert_eq!(out.len(), n_rows * cols.len(), "matmul: output is rows x columns");
    assert!(cols.iter().all(|c| c.len() == mat.n_cols), "matmul: columns are {} long", mat.n_cols);
    if cols.len() <= most_fused_columns(isa) && mat.dtype.row_bytes(mat.n_cols) == Some(mat.row_bytes) {
        return fused(isa, mat, first_row, cols, out);
    }
    if let Some(all) = mat.f32s() {
        // Nothing to decode.
        return panel_times(isa, &all[first_row * mat.n_cols..][..n_rows * mat.n_cols], cols, out);
    }
    panel.resize((PANEL_ROWS * mat.n_cols).max(panel.len()), 0.0);
    for (i, out) in out.chunks_mut(PANEL_ROWS * cols.len()).enumerate() {
        let n = out.len() / cols.len();
        let panel = &mut panel[..n * mat.n_cols];
        for (r, row) in panel.chunks_exact_mut(mat.n_cols).enumerate() {
            decode_row(isa, mat.dtype, mat.row(first_row + i * PANEL_ROWS + r), row);
        }
        panel_times(isa, panel, cols, out);
    }
}

dispatch!(
    /// Decodes the first `out.len()` elements of an encoded row; the last block may be used in part.
    pub(crate) fn decode_row(dtype: DType, row: &[u8], out: &mut [f32]) = decode_row_lanes
);

#[inline(always)]
fn decode_row_lanes<S: Lanes>(s: S, dtype: DType, row: &[u8], out: &mut [f32]) {
    with_format!(dtype, F => decode_format::<S, F>(s, row, out));
}

#[inline(always)]
fn decode_format<S: Lanes, F: Format>(s: S, row: &[u8], out: &mut [f32]) {
    let (blocks, rest) = whole_blocks::<F>(row);
    let (units, tail) = out.as_chunks_mut::<32>();
    for (i, unit) in units.iter_mut().enumerate() {
        store_unit(s, F::unit(s, &blocks[i / F::UNITS], i % F::UNITS), unit);
    }
    if !tail.is_empty() {
        // A part of a block: of one that is there (quantised KV), or of numbers that fill less than a unit.
        let mut unit = [0.0; 32];
        let i = units.len();
        let block = match blocks.get(i / F::UNITS) {
            Some(block) => *block,
            None => padded_block::<F>(rest),
        };
        store_unit(s, F::unit(s, &block, i % F::UNITS), &mut unit);
        tail.copy_from_slice(&unit[..tail.len()]);
    }
}

#[inline(always)]
fn store_unit<S: Lanes>(s: S, unit: [S::F; 2], out: &mut [f32; 32]) {
    let (halves, _) = out.as_chunks_mut::<16>();
    s.store(unit[0], &mut halves[0]);
    s.store(unit[1], &mut halves[1]);
}

/// A row as whole blocks, and the bytes that fill none (rows of F32, F16 and BF16, whose unit is 32 numbers).
#[inline(always)]
fn whole_blocks<F: Format>(row: &[u8]) -> (&[F::Block], &[u8]) {
    let whole = row.len() - row.len() % size_of::<F::Block>();
    (bytemuck::cast_slice(&row[..whole]), &row[whole..])
}

#[inline(always)]
fn padded_block<F: Format>(rest: &[u8]) -> F::Block {
    let mut block: F::Block = bytemuck::Zeroable::zeroed();
    bytemuck::bytes_of_mut(&mut block)[..rest.len()].copy_from_slice(rest);
    block
}

/// Columns for which decoding in registers, again for every four of them, beats a panel.
fn most_fused_columns(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) => 8,
        _ => 1,
    }
}

dispatch!(
    /// Encoded rows from `first_row` on times a few columns; `out` `[rows][cols]`.
    fn fused(mat: &Mat<'_>, first_row: usize, cols: &[&[f32]], out: &mut [f32]) = fused_lanes
);

#[inline(always)]
fn fused_lanes<S: Lanes>(s: S, mat: &Mat<'_>, first_row: usize, cols: &[&[f32]], out: &mut [f32]) {
    with_format!(mat.dtype, F => fused_format::<S, F>(s, mat, first_row, cols, out));
}

#[inline(always)]
fn fused_format<S: Lanes, F: Format>(s: S, mat: &Mat<'_>, first_row: usize, cols: &[&[f32]], out: &mut [f32]) {
    let n_rows = out.len() / cols.len();
    let last = cols.len() - 1;
    for r in (0..n_rows).step_by(4) {
        // Four rows at a time: the last ones are computed again where there are fewer, which costs little and saves
        // a copy of the code for each format.
        let row = |i: usize| mat.row(first_row + (r + i).min(n_rows - 1));
        let rows = [row(0), row(1), row(2), row(3)];
        let n = (n_rows - r).min(4);
        if S::TILE_COLS == 4 && cols.len() > 1 {
            for c in (0..cols.len()).step_by(4) {
                let col = |i: usize| cols[(c + i).min(last)];
                let tile = dot_rows::<S, F, 4, 4>(s, rows, [col(0), col(1), col(2), col(3)]);
                let width = (cols.len() - c).min(4);
                for (i, row) in tile[..n].iter().enumerate() {
                    out[(r + i) * cols.len() + c..][..width].copy_from_slice(&row[..width]);
                }
            }
        } else {
            for (c, col) in cols.iter().enumerate() {
                let tile = dot_rows::<S, F, 4, 1>(s, rows, [col]);
                for (i, [value]) in tile[..n].iter().enumerate() {
                    out[(r + i) * cols.len() + c] = *value;
                }
            }
        }
    }
}

/// `R` encoded rows times `C` columns, decoded in registers.
#[inline(always)]
fn dot_rows<S: Lanes, F: Format, const R: usize, const C: usize>(
    s: S,
    rows: [&[u8]; R],
    cols: [&[f32]; C],
) -> [[f32; C]; R] {
    let n_units = cols[0].len() / 32;
    let mut blocks = [&[][..]; R];
    for r in 0..R {
        blocks[r] = &whole_blocks::<F>(rows[r]).0[..n_units / F::UNITS];
    }
    let (mut units, mut tails) = ([&[][..]; C], [&[][..]; C]);
    for c in 0..C {
        let (all, tail) = cols[c].as_chunks::<32>();
        (units[c], tails[c]) = (&all[..n_units], tail);
    }
    let mut acc = [[s.splat(0.0); C]; R];
    for b in 0..n_units / F::UNITS {
        for u in 0..F::UNITS {
            let mut x = [[s.splat(0.0); 2]; C];
            for c in 0..C {
                let (halves, _) = units[c][b * F::UNITS + u].as_chunks::<16>();
                x[c] = [s.load(&halves[0]), s.load(&halves[1])];
            }
            for r in 0..R {
                let [w0, w1] = F::unit(s, &blocks[r][b], u);
                for c in 0..C {
                    acc[r][c] = s.mul_then_add(acc[r][c], w0, x[c][0]);
                    acc[r][c] = s.mul_then_add(acc[r][c], w1, x[c][1]);
                }
            }
        }
    }
    let mut out = [[0.0; C]; R];
    for r in 0..R {
        if !tails[0].is_empty() {
            let w = F::unit(s, &padded_block::<F>(whole_blocks::<F>(rows[r]).1), 0);
            for c in 0..C {
                acc[r][c] = add_tail(s, acc[r][c], w, tails[c]);
            }
        }
        for c in 0..C {
            out[r][c] = s.reduce(acc[r][c]);
        }
    }
    out
}

/// The elements of a row beyond its last whole unit of 32.
#[inline(always)]
fn add_tail<S: Lanes>(s: S, acc: S::F, [w0, w1]: [S::F; 2], tail: &[f32]) -> S::F {
    let (first, second) = tail.split_at(tail.len().min(16));
    let acc = s.mul_then_add(acc, w0, s.load(&padded(first)));
    if second.is_empty() { acc } else { s.mul_then_add(acc, w1, s.load(&padded(second))) }
}

dispatch!(
    /// Decoded rows times columns; `panel` `[rows][n]`, `out` `[rows][cols]`.
    pub(crate) fn panel_times(panel: &[f32], cols: &[&[f32]], out: &mut [f32]) = panel_times_lanes
);

#[inline(always)]
fn panel_times_lanes<S: Lanes>(s: S, panel: &[f32], cols: &[&[f32]], out: &mut [f32]) {
    let Some(n) = cols.first().map(|c| c.len()) else { return };
    let n_rows = panel.len() / n;
    let mut c = 0;
    while c < cols.len() {
        let wide = S::TILE_COLS == 4 && c + 4 <= cols.len();
        let mut r = 0;
        while r < n_rows {
            let tall = r + 4 <= n_rows;
            let out = &mut out[r * cols.len() + c..];
            let rows = &panel[r * n..];
            match (tall, wide) {
                (true, true) => put(&tile::<S, 4, 4>(s, rows_of(rows, n), cols_of(cols, c)), cols.len(), out),
                (true, false) => put(&tile::<S, 4, 1>(s, rows_of(rows, n), [cols[c]]), cols.len(), out),
                (false, true) => put(&tile::<S, 1, 4>(s, [&rows[..n]], cols_of(cols, c)), cols.len(), out),
                (false, false) => put(&tile::<S, 1, 1>(s, [&rows[..n]], [cols[c]]), cols.len(), out),
            }
            r += if tall { 4 } else { 1 };
        }
        c += if wide { 4 } else { 1 };
    }
}

#[inline(always)]
fn rows_of(panel: &[f32], n: usize) -> [&[f32]; 4] {
    [&panel[..n], &panel[n..2 * n], &panel[2 * n..3 * n], &panel[3 * n..4 * n]]
}

#[inline(always)]
fn cols_of<'a>(cols: &[&'a [f32]], c: usize) -> [&'a [f32]; 4] {
    [cols[c], cols[c + 1], cols[c + 2], cols[c + 3]]
}

/// Writes a tile to rows `stride` apart.
#[inline(always)]
fn put<const R: usize, const C: usize>(tile: &[[f32; C]; R], stride: usize, out: &mut [f32]) {
    for (r, row) in tile.iter().enumerate() {
        out[r * stride..][..C].copy_from_slice(row);
    }
}

/// `R` f32 rows times `C` columns, all of one length, in `R * C` accumulators.
#[inline(always)]
fn tile<S: Lanes, const R: usize, const C: usize>(s: S, rows: [&[f32]; R], cols: [&[f32]; C]) -> [[f32; C]; R] {
    let n = cols[0].len();
    let n_chunks = n / 16;
    let (mut w_chunks, mut x_chunks) = ([&[][..]; R], [&[][..]; C]);
    for r in 0..R {
        w_chunks[r] = &chunks(&rows[r][..n]).0[..n_chunks];
    }
    for c in 0..C {
        x_chunks[c] = &chunks(&cols[c][..n]).0[..n_chunks];
    }
    let mut acc = [[s.splat(0.0); C]; R];
    for i in 0..n_chunks {
        let mut w = [s.splat(0.0); R];
        for r in 0..R {
            w[r] = s.load(&w_chunks[r][i]);
        }
        for c in 0..C {
            let x = s.load(&x_chunks[c][i]);
            for r in 0..R {
                acc[r][c] = s.mul_then_add(acc[r][c], w[r], x);
            }
        }
    }
    if !n.is_multiple_of(16) {
        for c in 0..C {
            let x = s.load(&padded(&cols[c][16 * n_chunks..]));
            for r in 0..R {
                acc[r][c] = s.mul_then_add(acc[r][c], s.load(&padded(&rows[r][16 * n_chunks..n])), x);
            }
        }
    }
    let mut out = [[0.0; C]; R];
    for r in 0..R {
        for c in 0..C {
            out[r][c] = s.reduce(acc[r][c]);
        }
    }
    out
}
