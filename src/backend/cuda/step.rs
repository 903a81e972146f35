//! A step's inputs on the device: tokens, positions, slots, wanted rows, attention items and block tables, in one upload.

use super::plan::{StepSizes, items_per_token, table_blocks};
use crate::backend::{Batch, SeqSpan};
use playhouse_cuda::CudaError;
use playhouse_cuda::arena::{Arena, Buffer};
use playhouse_cuda::gpu::Gpu;
use playhouse_cuda::kernels::Kernels;
use playhouse_cuda::launch::attention::{DECODE_ROWS, Heads, Item, NO_SLOT, PREFILL_ROWS, SPLIT};
use playhouse_cuda::launch::feed::{CHOSEN, Piece, feed};
use playhouse_cuda::pinned::Pinned;
use playhouse_cuda::stream::Event;

/// The inputs of the step in progress, and the memory that every step uses.
pub(super) struct StepInputs {
    device: Buffer<u32>,
    /// The device may still read one while the host writes the next.
    pinned: [Pinned<u32>; 2],
    /// It has read it.
    read: [Event; 2],
    turn: usize,
    pub(super) now: Inputs,
}

/// Where the inputs of a step are.
#[derive(Clone)]
pub(super) struct Inputs {
    /// Rows that ops compute: the tokens, or more with padding.
    pub(super) n_tokens: usize,
    /// Rows of logits.
    pub(super) n_rows: usize,
    /// Whether the rows of logits are all tokens in order.
    pub(super) all_rows: bool,
    pub(super) tokens: Buffer<u32>,
    pub(super) positions: Buffer<u32>,
    pub(super) slots: Buffer<u32>,
    pub(super) rows: Buffer<u32>,
    pub(super) decode_items: Buffer<i32>,
    pub(super) n_decode_items: usize,
    pub(super) max_splits: usize,
    pub(super) prefill_items: Buffer<i32>,
    pub(super) n_prefill_items: usize,
    pub(super) tables: Buffer<u32>,
}

/// The shape of a step that can be recorded: one token of each of `n` sequences that see at most `n_splits` splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Bucket {
    pub(super) n: usize,
    pub(super) n_splits: usize,
}

/// Numbers of sequences that steps are padded to.
const BUCKETS: [usize; 20] = [1, 2, 3, 4, 6, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 384, 512];

impl Bucket {
    /// The bucket of a batch that decodes one token of each sequence and wants all logits; `None` for others, or where it does
    /// not fit into `max_n` rows.
    pub(super) fn of(batch: &Batch, max_n: usize, max_splits: usize) -> Option<Bucket> {
        let n = batch.tokens.len();
        let one_each = batch.spans.len() == n && batch.spans.iter().all(|s| s.n_tokens == 1);
        let all_rows =
            batch.logit_rows.len() == n && batch.logit_rows.iter().enumerate().all(|(i, r)| *r as usize == i);
        if n == 0 || n > max_n || !one_each || !all_rows {
            return None;
        }
        let padded = BUCKETS.into_iter().find(|b| *b >= n)?.min(max_n);
        let n_splits = most_splits(batch.spans.iter()).next_power_of_two().min(max_splits);
        Some(Bucket { n: padded, n_splits })
    }
}

fn most_splits<'a>(spans: impl Iterator<Item = &'a SeqSpan>) -> usize {
    spans.map(|s| s.kv_len.div_ceil(SPLIT)).max().unwrap_or(1).max(1)
}

impl StepInputs {
    /// Room for `len` elements, and a first step of no tokens.
    pub(super) fn new(gpu: &Gpu, arena: &Arena, len: usize) -> Result<Self, CudaError> {
        let device: Buffer<u32> = arena.alloc(len.max(1), "inputs of a step")?;
        let pinned = [Pinned::new(gpu, len.max(1))?, Pinned::new(gpu, len.max(1))?];
        let read = [Event::new(gpu)?, Event::new(gpu)?];
        let now = Inputs::at(&device, &StepSizes::default(), 1);
        Ok(Self { device, pinned, read, turn: 0, now })
    }

    /// Elements that there is room for.
    pub(super) fn len(&self) -> usize {
        self.device.len()
    }

