// Attention for spans of many tokens: a block of 4 warps has 64 rows of one kv head and walks all their tiles.
// q, out, caches: attention.cuh   Grid (n_items, NKV), block 128, shared: two stages, and merged sums [2][SHARED][128] float2.
// Bound by: the tensor cores.   Reference: f64 softmax, rel err <= 2^-9.
#include "attention.cuh"
#include "wgmma.cuh"

constexpr int WARPS = 4; // of 16 rows each

// Eights of a row's merged sums in shared memory. They are touched once a split: not worth the registers, of which the rows take
// most. At a head size of 128 in f16 a quarter stays there, so that a block fits the 99 KiB of the smaller chips.
constexpr int SMALL_CHIPS = 99 * 1024; // sm_86, sm_89, sm_120
template <class KV, int HS> constexpr int SHARED = 2 * KV::template STAGE<HS> + HS * 256 <= SMALL_CHIPS ? HS / 8 : HS / 8 * 3 / 4;
static_assert(2 * HalfKv::STAGE<128> + SHARED<HalfKv, 128> * 2048 <= SMALL_CHIPS, "fits");
static_assert(SHARED<HalfKv, 128> == 12 && SHARED<HalfKv, 96> == 12 && SHARED<ByteKv, 128> == 16, "as launch/attention.rs has it");

template <class KV, int HS> DEVICE void attention_prefill(const AttentionArgs &args) {
    extern __shared__ __align__(1024) uint8_t shared[];
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

#if HAS_WGMMA
// The same for f16 on Hopper, where the four warps multiply as one warpgroup that reads keys and values from shared memory. The same
// chains of products and the same softmax, so the same bits; registers have the same layout too.
//
// A stage is a tile of keys and one of values in slabs of 32 elements, a slab [64 positions][32], 64-byte swizzle. While
// the tensor cores add the values of one tile and multiply the keys of the next, the tile after that is copied.
template <int HS> struct Slabs {
    static constexpr uint32_t SLAB = KV_TILE * 64, PART = HS / 32 * SLAB, STAGE = 2 * PART;
};

// What a thread copies: 16 bytes of row threadIdx.x / 4 of each block and slab.
template <int HS> struct SlabCopy {
    const uint8_t *source[2]; // keys and values of block 0, the thread's row
    uint32_t target;          // in a slab
    int row;
    unsigned blocks[2];       // of the next tile, read long before they are needed
    size_t block_bytes;

    DEVICE SlabCopy(const AttentionArgs &args, int kv_head) {
        row = threadIdx.x / 4;
        const int part = threadIdx.x % 4;
        const size_t at = static_cast<size_t>(kv_head) * half_head_bytes(HS) + row * HS * 2 + part * 16;
        source[0] = args.k_cache + at, source[1] = args.v_cache + at;
        target = row * 64 + ((part ^ (row / 2 & 3)) << 4);
        block_bytes = static_cast<size_t>(args.n_kv_heads) * half_head_bytes(HS);
    }
    DEVICE void look_up(const unsigned *table, int tile, int n_positions) {
#pragma unroll
        for (int b = 0; b < 2; b++) blocks[b] = tile * KV_TILE + b * KV_BLOCK_TOKENS < n_positions ? table[tile * 2 + b] : 0;
    }
    // The tile that was looked up; zeros beyond `n_positions`.
    DEVICE void copy(uint32_t stage, int tile, int n_positions) const {
#pragma unroll
        for (int side = 0; side < 2; side++) {
#pragma unroll
            for (int b = 0; b < 2; b++) {
                const uint8_t *from = source[side] + blocks[b] * block_bytes;
                const bool there = tile * KV_TILE + b * KV_BLOCK_TOKENS + row < n_positions;
                const uint32_t to = stage + target + side * Slabs<HS>::PART + b * KV_BLOCK_TOKENS * 64;
#pragma unroll
                for (int slab = 0; slab < HS / 32; slab++) copy_async_16(to + slab * Slabs<HS>::SLAB, from + slab * 64, there);
            }
        }
    }
};

// Turns a tile's scores into weights p and takes them into the rows' maxima and sums, in `attend`'s order and to its bits. With ALL
// every row sees the whole tile, and there is no cap.
template <bool ALL>
DEVICE void weigh_tile(uint32_t (&p)[KV_TILE / 16][4], float (&shrink)[2], float (&m)[2], float (&l)[2], float (&s)[KV_TILE / 8][4],
                       const int (&positions)[2], const AttentionArgs &args, int tile, int lane) {
    float top[2] = {-CUDART_INF_F, -CUDART_INF_F};
#pragma unroll
    for (int j = 0; j < KV_TILE / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            float v = __fmul_rn(s[j][e], args.scale);
            if constexpr (!ALL) {
                const int position = tile * KV_TILE + 8 * j + 2 * (lane % 4) + e % 2, own = positions[e / 2];
                if (args.softcap > 0.0f) v = args.softcap * tanhf(v / args.softcap);
                if (position > own || (args.window != 0 && position <= own - args.window)) v = -CUDART_INF_F;
            }
            s[j][e] = v;
            top[e / 2] = fmaxf(top[e / 2], v);
        }
    }
    float base[2], sum[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
        base[r] = fmaxf(m[r], top[r]);
        if (base[r] == -CUDART_INF_F) base[r] = 0.0f;
        shrink[r] = exp_f32(m[r] - base[r]);
        m[r] = fmaxf(m[r], top[r]);
    }
#pragma unroll
    for (int j = 0; j < KV_TILE / 8; j++) {
        float w[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            w[e] = exp_f32(s[j][e] - base[e / 2]);
            sum[e / 2] += w[e];
        }
        half2 low = __floats2half2_rn(w[0], w[1]), high = __floats2half2_rn(w[2], w[3]);
        p[j / 2][2 * (j % 2)] = *reinterpret_cast<uint32_t *>(&low);
        p[j / 2][2 * (j % 2) + 1] = *reinterpret_cast<uint32_t *>(&high);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
        sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        l[r] = __fmaf_rn(l[r], shrink[r], sum[r]);
    }
}

