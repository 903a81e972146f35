// Causal attention over paged KV with tensor cores: one order of summation for decode and prefill.
//
// Rows are (token, head of the group) pairs, so that a group's query heads share what is read of their kv head. Positions are
// walked in tiles of 64 and cut into splits of 128, both aligned to absolute positions. Within a split the softmax is
// online (Milakov and Gimelshein 2018); splits are merged in ascending order by `merge`. A tile or split that a row may not see
// changes none of its bits, so it does not matter which other rows share a block, nor whether splits ran in one block
// or in many.
//
// The cache holds f16 or 8-bit keys and values; what depends on that is in HalfKv and ByteKv.
#pragma once
#include "kv.cuh"
#include <math_constants.h>

constexpr int KV_TILE = 64;
constexpr int SPLIT_TILES = 2;
constexpr int SPLIT = KV_TILE * SPLIT_TILES;

// Rows of one sequence that a block of threads works on. Mirrored in launch/attention.rs.
struct AttentionItem {
    int first_token; // of the sequence's span, index into the batch
    int first_row;   // of this item: row r is token first_token + r / group, head r % group of the kv head
    int n_rows;      // of the span: rows from n_rows on do not exist
    int table;       // where the sequence's block table begins
};

// Mirrored by `AttentionArgs` in launch/attention.rs.
struct AttentionArgs {
    const half *q;              // [n, NH * HS]
    const uint8_t *k_cache, *v_cache; // kv.cuh
    half *out;                  // [n, out_stride]
    const float *sinks;         // [NH] or null
    const AttentionItem *items; // [n_items]
    const unsigned *tables;     // block tables
    const unsigned *positions;  // [n]
    float *partial;             // [n_items][kv head][split][partial_rows][HS + 2] when split over blocks
    float scale, softcap;       // softcap 0: off
    int n_heads, n_kv_heads, window; // window 0: off
    int max_splits, out_stride;
    int partial_rows;           // most rows of an item, at most 16
};

// State of a row's softmax: maximum, sum, and weighted sum of values (kept by the caller).
DEVICE void merge(float &m, float &l, float m2, float l2, float &keep, float &take) {
    const float top = fmaxf(m, m2);
    keep = m == -CUDART_INF_F ? 0.0f : exp_f32(m - top);
    take = exp_f32(m2 - top);
    l = __fmaf_rn(l2, take, __fmul_rn(l, keep));
    m = top;
}
DEVICE float merged(float o, float o2, float keep, float take) { return __fmaf_rn(o2, take, __fmul_rn(o, keep)); }

// The factor that turns a weighted sum into the output, the sink's share taken off.
DEVICE float finish_factor(float m, float l, const float *sinks, int head) {
    if (sinks == nullptr) return 1.0f / l;
    const float sink = sinks[head], top = fmaxf(m, sink);
    const float keep = exp_f32(m - top);
    return keep / __fmaf_rn(l, keep, exp_f32(sink - top));
}

DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// The rows of the kv head in a block of the tile (0 or 1), and how many of them are there; rows of any block if none are.
struct HeadRows {
    const uint8_t *rows;
    int n;
};
template <class KV, int HS>
DEVICE HeadRows head_rows(const uint8_t *cache, const unsigned *table, int tile, int block, int n_positions, int kv_head, int n_kv_heads) {
    const int first = tile * KV_TILE + block * KV_BLOCK_TOKENS, n = min(n_positions - first, KV_BLOCK_TOKENS);
    const size_t at = n > 0 ? table[first / KV_BLOCK_TOKENS] : 0;
    return {cache + (at * n_kv_heads + kv_head) * KV::head_bytes(HS), n};
}