    /// Uploads a batch, padded to a bucket if there is one, and what else the step needs. Tokens that the step before chose are taken from
    /// `chosen`, where it puts them.
    pub(super) fn upload(
        &mut self,
        kernels: &Kernels,
        arrangement: &Arrangement<'_>,
        others: &[Piece<'_>],
        chosen: Option<&Buffer<u32>>,
    ) -> Result<(), CudaError> {
        let sizes = arrangement.sizes;
        self.turn = 1 - self.turn;
        let (pinned, read) = (&mut self.pinned[self.turn], &self.read[self.turn]);
        read.synchronize()?;
        arrangement.write(&mut pinned[..sizes.len()]);
        if chosen.is_none() && !arrangement.batch.feeds.is_empty() {
            return Err(super::misuse("a step", "tokens that the host knows", "feeds, and no sampler"));
        }
        let inputs = (&*pinned, &self.device, sizes.len());
        feed(kernels, inputs, sizes.n_tokens, chosen.unwrap_or(&self.device), others)?;
        read.record(None)?;
        let mut now = Inputs::at(&self.device, &sizes, arrangement.max_splits);
        let rows = &arrangement.batch.logit_rows;
        now.all_rows = rows.len() == now.n_tokens && rows.iter().enumerate().all(|(i, r)| *r as usize == i)
            || arrangement.bucket.is_some();
        self.now = now;
        Ok(())
    }
}

impl Inputs {
    fn at(device: &Buffer<u32>, sizes: &StepSizes, max_splits: usize) -> Self {
        let o = sizes.offsets();
        let part = |i: usize| device.slice(o[i].min(device.len())..o[i + 1].min(device.len()));
        Self {
            n_tokens: sizes.n_tokens,
            n_rows: sizes.n_rows,
            all_rows: false,
            tokens: part(0),
            positions: part(1),
            slots: part(2),
            rows: part(3),
            decode_items: part(4).cast(),
            n_decode_items: sizes.n_decode_items,
            max_splits,
            prefill_items: part(5).cast(),
            n_prefill_items: sizes.n_prefill_items,
            tables: part(6),
        }
    }
}

/// How a batch lies in the upload.
pub(super) struct Arrangement<'a> {
    batch: &'a Batch,
    heads: Heads,
    bucket: Option<Bucket>,
    /// Most sequences that are decoded with split attention; further ones are treated as prompts.
    max_decode: usize,
    pub(super) sizes: StepSizes,
    max_splits: usize,
}

impl<'a> Arrangement<'a> {
    pub(super) fn new(batch: &'a Batch, heads: Heads, bucket: Option<Bucket>, max_decode: usize) -> Self {
        let mut this = Self { batch, heads, bucket, max_decode, sizes: StepSizes::default(), max_splits: 1 };
        let n_items = |rows: usize, span: &SeqSpan| Item::cut(0, span.n_tokens, 0, heads, rows).count();
        this.sizes = match bucket {
            Some(Bucket { n, n_splits }) => StepSizes {
                n_tokens: n,
                n_rows: n,
                n_decode_items: n * items_per_token(heads),
                n_prefill_items: 0,
                n_table: n * table_blocks(n_splits),
            },
            None => StepSizes {
                n_tokens: batch.tokens.len(),
                n_rows: batch.logit_rows.len(),
                n_decode_items: this.decoding().map(|(_, s)| n_items(DECODE_ROWS, s)).sum(),
                n_prefill_items: this.prompts().map(|(_, s)| n_items(PREFILL_ROWS, s)).sum(),
                n_table: batch.spans.iter().map(|s| s.blocks.len()).sum(),
            },
        };
        this.max_splits = bucket.map_or_else(|| most_splits(this.decoding().map(|(_, s)| s)), |b| b.n_splits);
        this
    }

    /// Spans of one token, with their index.
    fn decoding(&self) -> impl Iterator<Item = (usize, &'a SeqSpan)> {
        self.batch.spans.iter().enumerate().filter(|(_, s)| s.n_tokens == 1).take(self.max_decode)
    }

    /// All other spans.
    fn prompts(&self) -> impl Iterator<Item = (usize, &'a SeqSpan)> {
        let last = self.decoding().last().map_or(0, |(i, _)| i + 1);
        self.batch.spans.iter().enumerate().filter(move |(i, s)| s.n_tokens > 1 || *i >= last)
    }

    /// First element of a span's block table.
    fn tables(&self) -> Vec<usize> {
        match self.bucket {
            Some(Bucket { n_splits, .. }) => (0..self.batch.spans.len()).map(|i| i * table_blocks(n_splits)).collect(),
            None => {
                self.batch.spans.iter().scan(0, |at, s| Some(std::mem::replace(at, *at + s.blocks.len()))).collect()
            }
        }
    }

