// Attention of one new token per sequence: rope_kv.cu and attention_decode.cu in one.
// Eight warps have a unit: a split of 128 positions of one kv head of one item. They share its scores and
// weights, and have 16 elements of the values each: the operations and their order are those of attention_decode.cu. The last
// block of an item and kv head to finish merges the splits, in ascending order.
#pragma once
#include "attention.cuh"
#include "rope.cuh"

// Attention of items of one token each, with the rotation of their queries and keys and the writing of keys and values. Mirrored by
// `StepArgs` in launch/attention.rs.
struct StepArgs : AttentionArgs { // its q is unused
    const float *qkv, *table, *q_norm, *k_norm; // as RopeKvArgs
    const unsigned *slots;
    unsigned *tickets; // [n_items][kv head], zero between launches
    float norm_eps;
    int qkv_stride, k_first, v_first, n_rot, interleaved;
};

constexpr int UNIT_WARPS = 8, UNIT_THREADS = UNIT_WARPS * WARP;

DEVICE void unit_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(UNIT_THREADS) : "memory"); }

// A unit's place.
struct Unit {
    AttentionItem item;
    int at, kv_head, split; // of the items
    int first, end;         // tiles
    int high;               // the new token's position
    int first_split, last_split;
    unsigned slot; // of the new token
    bool active;

    DEVICE Unit(const StepArgs &args, int unit) {
        split = unit % args.max_splits, kv_head = unit / args.max_splits % args.n_kv_heads, at = unit / args.max_splits / args.n_kv_heads;
        item = args.items[at];
        int all_first, all_end;
        item_range(args, item, 16, all_first, all_end, high);
        first = max(all_first, split * SPLIT_TILES), end = min(all_end, (split + 1) * SPLIT_TILES);
        first_split = all_first / SPLIT_TILES, last_split = (all_end - 1) / SPLIT_TILES;
        slot = args.slots[item.first_token];
        active = item.n_rows > item.first_row && first < end;
    }
};

// Writes a rotated row to the cache in memory, or to a stage in shared memory.
template <class KV, int HS> struct Place;
template <int HS> struct Place<HalfKv, HS> {
    static DEVICE void to_cache(uint8_t *head, int token, const float *row, int lane) {
        store_halves(reinterpret_cast<half *>(head) + token * HS, row, HS, lane);
    }
    static DEVICE void to_stage(uint8_t *stage, bool is_v, int position, const float *row, int lane) {
        store_halves(reinterpret_cast<half *>(stage + (is_v * KV_TILE + position) * HalfKv::ROW<HS>), row, HS, lane);
    }
};
template <int HS> struct Place<ByteKv, HS> {
    static DEVICE void to_cache(uint8_t *head, int token, const float *row, int lane) {
        half *scales = reinterpret_cast<half *>(head + KV_BLOCK_TOKENS * byte_row(HS)) + token;
        store_bytes(head + token * byte_row(HS), scales, row, HS, lane);
    }
    static DEVICE void to_stage(uint8_t *stage, bool is_v, int position, const float *row, int lane) {
        constexpr int GROUPS = ByteKv::GROUPS<HS>;
        half *scales = reinterpret_cast<half *>(stage + 2 * KV_TILE * ByteKv::ROW<HS> + is_v * ByteKv::SCALES<HS>);
        scales += position / KV_BLOCK_TOKENS * GROUPS * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS;
        store_bytes(stage + (is_v * KV_TILE + position) * ByteKv::ROW<HS>, scales, row, HS, lane);
    }
};

// Where a unit's data lie in shared memory.
template <class KV, int HS> struct UnitShared {
    static constexpr int Q_ROW = HS * 2 + 16, SCORE_BYTES = 2 * 8 * WARP * 16;
    static_assert(16 * Q_ROW <= SCORE_BYTES, "queries fit where scores will be");
    uint8_t *stages;
    uint8_t *q;     // [16][Q_ROW], until they are in registers
    float4 *scores; // [tile][eight][lane], in the same place
    float (*fresh)[MAX_DIM]; // the new key and value
    float2 (*tops)[4][8];    // [tile][part of it][lane / 4]: of rows g and g + 8
    static constexpr int EIGHTS = HS < 32 ? KV::LEAST_EIGHTS : 2; // that a warp scores at a time
    static constexpr int BYTES = 2 * KV::template STAGE<HS> + SCORE_BYTES + 2 * MAX_DIM * 4 + 2 * 4 * 8 * 8;

    DEVICE explicit UnitShared(uint8_t *base) {
        stages = base;
        scores = reinterpret_cast<float4 *>(base + 2 * KV::template STAGE<HS>);
        q = reinterpret_cast<uint8_t *>(scores);
        fresh = reinterpret_cast<float(*)[MAX_DIM]>(q + SCORE_BYTES);
        tops = reinterpret_cast<float2(*)[4][8]>(q + SCORE_BYTES + 2 * MAX_DIM * 4);
    }
};

