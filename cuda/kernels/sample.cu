// Chooses a token from each row of logits, as engine/sampler defines it: the same token and the same bits of log probability.
// logits [n, stride] f32, adjusted in place   rows [n]   the rest: SampleArgs   n_vocab <= 2^20
// Grid (cluster, n), clusters of `cluster` blocks, block 512.   Bound by: reading the logits once (greedy); f64 exp (sampling).
// A row's weights are integers, so their sums are the same in any order and for any number of blocks; ids are ranked by
// (logit descending, id ascending), and the threshold of top-k and top-p is found by cutting the range of logits in
// eight, again and again, until the cut is at one id or one logit.   Reference: engine/sampler, bit for bit.
#include "ranks.cuh"

enum Status : unsigned { CHOSEN = 0, NOT_FINITE = 1, NOTHING_TO_CHOOSE = 2, UNUSED = 3 };

// Mirrored by `RowParams` in launch/sample.rs.
struct SampleRow {
    float temperature, top_p, min_p, repetition, presence, frequency;
    unsigned top_k, seed_low, seed_high, choice, index;
    int history;                // slot of the table of counts, < 0: no penalties
    int mask;                   // which mask, < 0: none
    int bias_first, n_bias;     // entries of one id are neighbours, in the order in which they are added
    int forbidden_first, n_forbidden;
    int n_top;                  // most likely ids to report; < 0: no log probabilities
    int is_used;                // 0: a place of the batch without a sequence
};

// Mirrored by `RowResult` in launch/sample.rs.
struct SampleResult {
    unsigned status, token;
    float value;                // the log probability, or the logit that is not finite
    unsigned n_top;
};

// Mirrored by `SampleArgs` in launch/sample.rs.
struct SampleArgs {
    float *logits;
    const SampleRow *rows;
    const unsigned *bias_ids;
    const float *biases;
    const unsigned *forbidden;
    const uint64_t *masks;      // [n_masks, mask_words]: bit i % 64 of word i / 64 allows id i
    unsigned *history;          // [slots, n_vocab]
    SampleResult *results;      // [n]
    unsigned *tokens;           // [n]
    unsigned *top_tokens;       // [n, max_top]
    float *top_logprobs;        // [n, max_top]
    int n_vocab, stride, mask_words, max_top;
};

