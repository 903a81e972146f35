//! Work space of ops: allocated for the largest step when a model is announced, and grown for ops that run without one.

use super::plan::WorkSizes;
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::{Arena, Buffer, Element};
use playhouse_cuda::launch::matrix::{HalfRows, TILE_K};
use playhouse_cuda::launch::moe::{Choices, Groups};

/// One buffer that grows. What it held before is not kept.
pub(super) struct Growing<T: Element> {
    what: &'static str,
    buffer: Option<Buffer<T>>,
}

impl<T: Element> Growing<T> {
    fn new(what: &'static str) -> Self {
        Self { what, buffer: None }
    }

    /// At least `len` elements.
    pub(super) fn get(&mut self, arena: &Arena, len: usize) -> Result<Buffer<T>, CudaError> {
        match &self.buffer {
            Some(buffer) if buffer.len() >= len => Ok(buffer.clone()),
            _ => {
                let buffer = arena.alloc::<T>(len, self.what)?;
                // Padding of rows is never written and must not be NaN.
                buffer.zero()?;
                Ok(self.buffer.insert(buffer).clone())
            }
        }
    }
}

/// Every buffer that ops need for themselves.
pub(super) struct Work {
    pub(super) arena: Arena,
    normed: Growing<half::f16>,
    pub(super) qkv: Growing<f32>,
    pub(super) partial: Growing<f32>,
    pub(super) attention: Growing<f32>,
    /// Zeros, and zeros again after each use.
    pub(super) tickets: Growing<u32>,
    gate: Growing<f32>,
    up: Growing<f32>,
    pub(super) scores: Growing<f32>,
    experts: Growing<i32>,
    weights: Growing<f32>,
    slots: Growing<i32>,
    tiles: Growing<i32>,
    pairs: Growing<i32>,
    tokens: Growing<i32>,
    hidden: Growing<half::f16>,
    /// Row length that `hidden` was last used with.
    hidden_stride: usize,
    pub(super) outputs: Growing<f32>,
}

impl Work {
    pub(super) fn new(arena: Arena) -> Self {
        Self {
            arena,
            normed: Growing::new("normalised rows"),
            qkv: Growing::new("queries, keys and values"),
            partial: Growing::new("sums of split products"),
            attention: Growing::new("splits of attention"),
            tickets: Growing::new("tickets of attention"),
            gate: Growing::new("gate"),
            up: Growing::new("up"),
            scores: Growing::new("router logits"),
            experts: Growing::new("chosen experts"),
            weights: Growing::new("weights of experts"),
            slots: Growing::new("places of choices"),
            tiles: Growing::new("experts of tiles"),
            pairs: Growing::new("choices of columns"),
            tokens: Growing::new("tokens of columns"),
            hidden: Growing::new("inner activations of experts"),
            hidden_stride: 0,
            outputs: Growing::new("outputs of experts"),
        }
    }

    /// Allocates what the largest step needs.
    pub(super) fn reserve(&mut self, sizes: &WorkSizes) -> Result<(), CudaError> {
        let arena = self.arena.clone();
        fn take<T: Element>(buffer: &mut Growing<T>, arena: &Arena, len: usize) -> Result<(), CudaError> {
            if len > 0 { buffer.get(arena, len).map(drop) } else { Ok(()) }
        }
        take(&mut self.normed, &arena, sizes.normed)?;
        take(&mut self.qkv, &arena, sizes.qkv)?;
        take(&mut self.partial, &arena, sizes.partial)?;
        take(&mut self.attention, &arena, sizes.attention)?;
        take(&mut self.tickets, &arena, sizes.tickets)?;
        take(&mut self.gate, &arena, sizes.gates)?;
        take(&mut self.up, &arena, sizes.gates)?;
        take(&mut self.scores, &arena, sizes.scores)?;
        take(&mut self.experts, &arena, sizes.choices)?;
        take(&mut self.weights, &arena, sizes.choices)?;
        take(&mut self.slots, &arena, sizes.choices)?;
        take(&mut self.tiles, &arena, sizes.tiles)?;
        take(&mut self.pairs, &arena, sizes.rows)?;
        take(&mut self.tokens, &arena, sizes.rows)?;
        take(&mut self.hidden, &arena, sizes.hidden)?;
        take(&mut self.outputs, &arena, sizes.outputs)
    }

    /// f16 rows for the input of a product; whoever writes them writes their padding.
    pub(super) fn normed(&mut self, n: usize, n_cols: usize) -> Result<HalfRows, CudaError> {
        let stride = n_cols.next_multiple_of(TILE_K);
        Ok(HalfRows { data: self.normed.get(&self.arena, n * stride)?, stride })
    }

    /// Gate and up of `n` rows before they are joined.
    pub(super) fn gates(&mut self, len: usize) -> Result<(Buffer<f32>, Buffer<f32>), CudaError> {
        Ok((self.gate.get(&self.arena, len)?, self.up.get(&self.arena, len)?))
    }

    /// f16 rows between the products of experts, zero in their padding.
    pub(super) fn hidden(&mut self, n: usize, n_cols: usize) -> Result<HalfRows, CudaError> {
        let stride = n_cols.next_multiple_of(TILE_K);
        let data = self.hidden.get(&self.arena, n * stride)?;
        if self.hidden_stride != stride {
            data.zero()?;
            self.hidden_stride = stride;
        }
        Ok(HalfRows { data, stride })
    }

    pub(super) fn choices(&mut self, n: usize, n_experts: usize, n_used: usize) -> Result<Choices, CudaError> {
        Ok(Choices {
            experts: self.experts.get(&self.arena, n * n_used)?,
            weights: self.weights.get(&self.arena, n * n_used)?,
            n_experts,
            n_used,
        })
    }

    pub(super) fn groups(&mut self, n_pairs: usize, n_tiles: usize, tile: usize) -> Result<Groups, CudaError> {
        let arena = &self.arena;
        Ok(Groups {
            tile_experts: self.tiles.get(arena, n_tiles)?,
            pair_of: self.pairs.get(arena, n_tiles * tile)?,
            token_of: self.tokens.get(arena, n_tiles * tile)?,
            slot_of: self.slots.get(arena, n_pairs)?,
            tile,
        })
    }
}
