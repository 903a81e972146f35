//! The blocks of one sequence, in the order of its tokens.

use super::BlockId;
use crate::backend::BLOCK_TOKENS;

/// Where each token of a sequence has its keys and values.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
    /// The blocks in order.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Slot of the token at `position`.
    ///
    /// # Panics
    /// If the table does not reach that far.
    pub fn slot(&self, position: usize) -> u32 {
        let slot = self.blocks[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS;
        u32::try_from(slot).expect("the pool has fewer than 2^32 slots")
    }

    pub(super) fn push(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    pub(super) fn replace(&mut self, index: usize, block: BlockId) {
        self.blocks[index] = block;
    }

    pub(super) fn take(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.blocks)
    }
}
