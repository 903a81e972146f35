//! Pair merging: the heart of BPE, exact for any length of input.
//!
//! The rule, for byte-level BPE (rank = line of the merge list) and for SentencePiece (rank = order of scores)
//! alike: of all adjacent pairs that the table knows, merge the one of the lowest rank, the leftmost of equals;
//! repeat until no pair is left.
//!
//! Words are short, so a scan for the minimum is fastest there. A prompt of ten million times the same character
//! is one word too, and no cut inside it is safe: the leftmost rule carries the parity of a run from its start to
//! its end. Long inputs therefore keep the candidates in buckets, one per rank, each sorted once: in a table
//! whose merges only ever enable later ranks (all real ones) every candidate is touched a constant number of
//! times, and other tables cost a logarithm more, never a square.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use ahash::AHashMap;

/// Up to this many symbols the quadratic scan is used.
const SHORT_MAX: usize = 40;

const DEAD: u32 = u32::MAX;
const NONE: u32 = u32::MAX;

/// What a pair of symbols becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Merge {
    /// Lower ranks go first; pairs of equal rank go from left to right.
    pub(crate) rank: u32,
    /// The symbol that replaces the pair.
    pub(crate) id: u32,
}

/// All merges of a vocabulary.
#[derive(Debug, Default)]
pub(crate) struct MergeTable {
    merges: AHashMap<u64, Merge>,
}

impl MergeTable {
    pub(crate) fn with_capacity(n_merges: usize) -> Self {
        MergeTable { merges: AHashMap::with_capacity(n_merges) }
    }

    /// Adds a merge. The first of two entries for a pair wins, as in a merge list.
    pub(crate) fn insert(&mut self, left: u32, right: u32, merge: Merge) {
        self.merges.entry(key(left, right)).or_insert(merge);
    }

    fn get(&self, left: u32, right: u32) -> Option<Merge> {
        self.merges.get(&key(left, right)).copied()
    }

    /// Merges `symbols` in place until no known pair is left.
    ///
    /// Symbols must be smaller than `u32::MAX`.
    pub(crate) fn apply(&self, symbols: &mut Vec<u32>) {
        if symbols.len() <= SHORT_MAX { self.apply_short(symbols) } else { self.apply_long(symbols) }
    }

    fn apply_short(&self, symbols: &mut Vec<u32>) {
        loop {
            let mut best: Option<(usize, Merge)> = None;
            for (at, pair) in symbols.windows(2).enumerate() {
                if let Some(merge) = self.get(pair[0], pair[1])
                    && best.is_none_or(|(_, b)| merge.rank < b.rank)
                {
                    best = Some((at, merge));
                }
            }
            let Some((at, merge)) = best else { return };
            symbols[at] = merge.id;
            symbols.remove(at + 1);
        }
    }

    fn apply_long(&self, symbols: &mut Vec<u32>) {
        let mut chain = Chain::new(std::mem::take(symbols));
        let mut agenda = Agenda::default();
        for at in 1..chain.ids.len() {
            if let Some(merge) = self.get(chain.ids[at - 1], chain.ids[at]) {
                agenda.push(merge.rank, at as u32 - 1);
            }
        }
        while let Some((rank, mut bucket)) = agenda.take_lowest() {
            self.drain_bucket(rank, &mut bucket, &mut chain, &mut agenda);
            agenda.put_back(rank, bucket);
        }
        chain.ids.retain(|&id| id != DEAD);
        *symbols = chain.ids;
    }

    /// Merges the pairs of one rank from left to right, until none is left or a lower rank turns up.
    fn drain_bucket(&self, rank: u32, bucket: &mut Bucket, chain: &mut Chain, agenda: &mut Agenda) {
        while let Some(at) = bucket.pop() {
            let Some((left, right)) = chain.pair_at(at) else { continue };
            // A stale entry: its pair was merged away, and what stands there now has its own entry.
            let Some(merge) = self.get(left, right).filter(|m| m.rank == rank) else { continue };
            chain.merge(at, merge.id);
            for start in [chain.prev[at as usize], at] {
                let Some((left, right)) = chain.pair_at(start) else { continue };
                match self.get(left, right) {
                    Some(next) if next.rank == rank => bucket.push_late(start),
                    Some(next) => agenda.push(next.rank, start),
                    None => {}
                }
            }
            if agenda.lowest().is_some_and(|lowest| lowest < rank) {
                return;
            }
        }
    }
}