// The item's queries, and the new key and value if this is their split: one head a warp at a time.
template <class KV, int HS>
DEVICE void rotate_unit(const StepArgs &args, const Unit &unit, const UnitShared<KV, HS> &own, const Angles &angles, int warp, int lane) {
    const int group = args.n_heads / args.n_kv_heads, token = unit.item.first_token;
    const float *qkv = args.qkv + static_cast<size_t>(token) * args.qkv_stride;
    const int n_rows = min(unit.item.n_rows - unit.item.first_row, 16);
    for (int row = warp; row < n_rows; row += UNIT_WARPS) {
        const float *in = qkv + (unit.kv_head * group + unit.item.first_row + row) * HS;
        half *out = reinterpret_cast<half *>(own.q + row * UnitShared<KV, HS>::Q_ROW);
        rotate_head([&](int i) { return __ldcg(in + i); }, [&](int i, float v) { out[i] = to_half(v); }, angles, args.q_norm, args.norm_eps,
                    args.n_rot, HS, args.interleaved, lane);
    }
    if (unit.high / SPLIT != unit.split || warp < UNIT_WARPS - 2) return;
    // The key has the last warp, which has no query where a head of keys has seven or fewer: rotating takes longer than copying.
    const bool is_v = warp == UNIT_WARPS - 2;
    const float *in = qkv + (is_v ? args.v_first : args.k_first) + unit.kv_head * HS;
    float *fresh = own.fresh[is_v];
    if (is_v) {
        float v[(HS + WARP - 1) / WARP];
#pragma unroll
        for (int i = 0; i * WARP < HS; i++) v[i] = i * WARP + lane < HS ? __ldcg(in + i * WARP + lane) : 0.0f;
#pragma unroll
        for (int i = 0; i * WARP < HS; i++) {
            if (i * WARP + lane < HS) fresh[i * WARP + lane] = v[i];
        }
    } else {
        rotate_head([&](int i) { return __ldcg(in + i); }, [&](int i, float v) { fresh[i] = v; }, angles, args.k_norm, args.norm_eps, args.n_rot,
                    HS, args.interleaved, lane);
    }
    __syncwarp();
    uint8_t *head = const_cast<uint8_t *>(is_v ? args.v_cache : args.k_cache) +
                    (static_cast<size_t>(unit.slot / KV_BLOCK_TOKENS) * args.n_kv_heads + unit.kv_head) * KV::head_bytes(HS);
    Place<KV, HS>::to_cache(head, unit.slot % KV_BLOCK_TOKENS, fresh, lane);
}

// The new token's position in every row that there is.
DEVICE void row_positions(const Unit &unit, int (&positions)[2], int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) positions[r] = unit.item.first_row + lane / 4 + 8 * r < unit.item.n_rows ? unit.high : -1;
}

// Takes the largest scores of a tile into m.
template <class KV, int HS> DEVICE void take_tops(const UnitShared<KV, HS> &own, int tile, float (&m)[2], int lane) {
#pragma unroll
    for (int part = 0; part < KV_TILE / 8 / UnitShared<KV, HS>::EIGHTS; part++) {
        const float2 top = own.tops[tile][part][lane / 4];
        m[0] = fmaxf(m[0], top.x), m[1] = fmaxf(m[1], top.y);
    }
}