// f16. A stage in shared memory is a tile of keys and one of values, rows of a position 16 bytes longer than they need be:
// ldmatrix then meets every bank once. Lane 4g + t holds of a query's step of 16 elements those at 2t, 2t + 1, 2t + 8, 2t + 9.
struct HalfKv {
    static __host__ __device__ constexpr int head_bytes(int hs) { return half_head_bytes(hs); }
    template <int HS> static constexpr int ROW = HS * 2 + 16;
    template <int HS> static constexpr int STAGE = 2 * KV_TILE * ROW<HS>;
    static DEVICE int q_at(int t, int upper) { return 2 * t + 8 * upper; }
    static DEVICE int o_at(int j, int odd, int t) { return 8 * j + 2 * t + odd; }

    // Positions 64 tile .. 64 tile + 63 of one kv head; beyond `n_positions` zeros.
    template <int HS, int THREADS>
    static DEVICE void copy(uint32_t stage, const AttentionArgs &args, const unsigned *table, int tile, int n_positions, int kv_head) {
        copy_part<HS, THREADS>(stage, args.k_cache, table, tile, n_positions, kv_head, args.n_kv_heads);
        copy_part<HS, THREADS>(stage + KV_TILE * ROW<HS>, args.v_cache, table, tile, n_positions, kv_head, args.n_kv_heads);
    }
    template <int HS, int THREADS>
    static DEVICE void copy_part(uint32_t target, const uint8_t *cache, const unsigned *table, int tile, int n_positions, int kv_head, int n_kv_heads) {
        constexpr int PIECES = HS / 8; // of 16 bytes in a row
#pragma unroll
        for (int block = 0; block < KV_TILE / KV_BLOCK_TOKENS; block++) {
            const HeadRows head = head_rows<HalfKv, HS>(cache, table, tile, block, n_positions, kv_head, n_kv_heads);
#pragma unroll
            for (int first = 0; first < KV_BLOCK_TOKENS * PIECES; first += THREADS) {
                const int i = first + threadIdx.x, row = i / PIECES;
                if (KV_BLOCK_TOKENS * PIECES % THREADS != 0 && row >= KV_BLOCK_TOKENS) break;
                copy_async_16(target + (block * KV_BLOCK_TOKENS + row) * ROW<HS> + i % PIECES * 16, head.rows + i * 16, row < head.n);
            }
        }
    }

    // s += q k for N eights of the tile's 64 positions, from eight `first` on.
    static constexpr int LEAST_EIGHTS = 2; // that `scores` takes at a time
    template <int HS, int N = KV_TILE / 8>
    static DEVICE void scores(float (&s)[N][4], const uint32_t (&q)[HS / 16][4], uint32_t stage, int lane, int first = 0) {
        const int row8 = lane % 8, part = (lane / 8) % 2, upper = lane / 16;
#pragma unroll
        for (int step = 0; step < HS / 16; step++) {
#pragma unroll
            for (int j = 0; j < N; j += 2) {
                uint32_t b[4];
                ldmatrix_x4(b, stage + (8 * (first + j + upper) + row8) * ROW<HS> + (2 * step + part) * 16);
                mma_16x8x16(s[j], q[step], b[0], b[1]);
                mma_16x8x16(s[j + 1], q[step], b[2], b[3]);
            }
        }
    }

    // o += p v for N eights of the elements, from eight `first` on, which is even.
    template <int HS, int N = HS / 8>
    static DEVICE void add_values(float (&o)[N][4], const uint32_t (&p)[KV_TILE / 16][4], uint32_t stage, int lane, int first = 0) {
        const int row8 = lane % 8, part = (lane / 8) % 2, upper = lane / 16;
        const uint32_t v_tile = stage + KV_TILE * ROW<HS>;
#pragma unroll
        for (int step = 0; step < KV_TILE / 16; step++) {
#pragma unroll
            for (int j = 0; j < N; j += 2) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, v_tile + (16 * step + row8 + 8 * part) * ROW<HS> + (first + j + upper) * 16);
                mma_16x8x16(o[j], p[step], b[0], b[1]);
                mma_16x8x16(o[j + 1], p[step], b[2], b[3]);
            }
        }
    }
};

