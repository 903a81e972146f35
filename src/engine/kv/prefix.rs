//! Finds full blocks by what they hold: a chain of hashes from the start of the sequence.
//!
//! The hash only finds a candidate. A candidate is served if its 32 tokens are equal and the block before it is the very
//! block that was matched for the tokens before; by induction the whole prefix is equal, so that a collision can cost a
//! hit and never give wrong keys.
//!
//! A block that follows another is held only by sequences that hold both, and tables are released last block first: of
//! two idle blocks the one that follows is always less recently used, and is evicted first. No entry is ever orphaned.

use super::{BlockId, IntegrityError};
use std::collections::{BTreeMap, HashMap};

/// Hash of a block's tokens and of everything before them.
pub type BlockHash = u64;

/// Hash of the tokens of a full block that follows `parent`.
pub type ChainHash = fn(parent: Option<BlockHash>, tokens: &[u32]) -> BlockHash;

/// The hash in use: 64 bits, multiply and xor-shift per token (the finaliser of SplitMix64, Steele et al. 2014).
pub fn chain_hash(parent: Option<BlockHash>, tokens: &[u32]) -> BlockHash {
    let start = parent.unwrap_or(0x9e37_79b9_7f4a_7c15);
    tokens.iter().fold(start, |hash, &token| {
        let mut mixed = hash.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ u64::from(token);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    })
}

/// Known full blocks, and which of them are idle.
#[derive(Debug)]
pub struct PrefixCache {
    hash: ChainHash,
    by_hash: HashMap<BlockHash, BlockId>,
    entries: HashMap<BlockId, Entry>,
    /// Idle blocks, least recently used first.
    idle: BTreeMap<u64, BlockId>,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    hash: BlockHash,
    parent: Option<BlockId>,
    tokens: Box<[u32]>,
    /// Key in `PrefixCache::idle`, if no sequence holds the block.
    idle_since: Option<u64>,
}

/// What [`PrefixCache::insert`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inserted {
    /// The block is known now.
    New,
    /// This block already holds the same tokens after the same prefix.
    Known(BlockId),
    /// Another content has the same hash; it was there first.
    Refused,
}

impl PrefixCache {
    /// Empty.
    pub fn new(hash: ChainHash) -> Self {
        Self { hash, by_hash: HashMap::new(), entries: HashMap::new(), idle: BTreeMap::new(), clock: 0 }
    }

    /// The hash of a full block after `parent`.
    pub fn hash(&self, parent: Option<BlockHash>, tokens: &[u32]) -> BlockHash {
        (self.hash)(parent, tokens)
    }

    /// The longest run of known blocks for the start of `tokens`, whose full blocks hash to `hashes`.
    pub fn find(&self, tokens: &[u32], hashes: &[BlockHash]) -> Vec<BlockId> {
        let mut found: Vec<BlockId> = Vec::new();
        for (tokens, &hash) in tokens.chunks_exact(crate::backend::BLOCK_TOKENS).zip(hashes) {
            match self.lookup(found.last().copied(), hash, tokens) {
                Some(block) => found.push(block),
                None => break,
            }
        }
        found
    }

    /// Idle blocks.
    pub fn n_idle(&self) -> usize {
        self.idle.len()
    }

    /// Whether the block is known and no sequence holds it.
    pub fn is_idle(&self, block: BlockId) -> bool {
        self.entries.get(&block).is_some_and(|entry| entry.idle_since.is_some())
    }

    /// Whether the block is known.
    pub fn knows(&self, block: BlockId) -> bool {
        self.entries.contains_key(&block)
    }

    /// All known blocks, in no particular order.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.entries.keys().copied()
    }

    pub(super) fn insert(
        &mut self,
        parent: Option<BlockId>,
        hash: BlockHash,
        tokens: &[u32],
        block: BlockId,
    ) -> Inserted {
        if let Some(known) = self.lookup(parent, hash, tokens) {
            return Inserted::Known(known);
        }
        // After a refused block nothing that follows it can be found, so nothing that follows it is kept.
        if self.by_hash.contains_key(&hash) || parent.is_some_and(|parent| !self.knows(parent)) {
            return Inserted::Refused;
        }
        self.by_hash.insert(hash, block);
        self.entries.insert(block, Entry { hash, parent, tokens: tokens.into(), idle_since: None });
        Inserted::New
    }

    pub(super) fn set_idle(&mut self, block: BlockId) {
        self.clock += 1;
        let entry = self.entries.get_mut(&block).expect("only a known block can be idle");
        assert!(entry.idle_since.replace(self.clock).is_none(), "block {block} is idle already");
        self.idle.insert(self.clock, block);
    }

    pub(super) fn set_busy(&mut self, block: BlockId) {
        if let Some(since) = self.entries.get_mut(&block).and_then(|entry| entry.idle_since.take()) {
            self.idle.remove(&since);
        }
    }

    /// Forgets the least recently used idle block; its reference is the caller's to release.
    pub(super) fn evict(&mut self) -> Option<BlockId> {
        let (_, block) = self.idle.pop_first()?;
        let entry = self.entries.remove(&block).expect("idle blocks are known");
        self.by_hash.remove(&entry.hash);
        Some(block)
    }

    pub(super) fn check_integrity(&self, held: &[u32]) -> Result<(), IntegrityError> {
        for (&block, entry) in &self.entries {
            let held = held[block as usize];
            let idle = entry.idle_since.is_some_and(|since| self.idle.get(&since) == Some(&block));
            if (held == 0) != idle || idle != entry.idle_since.is_some() {
                return Err(IntegrityError::Idle { block, held, idle });
            }
            if let Some(parent) = entry.parent
                && !self.knows(parent)
            {
                return Err(IntegrityError::Orphan { block, parent });
            }
        }
        Ok(())
    }

    fn lookup(&self, parent: Option<BlockId>, hash: BlockHash, tokens: &[u32]) -> Option<BlockId> {
        let block = *self.by_hash.get(&hash)?;
        let entry = &self.entries[&block];
        (entry.parent == parent && *entry.tokens == *tokens).then_some(block)
    }
}
