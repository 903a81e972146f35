//! Mixture of experts around the products: choice of experts, grouping of choices by expert, weighted sum.

use crate::arena::Buffer;
use crate::error::CudaError;
use crate::kernels::{Args, Kernels, Launch};

/// Most experts that the kernels take. Mirrors `MAX_EXPERTS`.
pub const MAX_EXPERTS: usize = 256;
/// Most experts per token: a lane of a warp holds each.
pub const MAX_USED: usize = 32;

/// A choice of experts: `T` tokens with `n_used` of `n_experts` each.
#[derive(Debug, Clone)]
pub struct Choices {
    /// i32 `[T, n_used]`, in descending order of score.
    pub experts: Buffer<i32>,
    /// f32 `[T, n_used]`.
    pub weights: Buffer<f32>,
    /// Experts that there are.
    pub n_experts: usize,
    /// Experts per token.
    pub n_used: usize,
}

/// Choices grouped by expert, each group in whole tiles of columns.
#[derive(Debug, Clone)]
pub struct Groups {
    /// i32 `[n_tiles]`: the expert of each tile, negative beyond the last.
    pub tile_experts: Buffer<i32>,
    /// i32 `[n_tiles * tile]`: which choice (token, k) each column is, negative for padding.
    pub pair_of: Buffer<i32>,
    /// i32 `[n_tiles * tile]`: its token, negative for padding.
    pub token_of: Buffer<i32>,
    /// i32 `[T * n_used]`: the column of each choice.
    pub slot_of: Buffer<i32>,
    /// Columns of a tile.
    pub tile: usize,
}

/// Tiles that hold `n_tokens * n_used` choices of `n_experts` however they fall.
pub fn max_tiles(n_tokens: usize, n_used: usize, n_experts: usize, tile: usize) -> usize {
    let n_pairs = n_tokens * n_used;
    // All but the full tiles are the last of an expert that was chosen at all.
    n_pairs / tile + n_experts.min(n_pairs)
}

impl Choices {
    /// Enqueues the choice for `n` tokens from router logits f32 `[n, n_experts]`.
    ///
    /// # Errors
    /// [`CudaError::Contract`]; a failed launch.
    pub fn route(&self, kernels: &Kernels, logits: &Buffer<f32>, n: usize) -> Result<(), CudaError> {
        self.check(n)?;
        if logits.len() < n * self.n_experts {
            return Err(contract("route: logits", n * self.n_experts, logits.len()));
        }
        let args = Args::new()
            .with(self.experts.ptr())
            .with(self.weights.ptr())
            .with(logits.ptr())
            .with(self.n_experts as i32)
            .with(self.n_used as i32);
        // SAFETY: the arguments are the kernel's parameters in order; the checks held the buffers against the shapes.
        unsafe { kernels.get("moe", "moe_route", 0)?.launch(kernels.gpu(), overlapping((n, 1), 32), args) }
    }

    /// Enqueues the grouping of `n` tokens' choices into `groups`.
    ///
    /// # Errors
    /// [`CudaError::Contract`]; a failed launch.
    pub fn group(&self, kernels: &Kernels, groups: &Groups, n: usize) -> Result<(), CudaError> {
        self.check(n)?;
        let n_tiles = max_tiles(n, self.n_used, self.n_experts, groups.tile);
        let n_columns = n_tiles * groups.tile;
        let short = groups.tile_experts.len() < n_tiles
            || groups.pair_of.len() < n_columns
            || groups.token_of.len() < n_columns
            || groups.slot_of.len() < n * self.n_used;
        if short {
            let found = format!("{} tiles, {} columns", groups.tile_experts.len(), groups.pair_of.len());
            return Err(contract("group", format!("{n_tiles} tiles of {}", groups.tile), found));
        }
        let args = Args::new()
            .with(groups.tile_experts.ptr())
            .with(groups.pair_of.ptr())
            .with(groups.slot_of.ptr())
            .with(self.experts.ptr())
            .with((n * self.n_used) as i32)
            .with(self.n_experts as i32)
            .with(groups.tile as i32)
            .with(n_tiles as i32);
        // SAFETY: as in `route`.
        unsafe { kernels.get("moe", "moe_group", 0)?.launch(kernels.gpu(), overlapping((1, 1), 1024), args)? };
        let args = Args::new()
            .with(groups.token_of.ptr())
            .with(groups.pair_of.ptr())
            .with(n_columns as i32)
            .with(self.n_used as i32);
        let launch = overlapping((n_columns.div_ceil(256), 1), 256);
        // SAFETY: as in `route`.
        unsafe { kernels.get("moe", "moe_tokens", 0)?.launch(kernels.gpu(), launch, args) }
    }

