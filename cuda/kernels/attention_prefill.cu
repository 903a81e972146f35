// Attention for spans of many tokens: a block of 4 warps has 64 rows of one kv head and walks all their tiles.
// q, out, caches: attention.cuh   Grid (n_items, NKV), block 128, shared: two stages, and merged sums [2][SHARED][128] float2.
// Bound by: the tensor cores.   Reference: f64 softmax, rel err <= 2^-9.
#include "attention.cuh"

constexpr int WARPS = 4; // of 16 rows each

// Eights of a row's merged sums in shared memory. They are touched once a split: not worth the registers, of which the rows take
// most. At a head size of 128 in f16 a quarter stays there, so that a block fits the 99 KiB of the smaller chips.
constexpr int SMALL_CHIPS = 99 * 1024; // sm_86, sm_89, sm_120
template <class KV, int HS> constexpr int SHARED = 2 * KV::template STAGE<HS> + HS * 256 <= SMALL_CHIPS ? HS / 8 : HS / 8 * 3 / 4;
static_assert(2 * HalfKv::STAGE<128> + SHARED<HalfKv, 128> * 2048 <= SMALL_CHIPS, "fits");
static_assert(SHARED<HalfKv, 128> == 12 && SHARED<HalfKv, 96> == 12 && SHARED<ByteKv, 128> == 16, "as launch/attention.rs has it");

template <class KV, int HS> DEVICE void attention_prefill(const AttentionArgs &args) {
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t tiles = shared_address(shared);
    // The last rows of a prompt see the most: they begin first, so that none of them is alone at the end.
    const AttentionItem item = args.items[gridDim.x - 1 - blockIdx.x];
    const int kv_head = blockIdx.y, group = args.n_heads / args.n_kv_heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned *table = args.tables + item.table;
    int first, end, high;
    item_range(args, item, 16 * WARPS, first, end, high);
    wait_for_predecessor();

    Rows<HS> rows;
    load_rows<KV, HS>(rows, args, item, item.first_row + 16 * warp, kv_head, lane);
    clear(rows);
    float m[2] = {-CUDART_INF_F, -CUDART_INF_F}, l[2] = {};
    float2 kept[2][HS / 8 - SHARED<KV, HS> + 1] = {};
    float2 *merged_sums = reinterpret_cast<float2 *>(shared + 2 * KV::template STAGE<HS>) + threadIdx.x;
    auto total = [&](int r, int j) -> float2 & {
        return j < SHARED<KV, HS> ? merged_sums[(r * SHARED<KV, HS> + j) * 32 * WARPS] : kept[r][j - SHARED<KV, HS>];
    };
    for (int i = 0; i < 2 * SHARED<KV, HS>; i++) merged_sums[i * 32 * WARPS] = make_float2(0.0f, 0.0f);

    auto stage_of = [&](int tile) { return tiles + (tile & 1) * KV::template STAGE<HS>; };
    auto copy = [&](int tile) { KV::template copy<HS, 32 * WARPS>(stage_of(tile), args, table, tile, high + 1, kv_head); };
    copy(first);
    copy_async_commit();
    for (int tile = first; tile < end; tile++) {
        if (tile + 1 < end) copy(tile + 1);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        attend<KV, HS>(rows, args, stage_of(tile), tile, lane);
        if (tile % SPLIT_TILES == SPLIT_TILES - 1 || tile + 1 == end) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (rows.m[r] == -CUDART_INF_F) continue;
                float keep, take;
                merge(m[r], l[r], rows.m[r], rows.l[r], keep, take);
#pragma unroll
                for (int j = 0; j < HS / 8; j++) {
                    float2 &sum = total(r, j);
                    sum = make_float2(merged(sum.x, rows.o[j][2 * r], keep, take), merged(sum.y, rows.o[j][2 * r + 1], keep, take));
                }
            }
            clear(rows);
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = item.first_row + 16 * warp + lane / 4 + 8 * r;
        if (row >= item.n_rows) continue;
        const int head = kv_head * group + row % group;
        const float factor = finish_factor(m[r], l[r], args.sinks, head);
        half *out = args.out + static_cast<size_t>(item.first_token + row / group) * args.out_stride + head * HS;
#pragma unroll
        for (int j = 0; j < HS / 8; j++) {
            const float2 sum = total(r, j);
            out[KV::o_at(j, 0, lane % 4)] = to_half(sum.x * factor);
            out[KV::o_at(j, 1, lane % 4)] = to_half(sum.y * factor);
        }
    }
}

#define ATTENTION_PREFILL(HS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) attention_prefill_##HS(const AttentionArgs args) {               \
        attention_prefill<HalfKv, HS>(args);                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) attention_prefill_q8_##HS(const AttentionArgs args) {            \
        attention_prefill<ByteKv, HS>(args);                                                                           \
    }
ATTENTION_PREFILL(16)
ATTENTION_PREFILL(32)
ATTENTION_PREFILL(64)
ATTENTION_PREFILL(96)
ATTENTION_PREFILL(128)