// 8 bits with a scale per 32 elements (kv.cuh). A stage is a tile of key bytes, one of value bytes, and the scales of both,
// [2 blocks][groups][32 tokens] f16. ldmatrix moves pairs of bytes, so that a lane gets four elements of one key, or two of
// two values; queries and outputs are held in the order that makes these the operands of the tensor cores. Keys are multiplied
// as integers and scaled in f32, values are scaled in f16.
struct ByteKv {
    static __host__ __device__ constexpr int head_bytes(int hs) { return byte_head_bytes(hs); }
    template <int HS> static constexpr int ROW = HS + 16;
    template <int HS> static constexpr int GROUPS = (HS + 31) / 32;
    template <int HS> static constexpr int SCALES = 2 * KV_TILE * GROUPS<HS>; // bytes, of keys or of values
    template <int HS> static constexpr int STAGE = 2 * (KV_TILE * ROW<HS> + SCALES<HS>);
    static DEVICE int q_at(int t, int upper) { return 4 * t + 2 * upper; }
    static DEVICE int o_at(int j, int odd, int t) { return 16 * (j / 2) + 4 * t + 2 * odd + j % 2; }

    template <int HS, int THREADS>
    static DEVICE void copy(uint32_t stage, const AttentionArgs &args, const unsigned *table, int tile, int n_positions, int kv_head) {
        constexpr uint32_t BYTES = KV_TILE * ROW<HS>;
        copy_part<HS, THREADS>(stage, stage + 2 * BYTES, args.k_cache, table, tile, n_positions, kv_head, args.n_kv_heads);
        copy_part<HS, THREADS>(stage + BYTES, stage + 2 * BYTES + SCALES<HS>, args.v_cache, table, tile, n_positions, kv_head, args.n_kv_heads);
    }
    template <int HS, int THREADS>
    static DEVICE void copy_part(uint32_t target, uint32_t scales, const uint8_t *cache, const unsigned *table, int tile, int n_positions,
                                 int kv_head, int n_kv_heads) {
        constexpr int PIECES = HS / 16, PER_BLOCK = 4 * GROUPS<HS>; // of 16 bytes: in a row, and of a block's scales
#pragma unroll
        for (int block = 0; block < KV_TILE / KV_BLOCK_TOKENS; block++) {
            const HeadRows head = head_rows<ByteKv, HS>(cache, table, tile, block, n_positions, kv_head, n_kv_heads);
#pragma unroll
            for (int first = 0; first < KV_BLOCK_TOKENS * PIECES; first += THREADS) {
                const int i = first + threadIdx.x, row = i / PIECES, part = i % PIECES;
                if (KV_BLOCK_TOKENS * PIECES % THREADS != 0 && row >= KV_BLOCK_TOKENS) break;
                const uint32_t to = target + (block * KV_BLOCK_TOKENS + row) * ROW<HS> + part * 16;
                copy_async_16(to, head.rows + row * byte_row(HS) + part * 16, row < head.n);
            }
            // Eight tokens' scales at a time; those of tokens that are not there must be zeros, for 0 times NaN is NaN.
            if (threadIdx.x < PER_BLOCK) {
                const int i = threadIdx.x, bytes = min(max(2 * (head.n - i % 4 * 8), 0), 16);
                copy_async_16(scales + (block * PER_BLOCK + i) * 16, head.rows + KV_BLOCK_TOKENS * byte_row(HS) + i * 16, bytes);
            }
        }
    }

