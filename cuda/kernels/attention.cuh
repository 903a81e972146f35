// Causal attention over paged KV with tensor cores: one order of summation for decode and prefill.
//
// Rows are (token, head of the group) pairs, so that a group's query heads share what is read of their kv head. Positions are
// walked in tiles of 64 and cut into splits of 128, both aligned to absolute positions. Within a split the softmax is
// online (Milakov and Gimelshein 2018); splits are merged in ascending order by `merge`. A tile or split that a row may not see
// changes none of its bits, so it does not matter which other rows share a block, nor whether splits ran in one block
// or in many.
#pragma once
#include "common.cuh"
#include <math_constants.h>

constexpr int KV_BLOCK_TOKENS = 32;
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
    const half *k_cache, *v_cache; // [block][kv head][32][HS]
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

// Rows of a tile in shared memory are 16 bytes longer than they need be: ldmatrix then meets every bank once.
template <int HS> __host__ __device__ constexpr int tile_row_bytes() { return HS * 2 + 16; }
template <int HS> __host__ __device__ constexpr int kv_tile_bytes() { return KV_TILE * tile_row_bytes<HS>(); }

// One tile of K or V of one kv head: positions 64 tile .. 64 tile + 63; beyond `n_positions` zeros.
template <int HS, int THREADS>
DEVICE void copy_kv_tile(uint32_t target, const half *cache, const unsigned *table, int tile, int n_positions, int kv_head, int n_kv_heads) {
    constexpr int PIECES = HS / 8;
    for (int i = threadIdx.x; i < KV_TILE * PIECES; i += THREADS) {
        const int row = i / PIECES, part = i % PIECES, position = tile * KV_TILE + row;
        const bool valid = position < n_positions;
        const size_t block = valid ? table[position / KV_BLOCK_TOKENS] : 0;
        const size_t at = ((block * n_kv_heads + kv_head) * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS) * HS + part * 8;
        copy_async_16(target + row * tile_row_bytes<HS>() + part * 16, cache + at, valid);
    }
}

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

template <int HS>
DEVICE void load_rows(Rows<HS> &rows, const AttentionArgs &args, const AttentionItem &item, int first_row, int kv_head, int lane) {
    const int group = args.n_heads / args.n_kv_heads;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first_row + lane / 4 + 8 * r;
        const bool exists = row < item.n_rows;
        const int token = item.first_token + (exists ? row / group : 0);
        rows.position[r] = exists ? static_cast<int>(args.positions[token]) : -1;
        const half *q = args.q + (static_cast<size_t>(token) * args.n_heads + kv_head * group + row % group) * HS + 2 * (lane % 4);
#pragma unroll
        for (int s = 0; s < HS / 16; s++) {
            rows.q[s][r] = exists ? *reinterpret_cast<const uint32_t *>(q + 16 * s) : 0u;
            rows.q[s][r + 2] = exists ? *reinterpret_cast<const uint32_t *>(q + 16 * s + 8) : 0u;
        }
    }
}

// Takes one tile into the rows' online softmax.
template <int HS>
DEVICE void attend(Rows<HS> &rows, const AttentionArgs &args, uint32_t k_tile, uint32_t v_tile, int tile, int lane) {
    float s[KV_TILE / 8][4] = {};
    const int t = lane % 4, row8 = lane % 8, part = (lane / 8) % 2, upper = lane / 16;
#pragma unroll
    for (int step = 0; step < HS / 16; step++) {
#pragma unroll
        for (int j = 0; j < KV_TILE / 8; j += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, k_tile + (8 * (j + upper) + row8) * tile_row_bytes<HS>() + (2 * step + part) * 16);
            mma_16x8x16(s[j], rows.q[step], b[0], b[1]);
            mma_16x8x16(s[j + 1], rows.q[step], b[2], b[3]);
        }
    }
    float top[2] = {-CUDART_INF_F, -CUDART_INF_F};
#pragma unroll
    for (int j = 0; j < KV_TILE / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int position = tile * KV_TILE + 8 * j + 2 * t + e % 2, own = rows.position[e / 2];
            float v = s[j][e] * args.scale;
            if (args.softcap > 0.0f) v = args.softcap * tanhf(v / args.softcap);
            const bool visible = position <= own && (args.window == 0 || position > own - args.window);
            s[j][e] = visible ? v : -CUDART_INF_F;
            top[e / 2] = fmaxf(top[e / 2], s[j][e]);
        }
    }
    float base[2], shrink[2], sum[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
        const float m = fmaxf(rows.m[r], top[r]);
        base[r] = m == -CUDART_INF_F ? 0.0f : m; // nothing seen yet: every weight below is exp(-inf) = 0
        shrink[r] = exp_f32(rows.m[r] - base[r]);
        rows.m[r] = m;
    }
    uint32_t p[KV_TILE / 16][4];
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
        rows.l[r] = __fmaf_rn(rows.l[r], shrink[r], sum[r]);
    }
#pragma unroll
    for (int j = 0; j < HS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) rows.o[j][e] *= shrink[e / 2];
#pragma unroll
    for (int step = 0; step < KV_TILE / 16; step++) {
#pragma unroll
        for (int j = 0; j < HS / 8; j += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, v_tile + (16 * step + row8 + 8 * part) * tile_row_bytes<HS>() + (j + upper) * 16);
            mma_16x8x16(rows.o[j], p[step], b[0], b[1]);
            mma_16x8x16(rows.o[j + 1], p[step], b[2], b[3]);
        }
    }
}

// First tile and one past the last that rows at positions low..high see.
DEVICE void tile_range(int low, int high, int window, int &first, int &end) {
    first = window == 0 ? 0 : max(0, low - window + 1) / KV_TILE;
    end = high / KV_TILE + 1;
}
