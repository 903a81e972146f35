//! Blocks are neither lost nor handed out twice; the prefix cache serves what was asked for and nothing else.

use super::*;

fn tokens(n_blocks: usize, salt: u32) -> Vec<u32> {
    (0..n_blocks * BLOCK_TOKENS).map(|i| i as u32 * 7 + salt).collect()
}

fn hashes(kv: &KvCache, tokens: &[u32]) -> Vec<BlockHash> {
    let mut hashes: Vec<BlockHash> = Vec::new();
    for block in tokens.chunks_exact(BLOCK_TOKENS) {
        hashes.push(kv.hash(hashes.last().copied(), block));
    }
    hashes
}

/// Puts `tokens` into a table of its own and registers every full block.
fn fill(kv: &mut KvCache, tokens: &[u32]) -> BlockTable {
    let mut table = BlockTable::default();
    assert!(kv.grow(&mut table, tokens.len()));
    let hashes = hashes(kv, tokens);
    for (index, (hash, block)) in hashes.iter().zip(tokens.chunks_exact(BLOCK_TOKENS)).enumerate() {
        kv.register(&mut table, index, *hash, block);
    }
    table
}

fn find(kv: &KvCache, tokens: &[u32]) -> FoundPrefix {
    kv.find_prefix(tokens, &hashes(kv, tokens), usize::MAX)
}

#[test]
fn blocks_come_back() {
    let mut kv = KvCache::new(4, false);
    let mut table = BlockTable::default();
    assert!(kv.grow(&mut table, 3 * BLOCK_TOKENS + 1));
    assert_eq!(table.blocks(), [0, 1, 2, 3]);
    assert_eq!(table.slot(BLOCK_TOKENS + 5), BLOCK_TOKENS as u32 + 5);
    assert_eq!(kv.n_available(), 0);
    assert!(!kv.grow(&mut table, 4 * BLOCK_TOKENS + 1));
    assert_eq!(table.len(), 4, "a refused growth takes nothing");
    kv.check_integrity([&table].into_iter()).unwrap();
    kv.release(&mut table);
    assert_eq!(kv.n_free(), 4);
    kv.check_integrity([].into_iter()).unwrap();
}

#[test]
fn released_full_blocks_are_found_again_and_evicted_tail_first() {
    let mut kv = KvCache::new(4, true);
    let text = tokens(3, 1);
    let mut table = fill(&mut kv, &text);
    kv.release(&mut table);
    assert_eq!((kv.n_free(), kv.n_idle()), (1, 3));
    assert_eq!(find(&kv, &text), FoundPrefix { blocks: vec![0, 1, 2], n_idle: 3 });

    let mut other = BlockTable::default();
    assert!(kv.grow(&mut other, 2 * BLOCK_TOKENS));
    assert_eq!(find(&kv, &text).blocks, [0, 1], "the tail went first");
    kv.check_integrity([&other].into_iter()).unwrap();
    assert!(kv.grow(&mut other, 4 * BLOCK_TOKENS));
    assert_eq!(find(&kv, &text).blocks, [0u32; 0]);
    kv.check_integrity([&other].into_iter()).unwrap();
}

#[test]
fn least_recently_used_goes_first() {
    let mut kv = KvCache::new(2, true);
    let (old, young) = (tokens(1, 1), tokens(1, 2));
    let mut first = fill(&mut kv, &old);
    let mut second = fill(&mut kv, &young);
    kv.release(&mut first);
    kv.release(&mut second);
    let mut again = BlockTable::default();
    let found = find(&kv, &old);
    kv.share(found, &mut again);
    kv.release(&mut again);
    assert!(kv.grow(&mut again, 1));
    assert_eq!(find(&kv, &old).blocks.len(), 1, "used last");
    assert_eq!(find(&kv, &young).blocks.len(), 0, "evicted");
}

#[test]
fn the_same_content_computed_twice_is_kept_once() {
    let mut kv = KvCache::new(4, true);
    let text = tokens(2, 9);
    let first = fill(&mut kv, &text);
    let second = fill(&mut kv, &text);
    assert_eq!(first, second);
    assert_eq!(kv.n_free(), 2);
    kv.check_integrity([&first, &second].into_iter()).unwrap();
}

#[test]
fn a_prefix_in_use_is_not_evicted() {
    let mut kv = KvCache::new(3, true);
    let text = tokens(2, 3);
    let mut writer = fill(&mut kv, &text);
    let mut reader = BlockTable::default();
    let found = find(&kv, &text[..BLOCK_TOKENS]);
    kv.share(found, &mut reader);
    kv.release(&mut writer);
    let mut other = BlockTable::default();
    assert!(!kv.grow(&mut other, 3 * BLOCK_TOKENS));
    assert!(kv.grow(&mut other, 2 * BLOCK_TOKENS));
    assert!(!other.blocks().contains(&reader.blocks()[0]));
    kv.check_integrity([&reader, &other].into_iter()).unwrap();
}

#[test]
fn colliding_hashes_never_serve_other_tokens() {
    let mut kv = KvCache::with_hash(8, |_, _| 42);
    let (one, other) = (tokens(2, 1), tokens(2, 5));
    let mut first = fill(&mut kv, &one);
    let mut second = fill(&mut kv, &other);
    assert_eq!(find(&kv, &one).blocks.len(), 1, "the first block has the hash, the second is refused");
    assert_eq!(find(&kv, &other).blocks.len(), 0);
    kv.check_integrity([&first, &second].into_iter()).unwrap();
    kv.release(&mut first);
    kv.release(&mut second);
    kv.check_integrity([].into_iter()).unwrap();
    assert_eq!((kv.n_free(), kv.n_idle()), (7, 1));
}

#[test]
fn the_same_block_after_another_prefix_is_another_block() {
    // A hash that looks at the block alone, so that only the comparison of parents can tell the two apart.
    let mut kv = KvCache::with_hash(8, |_, tokens| u64::from(tokens[0]));
    let one = tokens(2, 1);
    let other = [tokens(1, 77), one[BLOCK_TOKENS..].to_vec()].concat();
    let first = fill(&mut kv, &one);
    let second = fill(&mut kv, &other);
    assert_ne!(first.blocks()[1], second.blocks()[1]);
    assert_eq!(find(&kv, &one).blocks, first.blocks());
    assert_eq!(find(&kv, &other).blocks, second.blocks()[..1]);
    kv.check_integrity([&first, &second].into_iter()).unwrap();
}

#[test]
fn integrity_check_sees_leaks_and_double_use() {
    let mut kv = KvCache::new(2, true);
    let mut table = BlockTable::default();
    assert!(kv.grow(&mut table, 1));
    assert_eq!(
        kv.check_integrity([].into_iter()),
        Err(IntegrityError::Owners { block: 0, counted: 1, found: 0 }),
        "nobody admits to holding it: a leak"
    );
    assert_eq!(
        kv.check_integrity([&table, &table].into_iter()),
        Err(IntegrityError::Owners { block: 0, counted: 1, found: 2 }),
        "two hold what one was given"
    );
}

#[test]
fn dropping_the_cache_frees_idle_blocks_only() {
    let mut kv = KvCache::new(4, true);
    let held = fill(&mut kv, &tokens(1, 1));
    let mut idle = fill(&mut kv, &tokens(2, 50));
    kv.release(&mut idle);
    assert_eq!(kv.drop_idle(), 2);
    assert_eq!(kv.n_free(), 3);
    kv.check_integrity([&held].into_iter()).unwrap();
}