    /// Enqueues `x[t] += sum over k of weights[t, k] * y[row of (t, k)]` for `n` tokens; x and y have rows of `n_cols`. The row is
    /// the choice's column in `groups`, or the choice itself.
    ///
    /// # Errors
    /// [`CudaError::Contract`]; a failed launch.
    pub fn combine(
        &self,
        kernels: &Kernels,
        (x, y): (&Buffer<f32>, &Buffer<f32>),
        n_cols: usize,
        groups: Option<&Groups>,
        n: usize,
    ) -> Result<(), CudaError> {
        self.check(n)?;
        let n_pairs = n * self.n_used;
        let y_rows = groups.map_or(n_pairs, |g| max_tiles(n, self.n_used, self.n_experts, g.tile) * g.tile);
        if n_cols == 0 || x.len() < n * n_cols || y.len() < y_rows * n_cols {
            let expected = format!("{n} and {y_rows} rows of {n_cols}");
            return Err(contract("combine", expected, format!("{} and {} elements", x.len(), y.len())));
        }
        let args = Args::new()
            .with(x.ptr())
            .with(y.ptr())
            .with(self.weights.ptr())
            .with(groups.map_or(0, |g| g.slot_of.ptr()))
            .with(n_cols as i32)
            .with(self.n_used as i32);
        let launch = overlapping((n_cols.div_ceil(256), n), 256);
        // SAFETY: as in `route`; slots are below the tiles' columns.
        unsafe { kernels.get("moe", "moe_combine", 0)?.launch(kernels.gpu(), launch, args) }
    }

    /// Holds `n` tokens' choices against the buffers.
    pub(super) fn check(&self, n: usize) -> Result<(), CudaError> {
        let Choices { n_experts, n_used, .. } = *self;
        if n_used == 0 || n_used > n_experts.min(MAX_USED) || n_experts > MAX_EXPERTS {
            let expected = format!("1 to {MAX_USED} of at most {MAX_EXPERTS} experts");
            return Err(contract("experts", expected, format!("{n_used} of {n_experts}")));
        }
        if n == 0 || self.experts.len() < n * n_used || self.weights.len() < n * n_used {
            return Err(contract("choices", format!("1 or more rows of {n_used}, {n} said"), self.experts.len()));
        }
        Ok(())
    }
}

fn overlapping(grid: (usize, usize), block: u32) -> Launch {
    Launch { grid: (grid.0 as u32, grid.1 as u32, 1), block: (block, 1, 1), shared_bytes: 0, overlap: true }
}

fn contract(what: &str, expected: impl ToString, found: impl ToString) -> CudaError {
    CudaError::Contract { op: format!("moe: {what}"), expected: expected.to_string(), found: found.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The most tiles over all ways to spread pairs over experts.
    fn worst(n_pairs: usize, n_experts: usize, tile: usize) -> usize {
        // One pair each for as many experts as there are, the rest with the first.
        let used = n_experts.min(n_pairs);
        let ones = used - 1;
        (0..=ones).map(|ones| ones + (n_pairs - ones).div_ceil(tile)).max().unwrap_or(0)
    }

    #[test]
    fn tiles_are_enough_for_any_choice() {
        for n_tokens in 1..40 {
            for (n_used, n_experts) in [(1, 1), (1, 5), (2, 5), (4, 32), (8, 8)] {
                for tile in [32, 64] {
                    let (n, most) = (n_tokens * n_used, max_tiles(n_tokens, n_used, n_experts, tile));
                    assert!(most >= worst(n, n_experts, tile), "{n} pairs, {n_experts} experts, tiles of {tile}");
                }
            }
        }
    }
}