// Bias, penalties, mask and forbidden ids, in the block's own part of the row.
DEVICE void adjust(const SampleArgs &args, const SampleRow &params, Row &row) {
    const int first = row.first_tile * TILE, end = min(row.end_tile * TILE, row.n_vocab);
    const unsigned *ids = args.bias_ids + params.bias_first;
    const float *biases = args.biases + params.bias_first;
    __syncthreads();
    for (int i = threadIdx.x; i < params.n_bias; i += THREADS) {
        const int id = ids[i];
        if (id < first || id >= end || (i > 0 && ids[i - 1] == id)) continue;
        float v = row.logits[id];
        for (int j = i; j < params.n_bias && ids[j] == id; j++) v = with_bias(v, biases[j]);
        row.logits[id] = v;
    }
    __syncthreads();
    if (params.history >= 0 || params.mask >= 0) {
        const unsigned *seen = args.history + static_cast<size_t>(max(params.history, 0)) * row.n_vocab;
        const uint64_t *mask = args.masks + static_cast<size_t>(max(params.mask, 0)) * args.mask_words;
#pragma unroll 4
        for (int id = first + threadIdx.x; id < end; id += THREADS) {
            const unsigned count = params.history >= 0 ? seen[id] : 0;
            const bool is_masked = params.mask >= 0 && !(mask[id / 64] >> (id % 64) & 1);
            // Most ids were not seen: their logits need not be read.
            if (count == 0 && !is_masked) continue;
            const float v = penalised(row.logits[id], count, params.repetition, params.presence, params.frequency);
            row.logits[id] = is_masked ? -INFINITY : v;
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < params.n_forbidden; i += THREADS) {
        const int id = args.forbidden[params.forbidden_first + i];
        if (id >= first && id < end) row.logits[id] = -INFINITY;
    }
    __syncthreads();
}

// Draws among the ids inside both cuts, in ascending order of ids; `is_listed`: all of them are listed with their weights. Gives back
// key << 32 | id in every thread.
DEVICE uint64_t draw(Shared &shared, Row &row, const SampleRow &params, unsigned max_key, Cut by_k, Cut by_p, bool is_listed) {
    const Scale scale = scale_of(logit_of(max_key), params.temperature);
    uint64_t least = fraction_of(params.min_p, WEIGHT_ONE);
    if (least == 0) least = 1;
    // What has a logit below this is surely dropped by min-p: by a hundredth more than logf and the roundings of a weight can be off.
    unsigned lowest = 0;
    if (params.min_p > 1e-6f) {
        const double share = static_cast<double>(logf(params.min_p)) - 0.01;
        lowest = key_of(__double2float_rd(logit_of(max_key) + share * static_cast<double>(params.temperature)));
    }
    auto kept = [&](int id, const float(&v)[4], uint64_t(&w)[4]) {
        bool is_kept[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const unsigned key = key_of(v[i]);
            is_kept[i] = key >= lowest && is_inside(by_k, key, id + i) && is_inside(by_p, key, id + i);
        }
        weights(w, v, scale, is_kept[0] || is_kept[1] || is_kept[2] || is_kept[3]);
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = is_kept[i] && w[i] >= least ? w[i] : 0;
        return w[0] + w[1] + w[2] + w[3];
    };
    for (int i = threadIdx.x; i < MAX_TILES; i += THREADS) shared.tile[i] = 0;
    __syncthreads();
    auto add = [&](int id, uint64_t sum) {
        atomicAdd(reinterpret_cast<unsigned long long *>(&shared.tile[id / TILE - row.first_tile]), sum);
    };
    if (is_listed) {
        for (unsigned i = threadIdx.x; i < shared.n_listed; i += THREADS) {
            const unsigned key = shared.listed[i] >> 32, id = static_cast<unsigned>(shared.listed[i]);
            if (key >= lowest && is_inside(by_k, key, id) && is_inside(by_p, key, id) && shared.mass[i] >= least) add(id, shared.mass[i]);
        }
    } else {
        for_quads<2>(row, [&](int id, const float(&v)[4]) {
            uint64_t w[4], sum = kept(id, v, w);
            if (__any_sync(0xffffffffu, sum != 0)) {
#pragma unroll
                for (int offset = 16; offset > 0; offset >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
                if (threadIdx.x % WARP == 0) add(id, sum);
            }
        });
    }
    __syncthreads();
    uint64_t own, total, in_tile;
    static_assert(MAX_TILES == THREADS, "a thread has a tile");
    const uint64_t tile_sum = shared.tile[threadIdx.x];
    const uint64_t tile_first = sum_before(shared, tile_sum, own);
    const uint64_t first = blocks_before(shared, row, own, total) + tile_first;
    const uint64_t target = __umul64hi(random_u64(params.seed_low, params.seed_high, params.choice, params.index), total);
    if (threadIdx.x == 0) shared.found[0] = ~0ull;
    __syncthreads();
    if (first <= target && target < first + tile_sum) shared.found[0] = threadIdx.x, shared.found[1] = first;
    __syncthreads();
    uint64_t chosen[1] = {0};
    if (shared.found[0] != ~0ull) {
        const int id = (row.first_tile + static_cast<int>(shared.found[0])) * TILE + 4 * threadIdx.x;
        const float4 quad = load_quad(row, id);
        const float v[4] = {quad.x, quad.y, quad.z, quad.w};
        uint64_t w[4], sum = kept(id, v, w);
        uint64_t running = shared.found[1] + sum_before(shared, sum, in_tile);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (running <= target && target < running + w[i]) chosen[0] = static_cast<uint64_t>(key_of(v[i])) << 32 | (id + i);
            running += w[i];
        }
    }
    join<1, true>(shared, row, chosen);
    return chosen[0];
}

DEVICE float logprob(float logit, float max, double log_total) {
    return __double2float_rn(__dsub_rn(__dsub_rn(static_cast<double>(logit), static_cast<double>(max)), log_total));
}

// ln of the sum of exp(logit - max).
DEVICE double log_of_total(Shared &shared, Row &row, float max) {
    uint64_t total[1] = {0};
    const Scale scale = scale_of(max, 1.0f);
    for_quads<2>(row, [&](int, const float(&v)[4]) {
        uint64_t w[4];
        weights(w, v, scale);
        total[0] += w[0] + w[1] + w[2] + w[3];
    });
    join<1, false>(shared, row, total);
    return log_f64(__ddiv_rn(__ull2double_rn(total[0]), static_cast<double>(WEIGHT_ONE)));
}

// Writes the `n` most likely ids in order, with their log probabilities; gives back how many there are.
DEVICE unsigned report_top(Shared &shared, Row &row, unsigned n, unsigned max_key, double log_total, unsigned *tokens, float *logprobs) {
    const Cut all = {0, NO_ID};
    bool is_listed = false;
    const Cut cut = first_ranks<false>(shared, row, all, KEY_OF_SMALLEST, max_key, 1.0f, n, 1.0f, is_listed);
    __syncthreads();
    if (threadIdx.x == 0) shared.n_listed = 0;
    __syncthreads();
    for_quads<2>(row, [&](int id, const float(&v)[4]) {
        unsigned key[4];
        bool wanted[4];
        const uint64_t mass[4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) key[i] = key_of(v[i]), wanted[i] = is_inside(cut, key[i], id + i);
        append(shared, wanted, key, id, mass);
    });
    __syncthreads();
    const unsigned n_all = gather(shared, row, 0, NO_ID);
    if (row.rank == 0 && threadIdx.x < n_all) {
        const uint64_t own = shared.all[threadIdx.x];
        unsigned place = 0;
        for (unsigned j = 0; j < n_all; j++) place += rank_of(shared.all[j]) > rank_of(own);
        tokens[place] = static_cast<unsigned>(own);
        logprobs[place] = logprob(logit_of(own >> 32), logit_of(max_key), log_total);
    }
    return n_all;
}

DEVICE void sample_row(Shared &shared, Row &row, const SampleArgs &args, const SampleRow &params, int at) {
    // The first logit that is not finite, as the model gave it.
    unsigned bad = NO_ID;
    float bad_value = 0.0f, best_value = -INFINITY;
    unsigned best = 0;
    auto check = [&](int id, const float(&v)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!(fabsf(v[i]) <= LARGEST) && id + i < row.n_vocab && bad == NO_ID) bad = id + i, bad_value = v[i];
        }
    };
    auto rank = [&](int id, const float(&v)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (v[i] > best_value) best_value = v[i], best = id + i;
        }
    };
    const bool is_adjusted = params.n_bias > 0 || params.n_forbidden > 0 || params.history >= 0 || params.mask >= 0;
    if (is_adjusted) {
        for_quads<4>(row, check);
        adjust(args, params, row);
        for_quads<4>(row, rank);
    } else {
        for_quads<4>(row, [&](int id, const float(&v)[4]) {
            check(id, v);
            rank(id, v);
        });
    }
    dependents_may_start();
    uint64_t most[2] = {static_cast<uint64_t>(key_of(best_value)) << 32 | ~best, bad == NO_ID ? 0 : static_cast<uint64_t>(~bad)};
    join<2, true>(shared, row, most);
    SampleResult &result = args.results[at];
    if (most[1] != 0) {
        if (bad == ~static_cast<unsigned>(most[1])) {
            result = SampleResult{NOT_FINITE, bad, bad_value, 0};
            args.tokens[at] = 0;
        }
        return;
    }
    const unsigned max_key = most[0] >> 32;
    unsigned token = ~static_cast<unsigned>(most[0]), token_key = max_key;
    if (max_key == KEY_OF_MINUS_INFINITY) {
        if (row.rank == 0 && threadIdx.x == 0) {
            result = SampleResult{NOTHING_TO_CHOOSE, 0, 0.0f, 0};
            args.tokens[at] = 0;
        }
        return;
    }
    const float max = logit_of(max_key);
    if (params.temperature > 0.0f) {
        // Ids below this have no weight.
        const float lowest = fmaxf(__fsub_rn(max, __fmul_rn(32.0f, params.temperature)), -LARGEST);
        const unsigned floor_key = min(key_of(lowest), max_key);
        Cut by_k = {0, NO_ID}, by_p = {0, NO_ID};
        bool is_listed = false; // all ids inside the cuts so far, with their weights
        if (params.top_k > 0 && params.top_k < static_cast<unsigned>(row.n_vocab)) {
            by_k = first_ranks<false>(shared, row, by_k, floor_key, max_key, params.temperature, params.top_k, 1.0f, is_listed);
            if (is_listed) weigh_list(shared, by_k, scale_of(max, params.temperature));
        }
        if (params.top_p < 1.0f) {
            const unsigned low = ::max(floor_key, by_k.key);
            by_p = first_ranks<true>(shared, row, by_k, low, max_key, params.temperature, 0, params.top_p, is_listed);
        }
        const uint64_t chosen = draw(shared, row, params, max_key, by_k, by_p, is_listed);
        token = static_cast<unsigned>(chosen), token_key = chosen >> 32;
    }
    float value = 0.0f;
    unsigned n_top = 0;
    if (params.n_top >= 0) {
        const double log_total = log_of_total(shared, row, max);
        value = logprob(logit_of(token_key), max, log_total);
        if (params.n_top > 0) {
            const size_t first = static_cast<size_t>(at) * args.max_top;
            n_top = report_top(shared, row, params.n_top, max_key, log_total, args.top_tokens + first, args.top_logprobs + first);
        }
    }
    if (row.rank == 0 && threadIdx.x == 0) {
        result = SampleResult{CHOSEN, token, value, n_top};
        args.tokens[at] = token;
        if (params.history >= 0) {
            unsigned &seen = args.history[static_cast<size_t>(params.history) * row.n_vocab + token];
            seen = seen == 0 ? 2 : seen + 1;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const SampleArgs args) {
    __shared__ Shared shared;
    wait_for_predecessor();
    const int at = blockIdx.y;
    const SampleRow params = args.rows[at];
    Row row;
    row.logits = args.logits + static_cast<size_t>(at) * args.stride;
    row.n_vocab = args.n_vocab;
    row.by_four = args.stride % 4 == 0;
    row.rank = cluster_rank(), row.size = cluster_size(), row.phase = 0;
    const int n_tiles = (args.n_vocab + TILE - 1) / TILE, per_block = (n_tiles + row.size - 1) / row.size;
    row.first_tile = min(static_cast<int>(row.rank) * per_block, n_tiles);
    row.end_tile = min(row.first_tile + per_block, n_tiles);
    if (params.is_used) {
        sample_row(shared, row, args, params, at);
    } else if (row.rank == 0 && threadIdx.x == 0) {
        args.results[at] = SampleResult{UNUSED, 0, 0.0f, 0};
        args.tokens[at] = 0;
    }
    cluster_sync(); // no block ends while another may read its shared memory
}

// Writes what a sequence has seen into its row of the history, which is zero elsewhere: each id once, with how often it was emitted.
// counts [n_vocab]   seen [n, 2], which may be host memory   Grid ceil(n / 256), block 256.
extern "C" __global__ void __launch_bounds__(256) sample_history(unsigned *counts, const uint2 *seen, int n) {
    wait_for_predecessor();
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    const uint2 one = __ldcv(seen + i);
    counts[one.x] = 1 + one.y;
}