    // Two bytes of `word`, 128 taken off, as f16.
    template <unsigned SELECT> static DEVICE half2 unpack(uint32_t word) {
        const uint32_t biased = __byte_perm(word, 0x64646464u, SELECT);
        return __hsub2(*reinterpret_cast<const half2 *>(&biased), __float2half2_rn(1152.0f));
    }
    static DEVICE uint32_t word(half2 v) { return *reinterpret_cast<uint32_t *>(&v); }
    // Scales of two neighbouring positions.
    template <int HS> static DEVICE half2 scale_pair(uint32_t scales, int position, int group) {
        const uint32_t at = scales + ((position / KV_BLOCK_TOKENS * GROUPS<HS> + group) * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS) * 2;
        uint32_t v;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at));
        return *reinterpret_cast<half2 *>(&v);
    }

    static constexpr int LEAST_EIGHTS = 4;
    template <int HS, int N = KV_TILE / 8>
    static DEVICE void scores(float (&s)[N][4], const uint32_t (&q)[HS / 16][4], uint32_t stage, int lane, int first = 0) {
        constexpr int STEPS = HS < 32 ? 1 : 2, WIDE = 4 / STEPS; // steps of 16 elements in a group; eights of positions at a time
        const uint32_t scales = stage + 2 * KV_TILE * ROW<HS>;
        const int eighth = lane / 8;
#pragma unroll
        for (int group = 0; group < GROUPS<HS>; group++) {
            if constexpr (HS > 64) __syncwarp(); // keeps the next group's loads from being moved up, for which there are no registers
#pragma unroll
            for (int j = 0; j < N; j += WIDE) {
                float part[WIDE][4] = {};
                uint32_t b[4];
                ldmatrix_x4(b, stage + (8 * (first + j + eighth % WIDE) + lane % 8) * ROW<HS> + (group * STEPS + eighth / WIDE) * 16);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint32_t low = word(unpack<0x4140>(b[i])), high = word(unpack<0x4342>(b[i]));
                    mma_16x8x16(part[i % WIDE], q[group * STEPS + i / WIDE], low, high);
                }
#pragma unroll
                for (int i = 0; i < WIDE; i++) {
                    const float2 scale = __half22float2(scale_pair<HS>(scales, 8 * (first + j + i) + 2 * (lane % 4), group));
#pragma unroll
                    for (int e = 0; e < 4; e++) s[j + i][e] = __fmaf_rn(part[i][e], e % 2 == 0 ? scale.x : scale.y, s[j + i][e]);
                }
            }
        }
    }

    template <int HS, int N = HS / 8>
    static DEVICE void add_values(float (&o)[N][4], const uint32_t (&p)[KV_TILE / 16][4], uint32_t stage, int lane, int first = 0) {
        const uint32_t v_tile = stage + KV_TILE * ROW<HS>, scales = stage + 2 * KV_TILE * ROW<HS> + SCALES<HS>;
#pragma unroll
        for (int block = 0; block < 2; block++) {
#pragma unroll
            for (int j = 0; j < N / 2; j++) {
                if (HS > 64 && j % 2 == 0) __syncwarp();
                uint32_t b[4], even[4], odd[4];
                ldmatrix_x4_trans(b, v_tile + (32 * block + lane) * ROW<HS> + (first / 2 + j) * 16);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const half2 scale = scale_pair<HS>(scales, 32 * block + 8 * i + 2 * (lane % 4), (first / 2 + j) / 2);
                    even[i] = word(__hmul2(unpack<0x4240>(b[i]), scale));
                    odd[i] = word(__hmul2(unpack<0x4341>(b[i]), scale));
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma_16x8x16(o[2 * j], p[2 * block + i], even[2 * i], even[2 * i + 1]);
                    mma_16x8x16(o[2 * j + 1], p[2 * block + i], odd[2 * i], odd[2 * i + 1]);
                }
            }
        }
    }
};

// What a warp knows of its 16 rows: lane 4g + t has rows g and g + 8.
template <int HS> struct Rows {
    uint32_t q[HS / 16][4];
    int position[2]; // -1: no such row
    float m[2], l[2], o[HS / 8][4];
};

template <int HS> DEVICE void clear(Rows<HS> &rows) {
#pragma unroll
    for (int r = 0; r < 2; r++) rows.m[r] = -CUDART_INF_F, rows.l[r] = 0.0f;
#pragma unroll
    for (int j = 0; j < HS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) rows.o[j][e] = 0.0f;
}