// Scores of the unit's tiles, scaled and masked, as the fragments that lanes hold, to shared memory; and the rows' largest of each part.
template <class KV, int HS> DEVICE void score_unit(const StepArgs &args, const Unit &unit, const UnitShared<KV, HS> &own, int warp, int lane) {
    constexpr int N = UnitShared<KV, HS>::EIGHTS, PER_TILE = KV_TILE / 8 / N;
    uint32_t q[HS / 16][4];
#pragma unroll
    for (int s = 0; s < HS / 16; s++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i % 2);
            const uint8_t *at = own.q + row * UnitShared<KV, HS>::Q_ROW + 2 * (16 * s + KV::q_at(lane % 4, i / 2));
            q[s][i] = unit.item.first_row + row < unit.item.n_rows ? *reinterpret_cast<const uint32_t *>(at) : 0u;
        }
    }
    unit_barrier();
    int positions[2];
    row_positions(unit, positions, lane);
    for (int i = warp; i < (unit.end - unit.first) * PER_TILE; i += UNIT_WARPS) {
        const int tile = i / PER_TILE, eight = i % PER_TILE * N;
        float s[N][4] = {};
        KV::template scores<HS, N>(s, q, shared_address(own.stages) + tile * KV::template STAGE<HS>, lane, eight);
        float top[2] = {-CUDART_INF_F, -CUDART_INF_F};
        mask_scores<N>(s, top, positions, args, (unit.first + tile) * KV_TILE + 8 * eight, lane);
#pragma unroll
        for (int j = 0; j < N; j++) own.scores[(tile * 8 + eight + j) * WARP + lane] = make_float4(s[j][0], s[j][1], s[j][2], s[j][3]);
        if (lane % 4 == 0) own.tops[tile][i % PER_TILE][lane / 4] = make_float2(top[0], top[1]);
    }
}

// Scores become weights: a warp has the eights that it had as scores. A tile's weights are relative to the largest score up to it.
template <class KV, int HS> DEVICE void weigh_unit(const Unit &unit, const UnitShared<KV, HS> &own, int warp, int lane) {
    constexpr int N = UnitShared<KV, HS>::EIGHTS, PER_TILE = KV_TILE / 8 / N;
    for (int i = warp; i < (unit.end - unit.first) * PER_TILE; i += UNIT_WARPS) {
        const int tile = i / PER_TILE, eight = i % PER_TILE * N;
        float m[2] = {-CUDART_INF_F, -CUDART_INF_F};
        for (int t = 0; t <= tile; t++) take_tops<KV, HS>(own, t, m, lane);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float4 &at = own.scores[(tile * 8 + eight + j) * WARP + lane];
            const float base0 = m[0] == -CUDART_INF_F ? 0.0f : m[0], base1 = m[1] == -CUDART_INF_F ? 0.0f : m[1];
            const float4 s = at;
            at = make_float4(exp_f32(s.x - base0), exp_f32(s.y - base0), exp_f32(s.z - base1), exp_f32(s.w - base1));
        }
    }
}

// The output of one cell from its merged sum.
DEVICE void finish_cell(const StepArgs &args, const AttentionItem &item, int kv_head, int row, int d, int hs, float o, float m, float l) {
    const int group = args.n_heads / args.n_kv_heads, head = kv_head * group + (item.first_row + row) % group;
    half *out = args.out + static_cast<size_t>(item.first_token) * args.out_stride + head * hs;
    out[d] = to_half(o * finish_factor(m, l, args.sinks, head));
}

// A warp's 16 elements of the values: written where there is one split, else kept for the merge.
template <class KV, int HS> DEVICE void sum_unit(const StepArgs &args, const Unit &unit, const UnitShared<KV, HS> &own, float *partial, int warp, int lane) {
    float m[2] = {-CUDART_INF_F, -CUDART_INF_F}, l[2] = {}, o[2][4] = {};
    for (int tile = 0; tile < unit.end - unit.first; tile++) {
        const float before[2] = {m[0], m[1]};
        take_tops<KV, HS>(own, tile, m, lane);
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; r++) shrink[r] = exp_f32(before[r] - (m[r] == -CUDART_INF_F ? 0.0f : m[r]));
        float w[KV_TILE / 8][4];
#pragma unroll
        for (int j = 0; j < KV_TILE / 8; j++) {
            const float4 four = own.scores[(tile * 8 + j) * WARP + lane];
            w[j][0] = four.x, w[j][1] = four.y, w[j][2] = four.z, w[j][3] = four.w;
        }
        uint32_t p[KV_TILE / 16][4];
        take_weights(p, l, w, shrink);
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[j][e] *= shrink[e / 2];
        KV::template add_values<HS, 2>(o, p, shared_address(own.stages) + tile * KV::template STAGE<HS>, lane, 2 * warp);
    }
    const int n_rows = min(unit.item.n_rows - unit.item.first_row, 16);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = lane / 4 + 8 * r;
        if (row >= n_rows) break;
        if (unit.first_split == unit.last_split) {
            float m1 = -CUDART_INF_F, l1 = 0.0f, keep, take;
            merge(m1, l1, m[r], l[r], keep, take);
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    const float sum = merged(0.0f, o[j][2 * r + odd], keep, take);
                    finish_cell(args, unit.item, unit.kv_head, row, KV::o_at(2 * warp + j, odd, lane % 4), HS, sum, m1, l1);
                }
        } else {
            float *out = partial + (static_cast<size_t>(unit.split) * args.partial_rows + row) * (HS + 2);
            if (warp == 0 && lane % 4 == 0) out[HS] = m[r], out[HS + 1] = l[r];
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++) out[KV::o_at(2 * warp + j, odd, lane % 4)] = o[j][2 * r + odd];
        }
    }
}