    fn write(&self, out: &mut [u32]) {
        let (batch, o) = (self.batch, self.sizes.offsets());
        let mut put = |section: usize, values: &[u32], padding: u32| {
            let section = &mut out[o[section]..o[section + 1]];
            section[..values.len()].copy_from_slice(values);
            section[values.len()..].fill(padding);
        };
        put(0, &batch.tokens, 0);
        put(1, &batch.positions, 0);
        put(2, &batch.slots, NO_SLOT);
        put(3, &batch.logit_rows, 0);
        let tables = self.tables();
        let items = |spans: &mut dyn Iterator<Item = (usize, &'a SeqSpan)>, rows: usize| -> Vec<u32> {
            let cut = |(i, s): (usize, &SeqSpan)| Item::cut(s.first, s.n_tokens, tables[i], self.heads, rows);
            spans.flat_map(cut).flat_map(Item::words).map(i32::cast_unsigned).collect()
        };
        put(4, &items(&mut self.decoding(), DECODE_ROWS), 0);
        put(5, &items(&mut self.prompts(), PREFILL_ROWS), 0);
        put(6, &[], 0);
        for feed in &batch.feeds {
            out[o[0] + feed.token as usize] = CHOSEN | feed.row;
        }
        let all_tables = &mut out[o[6]..o[7]];
        for (at, span) in tables.iter().zip(&batch.spans) {
            // A block beyond those that the step sees is of no use, and a bucket has no room for it.
            let n = span.blocks.len().min(all_tables.len() - at).min(self.table_room(span));
            all_tables[*at..at + n].copy_from_slice(&span.blocks[..n]);
        }
    }

    fn table_room(&self, span: &SeqSpan) -> usize {
        self.bucket.map_or(span.blocks.len(), |b| table_blocks(b.n_splits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Feed;

    const HEADS: Heads = Heads { n_heads: 14, n_kv_heads: 2, head_dim: 64 };

    fn span(first: usize, n_tokens: usize, kv_len: usize) -> SeqSpan {
        let blocks = (0..kv_len.div_ceil(32)).map(|b| (first * 100 + b) as u32).collect();
        SeqSpan { first, n_tokens, kv_len, blocks }
    }

    fn batch(spans: Vec<SeqSpan>) -> Batch {
        let n: usize = spans.iter().map(|s| s.n_tokens).sum();
        let ids: Vec<u32> = (0..n as u32).collect();
        Batch { tokens: ids.clone(), positions: ids.clone(), slots: ids.clone(), spans, logit_rows: ids, feeds: vec![] }
    }

    #[test]
    fn prompts_and_single_tokens_go_to_kernels_of_their_own() {
        let batch = batch(vec![span(0, 1, 40), span(1, 20, 20), span(21, 1, 300)]);
        let all = Arrangement::new(&batch, HEADS, None, 8);
        assert_eq!((all.sizes.n_decode_items, all.sizes.n_prefill_items), (2, 3)); // 20 x 7 rows in pieces of 64
        assert_eq!((all.sizes.n_table, all.max_splits), (2 + 1 + 10, 3));
        let mut out = vec![7; all.sizes.len()];
        all.write(&mut out);
        let o = all.sizes.offsets();
        assert_eq!(out[o[4]..o[4] + 8], [0, 0, 7, 0, 21, 0, 7, 3]);
        assert_eq!(out[o[5]..o[5] + 12], [1, 0, 140, 2, 1, 64, 140, 2, 1, 128, 140, 2]);
        assert_eq!(out[o[6]..o[6] + 4], [0, 1, 100, 2100]);
    }

    #[test]
    fn a_token_that_is_not_known_is_where_it_will_be_chosen() {
        let mut batch = batch(vec![span(0, 1, 10), span(1, 1, 10), span(2, 3, 3)]);
        batch.feeds = vec![Feed { token: 1, row: 4 }];
        let all = Arrangement::new(&batch, HEADS, None, 8);
        let mut out = vec![7; all.sizes.len()];
        all.write(&mut out);
        assert_eq!(out[..5], [0, CHOSEN | 4, 2, 3, 4]);
    }

    #[test]
    fn more_single_tokens_than_there_is_room_for_are_prompts() {
        let batch = batch((0..5).map(|i| span(i, 1, 10)).collect());
        let all = Arrangement::new(&batch, HEADS, None, 3);
        assert_eq!((all.sizes.n_decode_items, all.sizes.n_prefill_items), (3, 2));
    }

    #[test]
    fn a_bucket_pads_with_rows_that_write_nothing() {
        let batch = batch(vec![span(0, 1, 10), span(1, 1, 10), span(2, 1, 200), span(3, 1, 10), span(4, 1, 10)]);
        let bucket = Bucket::of(&batch, 64, 100).expect("a decoding batch");
        assert_eq!(bucket, Bucket { n: 6, n_splits: 2 });
        let all = Arrangement::new(&batch, HEADS, Some(bucket), 64);
        let mut out = vec![7; all.sizes.len()];
        all.write(&mut out);
        let o = all.sizes.offsets();
        assert_eq!(out[o[2]..o[2] + 6], [0, 1, 2, 3, 4, NO_SLOT]);
        assert_eq!(out[o[4] + 20..o[4] + 24], [0; 4], "an item of no rows");
        assert_eq!(out[o[6] + 16..o[6] + 23], [200, 201, 202, 203, 204, 205, 206]);
        assert_eq!(Bucket::of(&batch, 4, 100), None);
        assert_eq!(Bucket::of(&batch, 5, 1), Some(Bucket { n: 5, n_splits: 1 }));
    }
}
