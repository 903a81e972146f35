//! Ref-counted blocks. An owner is a sequence or the prefix cache; a block without owners is free.

use super::BlockId;

/// Reference counts of all blocks, and a stack of the free ones.
#[derive(Debug)]
pub struct BlockPool {
    n_owners: Vec<u32>,
    free: Vec<BlockId>,
}

/// The books do not balance: a mistake of ours, found by `check_integrity`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IntegrityError {
    /// Owners counted by the pool and owners found differ: a leak if more are counted, a double use if fewer.
    #[error("block {block} counts {counted} owners, {found} were found")]
    Owners {
        /// The block.
        block: BlockId,
        /// What the pool says.
        counted: u32,
        /// What the tables and the cache say.
        found: u32,
    },
    /// A block with owners is on the free list, or a block without is not, or it is there twice.
    #[error("block {block} has {owners} owners and is {times} times on the free list")]
    FreeList {
        /// The block.
        block: BlockId,
        /// What the pool says.
        owners: u32,
        /// Times on the free list.
        times: u32,
    },
    /// The prefix cache thinks a block idle that a sequence holds, or the reverse.
    #[error("block {block} is held by {held} sequences, the prefix cache thinks idle = {idle}")]
    Idle {
        /// The block.
        block: BlockId,
        /// Sequences that hold it.
        held: u32,
        /// What the cache thinks.
        idle: bool,
    },
    /// A cached block outlived the block before it, so that it can never be found again.
    #[error("cached block {block} follows block {parent}, which is not cached any more")]
    Orphan {
        /// The block.
        block: BlockId,
        /// The block before it.
        parent: BlockId,
    },
    /// A sequence is about to write a block that others may read.
    #[error("block {block} is to be written and is shared or cached")]
    NotPrivate {
        /// The block.
        block: BlockId,
    },
}

impl BlockPool {
    /// All blocks free; block 0 is handed out first.
    pub fn new(n_blocks: usize) -> Self {
        let n_blocks = u32::try_from(n_blocks).expect("block ids are 32 bits wide");
        Self { n_owners: vec![0; n_blocks as usize], free: (0..n_blocks).rev().collect() }
    }

    /// Blocks in all.
    pub fn n_total(&self) -> usize {
        self.n_owners.len()
    }

    /// Blocks without owners.
    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// Owners of a block.
    pub fn n_owners(&self, block: BlockId) -> u32 {
        self.n_owners[block as usize]
    }

    /// A free block, now with one owner.
    pub fn take(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.n_owners[block as usize] = 1;
        Some(block)
    }

    /// One owner more.
    ///
    /// # Panics
    /// If the block is free: whoever adds an owner has found the block with one.
    pub fn retain(&mut self, block: BlockId) {
        let n_owners = &mut self.n_owners[block as usize];
        assert!(*n_owners > 0, "block {block} is free and cannot be shared");
        *n_owners += 1;
    }

    /// One owner less; returns how many are left. The last one frees the block.
    ///
    /// # Panics
    /// If the block is free already.
    pub fn release(&mut self, block: BlockId) -> u32 {
        let n_owners = &mut self.n_owners[block as usize];
        assert!(*n_owners > 0, "block {block} is released twice");
        *n_owners -= 1;
        if *n_owners == 0 {
            self.free.push(block);
        }
        self.n_owners[block as usize]
    }

    /// Compares the counts with `found`, the owners of each block counted by someone else.
    ///
    /// # Errors
    /// The first block whose books do not balance.
    pub fn check_integrity(&self, found: &[u32]) -> Result<(), IntegrityError> {
        let mut times = vec![0u32; self.n_total()];
        for &block in &self.free {
            times[block as usize] += 1;
        }
        for (block, (&counted, (&found, &times))) in (0..).zip(self.n_owners.iter().zip(found.iter().zip(&times))) {
            if counted != found {
                return Err(IntegrityError::Owners { block, counted, found });
            }
            if times != u32::from(counted == 0) {
                return Err(IntegrityError::FreeList { block, owners: counted, times });
            }
        }
        Ok(())
    }
}