// Merges the splits of an item and kv head, as attention_merge does.
template <int HS> DEVICE void merge_unit(const StepArgs &args, const Unit &unit, const float *partial, int thread) {
    constexpr int AHEAD = 8; // splits that are loaded at once
    const int n_cells = min(unit.item.n_rows - unit.item.first_row, 16) * HS;
    for (int cell = thread; cell < n_cells; cell += UNIT_THREADS) {
        const int row = cell / HS, d = cell % HS;
        float m = -CUDART_INF_F, l = 0.0f, o = 0.0f;
        for (int split = unit.first_split; split <= unit.last_split; split += AHEAD) {
            float m2[AHEAD], l2[AHEAD], o2[AHEAD];
#pragma unroll
            for (int s = 0; s < AHEAD; s++) {
                const float *part = partial + (static_cast<size_t>(split + s) * args.partial_rows + row) * (HS + 2);
                const bool valid = split + s <= unit.last_split;
                m2[s] = valid ? __ldcg(part + HS) : -CUDART_INF_F;
                l2[s] = valid ? __ldcg(part + HS + 1) : 0.0f;
                o2[s] = valid ? __ldcg(part + d) : 0.0f;
            }
#pragma unroll
            for (int s = 0; s < AHEAD; s++) {
                if (m2[s] == -CUDART_INF_F) continue; // nothing there that this row sees
                float keep, take;
                merge(m, l, m2[s], l2[s], keep, take);
                o = merged(o, o2[s], keep, take);
            }
        }
        finish_cell(args, unit.item, unit.kv_head, row, d, HS, o, m, l);
    }
}

// Asks for what earlier steps wrote of a unit: its keys and values.
template <class KV, int HS> DEVICE void fetch_unit(const StepArgs &args, const Unit &unit, const UnitShared<KV, HS> &own) {
    for (int tile = unit.first; tile < unit.end; tile++) {
        KV::template copy<HS, UNIT_THREADS>(shared_address(own.stages) + (tile - unit.first) * KV::template STAGE<HS>, args,
                                            args.tables + unit.item.table, tile, unit.high, unit.kv_head);
    }
    copy_async_commit();
}

// An active unit, once q, k and v are there. Ends with its shared memory free to use.
template <class KV, int HS> DEVICE void attend_unit(const StepArgs &args, const Unit &unit, const UnitShared<KV, HS> &own, const Angles &angles) {
    __shared__ bool is_last;
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    rotate_unit<KV, HS>(args, unit, own, angles, warp, lane);
    copy_async_wait<0>();
    unit_barrier();
    if (unit.high / SPLIT == unit.split) {
        if (warp >= UNIT_WARPS - 2) {
            const bool is_v = warp == UNIT_WARPS - 1;
            uint8_t *stage = own.stages + (unit.high / KV_TILE - unit.first) * KV::template STAGE<HS>;
            Place<KV, HS>::to_stage(stage, is_v, unit.high % KV_TILE, own.fresh[is_v], lane);
        }
        unit_barrier();
    }
    score_unit<KV, HS>(args, unit, own, warp, lane);
    unit_barrier();
    float *partial = args.partial + (static_cast<size_t>(unit.at) * args.n_kv_heads + unit.kv_head) * args.max_splits * args.partial_rows * (HS + 2);
    weigh_unit<KV, HS>(unit, own, warp, lane);
    unit_barrier();
    if (warp < HS / 16) sum_unit<KV, HS>(args, unit, own, partial, warp, lane);
    unit_barrier();
    if (unit.first_split == unit.last_split) return;
    if (thread == 0) {
        unsigned *ticket = args.tickets + unit.at * args.n_kv_heads + unit.kv_head;
        __threadfence();
        is_last = atomicAdd(ticket, 1u) == unit.last_split - unit.first_split;
        if (is_last) *ticket = 0;
        __threadfence();
    }
    unit_barrier();
    if (is_last) merge_unit<HS>(args, unit, partial, thread);
    unit_barrier(); // `is_last` was read
}
