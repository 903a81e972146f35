// Attention for spans of few tokens: a warp has up to 16 rows of one kv head and one split of 128 positions; attention_merge
// adds the splits in order.   q, out, caches: attention.cuh
// Grid (n_items, NKV, max_splits), block 32, shared n_stages stages.   Bound by: reading the cache once.
// With 2 stages a whole split is in flight at once; with 1 its tiles come one by one, and twice as many warps share a multiprocessor: where
// there are many, they hide each other's waits.
// A split that its rows do not see returns at once, so that one grid (and one captured graph) serves every length.
// Reference: f64 softmax, rel err <= 2^-9; bit for bit attention_prefill.cu.
#include "attention.cuh"

static_assert(SPLIT_TILES == 2, "a split in flight has two stages");

template <class KV, int HS> DEVICE void attention_decode(const AttentionArgs &args, int n_stages) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t tiles = shared_address(shared);
    const AttentionItem item = args.items[blockIdx.x];
    const int kv_head = blockIdx.y, split = blockIdx.z, lane = threadIdx.x;
    int first, end, high;
    item_range(args, item, 16, first, end, high);
    wait_for_predecessor();
    if (item.n_rows <= item.first_row) return; // a slot of the batch without a sequence
    first = max(first, split * SPLIT_TILES);
    end = min(end, (split + 1) * SPLIT_TILES);
    if (first >= end) return;

    const unsigned *table = args.tables + item.table;
    const auto stage_of = [&](int tile) { return tiles + (n_stages == 1 ? 0 : tile - first) * KV::template STAGE<HS>; };
    const auto bring = [&](int tile) {
        if (tile < end) KV::template copy<HS, 32>(stage_of(tile), args, table, tile, high + 1, kv_head);
        copy_async_commit();
    };
    bring(first);
    if (n_stages == SPLIT_TILES) bring(first + 1);
    Rows<HS> rows;
    load_rows<KV, HS>(rows, args, item, item.first_row, kv_head, lane);
    clear(rows);
#pragma unroll 1
    for (int tile = first; tile < end; tile++) {
        if (tile == first && n_stages == SPLIT_TILES) copy_async_wait<1>(); else copy_async_wait<0>();
        __syncwarp();
        attend<KV, HS>(rows, args, stage_of(tile), tile, lane);
        __syncwarp(); // every lane has read the stage
        if (n_stages == 1 && tile + 1 < end) bring(tile + 1);
    }
    float *out = args.partial +
                 ((static_cast<size_t>(blockIdx.x) * args.n_kv_heads + kv_head) * args.max_splits + split) * args.partial_rows * (HS + 2);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (lane / 4 + 8 * r >= args.partial_rows) break;
        float *row = out + (lane / 4 + 8 * r) * (HS + 2);
        if (lane % 4 == 0) row[HS] = rows.m[r], row[HS + 1] = rows.l[r];
#pragma unroll
        for (int j = 0; j < HS / 8; j++) {
            row[KV::o_at(j, 0, lane % 4)] = rows.o[j][2 * r];
            row[KV::o_at(j, 1, lane % 4)] = rows.o[j][2 * r + 1];
        }
    }
}

// Merges the splits of one row. Grid (n_items, NKV, partial_rows), block 32.
template <int HS> DEVICE void attention_merge(const AttentionArgs &args) {
    const AttentionItem item = args.items[blockIdx.x];
    const int kv_head = blockIdx.y, group = args.n_heads / args.n_kv_heads, lane = threadIdx.x;
    const int row = item.first_row + blockIdx.z;
    int first, end, high;
    item_range(args, item, 16, first, end, high);
    wait_for_predecessor();
    if (row >= item.n_rows) return;
    const float *in = args.partial + (static_cast<size_t>(blockIdx.x) * args.n_kv_heads + kv_head) * args.max_splits * args.partial_rows * (HS + 2) +
                      blockIdx.z * (HS + 2);
    constexpr int PER_LANE = (HS + WARP - 1) / WARP, AHEAD = 8; // splits that are loaded at once
    const int last_split = (end - 1) / SPLIT_TILES;
    float m = -CUDART_INF_F, l = 0.0f, o[PER_LANE] = {};
    for (int split = first / SPLIT_TILES; split <= last_split; split += AHEAD) {
        float m2[AHEAD], l2[AHEAD], o2[AHEAD][PER_LANE];
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            const float *part = in + static_cast<size_t>(split + s) * args.partial_rows * (HS + 2);
            const bool valid = split + s <= last_split;
            m2[s] = valid ? part[HS] : -CUDART_INF_F;
            l2[s] = valid ? part[HS + 1] : 0.0f;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) o2[s][i] = valid && lane + WARP * i < HS ? part[lane + WARP * i] : 0.0f;
        }
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            if (m2[s] == -CUDART_INF_F) continue; // nothing there that this row sees
            float keep, take;
            merge(m, l, m2[s], l2[s], keep, take);
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) o[i] = merged(o[i], o2[s][i], keep, take);
        }
    }
    const int head = kv_head * group + row % group;
    const float factor = finish_factor(m, l, args.sinks, head);
    half *out = args.out + static_cast<size_t>(item.first_token + row / group) * args.out_stride + head * HS;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int d = lane + WARP * i;
        if (d < HS) out[d] = to_half(o[i] * factor);
    }
}

#define ATTENTION_DECODE(HS)                                                                                           \
    extern "C" __global__ void __launch_bounds__(32) attention_decode_##HS(const AttentionArgs args, int n_stages) {   \
        attention_decode<HalfKv, HS>(args, n_stages);                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32) attention_decode_q8_##HS(const AttentionArgs args, int n_stages) { \
        attention_decode<ByteKv, HS>(args, n_stages);                                                                  \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(32) attention_merge_##HS(const AttentionArgs args) {                  \
        attention_merge<HS>(args);                                                                                     \
    }
ATTENTION_DECODE(16)
ATTENTION_DECODE(32)
ATTENTION_DECODE(64)
ATTENTION_DECODE(96)
ATTENTION_DECODE(128)