fn key(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// The symbols as a doubly linked list over their first positions.
struct Chain {
    ids: Vec<u32>,
    prev: Vec<u32>,
    next: Vec<u32>,
}

impl Chain {
    fn new(ids: Vec<u32>) -> Self {
        let n = ids.len() as u32;
        let prev = (0..n).map(|i| i.checked_sub(1).unwrap_or(NONE)).collect();
        let next = (1..=n).map(|i| if i == n { NONE } else { i }).collect();
        Chain { ids, prev, next }
    }

    fn pair_at(&self, at: u32) -> Option<(u32, u32)> {
        let left = *self.ids.get(at as usize)?;
        let next = *self.next.get(at as usize)?;
        (left != DEAD && next != NONE).then(|| (left, self.ids[next as usize]))
    }

    fn merge(&mut self, at: u32, id: u32) {
        let right = self.next[at as usize] as usize;
        let after = self.next[right];
        self.ids[at as usize] = id;
        self.ids[right] = DEAD;
        self.next[at as usize] = after;
        if after != NONE {
            self.prev[after as usize] = at;
        }
    }
}

/// Positions of the candidates of one rank: those known when the rank's turn came, sorted; and later ones.
#[derive(Default)]
struct Bucket {
    sorted: Vec<u32>,
    cursor: usize,
    late: BinaryHeap<Reverse<u32>>,
    pending: Vec<u32>,
}

impl Bucket {
    fn activate(&mut self) {
        if self.sorted.is_empty() {
            self.sorted = std::mem::take(&mut self.pending);
            self.sorted.sort_unstable();
        } else {
            self.late.extend(self.pending.drain(..).map(Reverse));
        }
    }

    fn push_late(&mut self, at: u32) {
        self.late.push(Reverse(at));
    }

    fn pop(&mut self) -> Option<u32> {
        let late = self.late.peek().map(|Reverse(at)| *at);
        match (self.sorted.get(self.cursor).copied(), late) {
            (Some(sorted), late) if late.is_none_or(|l| sorted <= l) => {
                self.cursor += 1;
                Some(sorted)
            }
            (_, Some(_)) => self.late.pop().map(|Reverse(at)| at),
            (_, None) => None,
        }
    }

    fn is_empty(&self) -> bool {
        self.cursor == self.sorted.len() && self.late.is_empty() && self.pending.is_empty()
    }
}

/// The buckets that wait for their turn, lowest rank first.
#[derive(Default)]
struct Agenda {
    buckets: AHashMap<u32, Bucket>,
    ranks: BinaryHeap<Reverse<u32>>,
}

impl Agenda {
    fn push(&mut self, rank: u32, at: u32) {
        let ranks = &mut self.ranks;
        let bucket = self.buckets.entry(rank).or_insert_with(|| {
            ranks.push(Reverse(rank));
            Bucket::default()
        });
        bucket.pending.push(at);
    }

    fn lowest(&self) -> Option<u32> {
        self.ranks.peek().map(|Reverse(rank)| *rank)
    }

    fn take_lowest(&mut self) -> Option<(u32, Bucket)> {
        let Reverse(rank) = self.ranks.pop()?;
        let mut bucket = self.buckets.remove(&rank)?;
        bucket.activate();
        Some((rank, bucket))
    }

    fn put_back(&mut self, rank: u32, bucket: Bucket) {
        if !bucket.is_empty() {
            self.ranks.push(Reverse(rank));
            self.buckets.insert(rank, bucket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Random merges over a small alphabet; `proper` ranks follow creation, otherwise they are shuffled or tied.
    fn table(seed: &[(u8, u8)], ranks: impl Fn(usize) -> u32) -> MergeTable {
        let mut table = MergeTable::default();
        let n_base = 3u32;
        for (i, &(a, b)) in seed.iter().enumerate() {
            let n_known = n_base + i as u32;
            let (left, right) = (u32::from(a) % n_known, u32::from(b) % n_known);
            table.insert(left, right, Merge { rank: ranks(i), id: n_known });
        }
        table
    }

    fn both(table: &MergeTable, symbols: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let (mut short, mut long) = (symbols.to_vec(), symbols.to_vec());
        table.apply_short(&mut short);
        table.apply_long(&mut long);
        (short, long)
    }

    proptest! {
        #[test]
        fn the_two_ways_agree(
            seed in prop::collection::vec((any::<u8>(), any::<u8>()), 0..40),
            symbols in prop::collection::vec(0u32..3, 0..300),
            order in 0usize..3,
        ) {
            let n = seed.len();
            // In order of creation, in reverse (a merge enables a lower rank), and with ties.
            let table = table(&seed, |i| [i, n - i, i / 4][order] as u32);
            let (short, long) = both(&table, &symbols);
            prop_assert_eq!(short, long);
        }
    }

    #[test]
    fn equal_ranks_go_from_left_to_right() {
        let mut table = MergeTable::default();
        for n in 1..=15 {
            for left in 1..=n {
                table.insert(left, n + 1 - left, Merge { rank: 7, id: n + 1 });
            }
        }
        let (short, long) = both(&table, &[1; 35]);
        assert_eq!(short, [16, 16, 3]);
        assert_eq!(long, short);
    }

    #[test]
    fn a_long_run_of_one_symbol() {
        let mut table = MergeTable::default();
        for level in 0..4 {
            table.insert(level, level, Merge { rank: level, id: level + 1 });
        }
        let mut symbols = vec![0; 1_000_003];
        table.apply(&mut symbols);
        assert_eq!(symbols.len(), 62_500 + 2);
        assert_eq!(symbols[62_499..], [4, 1, 0]);
    }
}