template <int N> DEVICE void settle(float (&d)[N][4]) {
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) asm volatile("" : "+f"(d[j][e])::"memory"); // written behind the compiler's back until here
}

template <int HS> DEVICE void attention_prefill_slabs(const AttentionArgs &args) {
    using S = Slabs<HS>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t tiles = shared_address(shared);
    const AttentionItem item = args.items[gridDim.x - 1 - blockIdx.x];
    const int kv_head = blockIdx.y, group = args.n_heads / args.n_kv_heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const unsigned *table = args.tables + item.table;
    int first, end, high;
    item_range(args, item, 16 * WARPS, first, end, high);
    const int low = args.positions[item.first_token + item.first_row / group];
    SlabCopy<HS> copies(args, kv_head);
    copies.look_up(table, first, high + 1);
    wait_for_predecessor();

    Rows<HS> rows;
    load_rows<HalfKv, HS>(rows, args, item, item.first_row + 16 * warp, kv_head, lane);
    clear(rows);
    float m[2] = {-CUDART_INF_F, -CUDART_INF_F}, l[2] = {};
    float2 *totals = reinterpret_cast<float2 *>(shared + 2 * S::STAGE) + threadIdx.x;
    auto total = [&](int r, int j) -> float2 & { return totals[(r * (HS / 8) + j) * 32 * WARPS]; };
#pragma unroll
    for (int i = 0; i < HS / 4; i++) totals[i * 32 * WARPS] = make_float2(0.0f, 0.0f);

    auto stage_of = [&](int tile) { return tiles + (tile & 1) * S::STAGE; };
    auto arrived = [&] {
        copy_async_wait<0>();
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // the products read through the asynchronous proxy
        __syncthreads();
    };
    float s[KV_TILE / 8][4];
    auto multiply_keys = [&](int tile) {
#pragma unroll
        for (int step = 0; step < HS / 16; step++) wgmma_16(s, rows.q[step], describe_b64(stage_of(tile) + step / 2 * S::SLAB + step % 2 * 32, 0), step > 0);
        wgmma_commit();
    };
    // Merges the split that has ended.
    auto merge_split = [&] {
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
    };

    copies.copy(stage_of(first), first, high + 1);
    copy_async_commit();
    if (first + 1 < end) copies.look_up(table, first + 1, high + 1);
    arrived();
    wgmma_fence();
    multiply_keys(first);
    for (int tile = first; tile < end; tile++) {
        wgmma_wait<0>(); // this tile's keys, and the values of the one before
        settle(s);
        settle(rows.o);
        __syncthreads(); // every warp's: the other stage is free
        if (tile + 1 < end) {
            copies.copy(stage_of(tile + 1), tile + 1, high + 1);
            if (tile + 2 < end) copies.look_up(table, tile + 2, high + 1);
        }
        copy_async_commit();
        if (tile > first && tile % SPLIT_TILES == 0) merge_split();
        uint32_t p[KV_TILE / 16][4];
        float shrink[2];
        const bool all_seen = tile * KV_TILE + KV_TILE - 1 <= low && (args.window == 0 || tile * KV_TILE > high - args.window) && args.softcap == 0.0f;
        if (all_seen) {
            weigh_tile<true>(p, shrink, rows.m, rows.l, s, rows.position, args, tile, lane);
        } else {
            weigh_tile<false>(p, shrink, rows.m, rows.l, s, rows.position, args, tile, lane);
        }
#pragma unroll
        for (int j = 0; j < HS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) rows.o[j][e] *= shrink[e / 2];
        arrived();
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < KV_TILE / 16; step++) wgmma_16<1>(rows.o, p[step], describe_b64(stage_of(tile) + S::PART + step * 16 * 64, S::SLAB));
        wgmma_commit();
        if (tile + 1 < end) multiply_keys(tile + 1);
    }
    wgmma_wait<0>();
    settle(rows.o);
    merge_split();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = item.first_row + 16 * warp + lane / 4 + 8 * r;
        if (row >= item.n_rows) continue;
        const int head = kv_head * group + row % group;
        const float factor = finish_factor(m[r], l[r], args.sinks, head);
        half *out = args.out + static_cast<size_t>(item.first_token + row / group) * args.out_stride + head * HS + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < HS / 8; j++) {
            const float2 sum = total(r, j);
            *reinterpret_cast<half2 *>(out + 8 * j) = __halves2half2(to_half(sum.x * factor), to_half(sum.y * factor));
        }
    }
}
#endif

// f16 in the way of the chip; a head of 16 elements is less than a slab.
template <int HS> DEVICE void attention_prefill_f16(const AttentionArgs &args) {
#if HAS_WGMMA
    if constexpr (HS >= 32) return attention_prefill_slabs<HS>(args);
#endif
    attention_prefill<HalfKv, HS>(args);
}

constexpr int LEAST_BLOCKS(int hs) { return HAS_WGMMA ? hs <= 96 ? 3 : 2 : 1; }

#define ATTENTION_PREFILL(HS)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128, LEAST_BLOCKS(HS)) attention_prefill_##HS(const AttentionArgs args) {               \
        attention_prefill_f16<HS>(args);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) attention_prefill_q8_##HS(const AttentionArgs args) {            \
        attention_prefill<ByteKv, HS>(args);                                                                           \
    }
ATTENTION_PREFILL(16)
ATTENTION_PREFILL(32)
ATTENTION_PREFILL(64)
ATTENTION_PREFILL(96)
ATTENTION_PREFILL(128)