template <class KV, int HS>
DEVICE void load_rows(Rows<HS> &rows, const AttentionArgs &args, const AttentionItem &item, int first_row, int kv_head, int lane) {
    const int group = args.n_heads / args.n_kv_heads;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first_row + lane / 4 + 8 * r;
        const bool exists = row < item.n_rows;
        const int token = item.first_token + (exists ? row / group : 0);
        rows.position[r] = exists ? static_cast<int>(args.positions[token]) : -1;
        const half *q = args.q + (static_cast<size_t>(token) * args.n_heads + kv_head * group + row % group) * HS;
#pragma unroll
        for (int s = 0; s < HS / 16; s++) {
            rows.q[s][r] = exists ? *reinterpret_cast<const uint32_t *>(q + 16 * s + KV::q_at(lane % 4, 0)) : 0u;
            rows.q[s][r + 2] = exists ? *reinterpret_cast<const uint32_t *>(q + 16 * s + KV::q_at(lane % 4, 1)) : 0u;
        }
    }
}

// Scores of N eights of positions from `first` on, scaled, capped, and -inf where a row does not see; `top` takes the rows' largest.
template <int N> DEVICE void mask_scores(float (&s)[N][4], float (&top)[2], const int (&positions)[2], const AttentionArgs &args, int first, int lane) {
    const int t = lane % 4;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = __fmul_rn(s[j][e], args.scale);
    if (args.softcap > 0.0f) {
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[j][e] = args.softcap * tanhf(s[j][e] / args.softcap);
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int position = first + 8 * j + 2 * t + e % 2, own = positions[e / 2];
            const bool visible = position <= own && (args.window == 0 || position > own - args.window);
            s[j][e] = visible ? s[j][e] : -CUDART_INF_F;
            top[e / 2] = fmaxf(top[e / 2], s[j][e]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
    }
}

// A tile's weights in f16, and their sums taken into l.
DEVICE void take_weights(uint32_t (&p)[KV_TILE / 16][4], float (&l)[2], const float (&w)[KV_TILE / 8][4], const float (&shrink)[2]) {
    float sum[2] = {};
#pragma unroll
    for (int j = 0; j < KV_TILE / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) sum[e / 2] += w[j][e];
        half2 low = __floats2half2_rn(w[j][0], w[j][1]), high = __floats2half2_rn(w[j][2], w[j][3]);
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

// Takes one tile into the rows' online softmax.
template <class KV, int HS> DEVICE void attend(Rows<HS> &rows, const AttentionArgs &args, uint32_t stage, int tile, int lane) {
    float s[KV_TILE / 8][4] = {};
    KV::template scores<HS>(s, rows.q, stage, lane);
    float top[2] = {-CUDART_INF_F, -CUDART_INF_F}, base[2], shrink[2];
    mask_scores<KV_TILE / 8>(s, top, rows.position, args, tile * KV_TILE, lane);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float m = fmaxf(rows.m[r], top[r]);
        base[r] = m == -CUDART_INF_F ? 0.0f : m; // nothing seen yet: every weight below is exp(-inf) = 0
        shrink[r] = exp_f32(rows.m[r] - base[r]);
        rows.m[r] = m;
    }
#pragma unroll
    for (int j = 0; j < KV_TILE / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[j][e] = exp_f32(s[j][e] - base[e / 2]);
    uint32_t p[KV_TILE / 16][4];
    take_weights(p, rows.l, s, shrink);
#pragma unroll
    for (int j = 0; j < HS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) rows.o[j][e] *= shrink[e / 2];
    KV::template add_values<HS>(rows.o, p, stage, lane);
}

// First tile and one past the last that an item of up to `most` rows sees, and its highest position. May run before the
// predecessor has finished: items and positions are a step's inputs, written long before.
DEVICE void item_range(const AttentionArgs &args, const AttentionItem &item, int most, int &first, int &end, int &high) {
    const int group = args.n_heads / args.n_kv_heads, last_row = max(min(item.first_row + most, item.n_rows) - 1, 0);
    const int low = args.positions[item.first_token + item.first_row / group];
    high = args.positions[item.first_token + last_row / group];
    first = args.window == 0 ? 0 : max(0, low - args.window + 1) / KV_TILE;
    end = high / KV_TILE + 1;
}
