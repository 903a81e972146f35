//! Paged KV memory: who holds which block of [`BLOCK_TOKENS`] tokens. Knows numbers only; the bytes are the model's.
//!
//! Every block is in exactly one of three states:
//!
//! ```text
//!            grow                      register (full)
//!   [free] ───────> [held by sequences] ───────────────> held, and known to the prefix cache
//!      ^                  │ release                          │ last sequence releases
//!      │<─────────────────┘                                  v
//!      └──────────────── evicted, least recently used <── [idle: only the prefix cache holds it]
//! ```
//!
//! A block is written only while one sequence holds it and the prefix cache does not know it. Full blocks never change.

mod pool;
mod prefix;
mod table;

pub use pool::{BlockPool, IntegrityError};
pub use prefix::{BlockHash, ChainHash, PrefixCache, chain_hash};
pub use table::BlockTable;

use crate::backend::BLOCK_TOKENS;

/// Index of a block in the pool.
pub type BlockId = u32;

/// Blocks that hold `n_tokens` tokens.
pub fn blocks_for(n_tokens: usize) -> usize {
    n_tokens.div_ceil(BLOCK_TOKENS)
}

/// The pool and the prefix cache together: the only way to take and give back blocks.
#[derive(Debug)]
pub struct KvCache {
    pool: BlockPool,
    prefix: Option<PrefixCache>,
}

impl KvCache {
    /// All `n_blocks` free; with or without a prefix cache.
    pub fn new(n_blocks: usize, with_prefix_cache: bool) -> Self {
        Self { pool: BlockPool::new(n_blocks), prefix: with_prefix_cache.then(|| PrefixCache::new(chain_hash)) }
    }

    /// As [`KvCache::new`], with another hash for the prefix cache: tests force collisions with it.
    pub fn with_hash(n_blocks: usize, hash: ChainHash) -> Self {
        Self { pool: BlockPool::new(n_blocks), prefix: Some(PrefixCache::new(hash)) }
    }

    /// Blocks in all.
    pub fn n_total(&self) -> usize {
        self.pool.n_total()
    }

    /// Blocks that nobody holds.
    pub fn n_free(&self) -> usize {
        self.pool.n_free()
    }

    /// Blocks that only the prefix cache holds.
    pub fn n_idle(&self) -> usize {
        self.prefix.as_ref().map_or(0, PrefixCache::n_idle)
    }

    /// Blocks that [`KvCache::grow`] could hand out now.
    pub fn n_available(&self) -> usize {
        self.n_free() + self.n_idle()
    }

    /// The hash of a full block after `parent`, or 0 without a prefix cache.
    pub fn hash(&self, parent: Option<BlockHash>, tokens: &[u32]) -> BlockHash {
        self.prefix.as_ref().map_or(0, |prefix| prefix.hash(parent, tokens))
    }

    /// Cached blocks that hold the first full blocks of `tokens`, at most `n_max`; and how many of them are idle.
    /// Takes nothing.
    pub fn find_prefix(&self, tokens: &[u32], hashes: &[BlockHash], n_max: usize) -> FoundPrefix {
        let Some(prefix) = &self.prefix else { return FoundPrefix::default() };
        let blocks = prefix.find(tokens, &hashes[..n_max.min(hashes.len())]);
        let n_idle = blocks.iter().filter(|&&block| prefix.is_idle(block)).count();
        FoundPrefix { blocks, n_idle }
    }

    /// Makes the blocks of `found` the start of an empty table. Nothing may have happened to the cache in between.
    pub fn share(&mut self, found: FoundPrefix, table: &mut BlockTable) {
        assert!(table.is_empty(), "a shared prefix is the start of a table");
        for block in found.blocks {
            self.pool.retain(block);
            if let Some(prefix) = &mut self.prefix {
                prefix.set_busy(block);
            }
            table.push(block);
        }
    }

    /// Extends `table` to hold `n_tokens`, evicting idle blocks if it must. All or nothing: `false` if there are too few.
    #[must_use]
    pub fn grow(&mut self, table: &mut BlockTable, n_tokens: usize) -> bool {
        let n_missing = blocks_for(n_tokens).saturating_sub(table.len());
        if n_missing > self.n_available() {
            return false;
        }
        for _ in 0..n_missing {
            let block = self.take().expect("availability was checked");
            table.push(block);
        }
        true
    }

    /// Makes full block `index` of `table` known to the prefix cache. If the same tokens after the same prefix are known
    /// already, the table's block is exchanged for the known one, whose keys and values are the same, bit for bit.
    pub fn register(&mut self, table: &mut BlockTable, index: usize, hash: BlockHash, tokens: &[u32]) {
        let Some(prefix) = &mut self.prefix else { return };
        let parent = index.checked_sub(1).map(|i| table.blocks()[i]);
        let block = table.blocks()[index];
        match prefix.insert(parent, hash, tokens, block) {
            prefix::Inserted::New => self.pool.retain(block),
            prefix::Inserted::Refused => {}
            prefix::Inserted::Known(known) if known == block => {}
            prefix::Inserted::Known(known) => {
                prefix.set_busy(known);
                self.pool.retain(known);
                self.pool.release(block);
                table.replace(index, known);
            }
        }
    }

    /// Takes back every block of `table`, last first, so that a prefix is evicted after what follows it.
    pub fn release(&mut self, table: &mut BlockTable) {
        for block in table.take().into_iter().rev() {
            let n_owners = self.pool.release(block);
            if let Some(prefix) = &mut self.prefix
                && n_owners == 1
                && prefix.knows(block)
            {
                prefix.set_idle(block);
            }
        }
    }

    /// Evicts every idle block; returns how many.
    pub fn drop_idle(&mut self) -> usize {
        let n_idle = self.n_idle();
        while let Some(block) = self.prefix.as_mut().and_then(PrefixCache::evict) {
            self.pool.release(block);
        }
        n_idle
    }

    /// Whether `block` may be written: one sequence holds it and the prefix cache does not know it.
    pub fn is_private(&self, block: BlockId) -> bool {
        self.pool.n_owners(block) == 1 && !self.prefix.as_ref().is_some_and(|prefix| prefix.knows(block))
    }

    /// Recounts everything from the tables of all sequences.
    ///
    /// # Errors
    /// [`IntegrityError`]: a leaked block, a block used twice, or a cache out of step with the pool.
    pub fn check_integrity<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), IntegrityError> {
        let mut n_owners = vec![0u32; self.n_total()];
        for &block in tables.flat_map(BlockTable::blocks) {
            n_owners[block as usize] += 1;
        }
        if let Some(prefix) = &self.prefix {
            prefix.check_integrity(&n_owners)?;
            prefix.blocks().for_each(|block| n_owners[block as usize] += 1);
        }
        self.pool.check_integrity(&n_owners)
    }

    fn take(&mut self) -> Option<BlockId> {
        if self.pool.n_free() == 0 {
            let block = self.prefix.as_mut()?.evict()?;
            self.pool.release(block);
        }
        self.pool.take()
    }
}

/// What [`KvCache::find_prefix`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FoundPrefix {
    /// The blocks, in order.
    pub blocks: Vec<BlockId>,
    /// How many of them no sequence holds at present: sharing them makes that many fewer available.
    pub n_idle: usize,
}

#[cfg(test)]
mod tests;
