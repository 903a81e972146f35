// Ranks of ids in a row of logits that up to a cluster of blocks shares: sums over the row, and where the first ranks end.
//
// An id's rank is its place by (logit descending, id ascending). Whatever is summed is an integer, so that no order matters.
#pragma once
#include "cluster.cuh"
#include "sample.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
constexpr int TILE = 4 * THREADS; // ids that a block takes at once
constexpr int MAX_TILES = 512;    // 2^20 ids
constexpr int LIST = 2048;        // candidates that a block can hold
constexpr int FINISH = 256;       // candidates of all blocks that are ranked one by one
constexpr int SECTIONS = 8;
constexpr int WORDS = SECTIONS + 1;

struct Shared {
    uint64_t slot[2][WORDS]; // what the other blocks of the cluster read, in turn
    uint64_t total[WORDS];
    uint64_t part[WARPS][WORDS];
    uint64_t tile[MAX_TILES];
    uint64_t mass[LIST];
    uint64_t listed[LIST]; // key << 32 | id
    uint64_t few_mass[FINISH], few[FINISH]; // of the list, what is brought together
    uint64_t all_mass[FINISH], all[FINISH]; // of all blocks
    uint64_t found[2];
    unsigned n_listed, n_few;
};
static_assert(sizeof(Shared) <= 48 << 10, "as much as a kernel may declare");

// A row, and the part of it that this block has.
struct Row {
    float *logits;
    int n_vocab, first_tile, end_tile;
    bool by_four; // rows are aligned to 16 bytes
    unsigned rank, size;
    int phase;
};

DEVICE float4 load_quad(const Row &row, int id) {
    if (row.by_four && id + 3 < row.n_vocab) return *reinterpret_cast<const float4 *>(row.logits + id);
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = id + i < row.n_vocab ? row.logits[id + i] : -INFINITY;
    return make_float4(v[0], v[1], v[2], v[3]);
}

// Calls f(first id, logits) for every four ids of the block, warps together, ids ascending.
template <int AHEAD, class F> DEVICE void for_quads(const Row &row, F f) {
    for (int tile = row.first_tile; tile < row.end_tile; tile += AHEAD) {
        float4 quads[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int id = (tile + i) * TILE + 4 * threadIdx.x;
            quads[i] = tile + i < row.end_tile ? load_quad(row, id) : make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (tile + i >= row.end_tile) break;
            const float v[4] = {quads[i].x, quads[i].y, quads[i].z, quads[i].w};
            f((tile + i) * TILE + 4 * static_cast<int>(threadIdx.x), v);
        }
    }
}

template <bool IS_MAX> DEVICE uint64_t joined(uint64_t a, uint64_t b) { return IS_MAX ? (a > b ? a : b) : a + b; }

// Joins each value over all threads of the cluster: the sum, or the greatest. Every thread gets the result.
template <int N, bool IS_MAX = false> DEVICE void join(Shared &shared, Row &row, uint64_t (&v)[N]) {
    static_assert(N <= WORDS, "there is a place for each");
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < N; i++) {
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) v[i] = joined<IS_MAX>(v[i], __shfl_xor_sync(0xffffffffu, v[i], offset));
        if (lane == 0) shared.part[warp][i] = v[i];
    }
    __syncthreads();
    if (threadIdx.x < N) {
        uint64_t own = shared.part[0][threadIdx.x];
        for (int w = 1; w < WARPS; w++) own = joined<IS_MAX>(own, shared.part[w][threadIdx.x]);
        shared.slot[row.phase][threadIdx.x] = own;
        if (row.size == 1) shared.total[threadIdx.x] = own;
    }
    if (row.size > 1) {
        cluster_sync();
        if (threadIdx.x < N) {
            uint64_t all = 0;
            for (unsigned r = 0; r < row.size; r++) all = joined<IS_MAX>(all, from_block(&shared.slot[row.phase][threadIdx.x], r));
            shared.total[threadIdx.x] = all;
        }
    }
    __syncthreads();
    row.phase ^= 1; // a block that is ahead writes the other slot; it cannot be two ahead
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = shared.total[i];
}

// Sum of the values of the threads before this one; `total` is that of all threads of the block.
DEVICE uint64_t sum_before(Shared &shared, uint64_t v, uint64_t &total) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint64_t upto = v;
#pragma unroll
    for (int offset = 1; offset < WARP; offset <<= 1) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, upto, offset);
        if (lane >= offset) upto += other;
    }
    __syncthreads();
    if (lane == WARP - 1) shared.part[warp][0] = upto;
    __syncthreads();
    uint64_t before = 0;
    total = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += shared.part[w][0];
        total += shared.part[w][0];
    }
    __syncthreads();
    return before + upto - v;
}

// Sum of the blocks' values before this block's; `total` is that of the cluster. `own` is the same in all threads.
DEVICE uint64_t blocks_before(Shared &shared, Row &row, uint64_t own, uint64_t &total) {
    total = own;
    if (row.size == 1) return 0;
    if (threadIdx.x == 0) shared.slot[row.phase][0] = own;
    cluster_sync();
    uint64_t before = 0;
    total = 0;
    for (unsigned r = 0; r < row.size; r++) {
        const uint64_t other = from_block(&shared.slot[row.phase][0], r);
        if (r < row.rank) before += other;
        total += other;
    }
    row.phase ^= 1;
    return before;
}

// Ids that rank among the first: a key above `key`, or that key and an id up to `last`.
struct Cut {
    unsigned key, last;
};
DEVICE bool is_inside(const Cut &cut, unsigned key, unsigned id) { return key > cut.key || (key == cut.key && id <= cut.last); }

constexpr unsigned NO_ID = 0xffffffffu;

// The id of the `wanted`-th of the ids inside `outer` that have this key, in ascending order of ids.
DEVICE unsigned nth_equal(Shared &shared, Row &row, unsigned key, uint64_t wanted, Cut outer) {
    uint64_t count[1] = {0};
    auto equal = [&](int id, float v) { return key_of(v) == key && id < row.n_vocab && is_inside(outer, key, id); };
    for_quads<1>(row, [&](int id, const float(&v)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) count[0] += equal(id + i, v[i]);
    });
    uint64_t own, total;
    sum_before(shared, count[0], own);
    const uint64_t before = blocks_before(shared, row, own, total);
    uint64_t found[1] = {0};
    if (before < wanted && wanted <= before + own) {
        uint64_t running = before;
        for (int tile = row.first_tile; tile < row.end_tile; tile++) {
            const int id = tile * TILE + 4 * threadIdx.x;
            const float4 quad = load_quad(row, id);
            const float v[4] = {quad.x, quad.y, quad.z, quad.w};
            uint64_t n = 0, in_tile;
            for (int i = 0; i < 4; i++) n += equal(id + i, v[i]);
            uint64_t at = running + sum_before(shared, n, in_tile);
            for (int i = 0; i < 4; i++) {
                if (equal(id + i, v[i]) && ++at == wanted) found[0] = id + i;
            }
            running += in_tile;
            if (running >= wanted) break;
        }
    }
    join<1, true>(shared, row, found);
    return found[0];
}

// Where the ids are cut in the next step: ascending, the first is `low`, none above `high`.
DEVICE void place_cuts(unsigned (&cuts)[SECTIONS], int step, unsigned low, unsigned high, float best, float temperature) {
    const unsigned width = high - low;
    cuts[0] = low;
    for (int i = 1; i < SECTIONS; i++) {
        unsigned cut;
        if (step == 0) {
            // 16, 8, 4 ... 1/4 temperatures below the highest logit: most nuclei end there.
            cut = key_of(__fsub_rn(best, __fmul_rn(temperature, exp2f(5.0f - i))));
        } else if (width <= SECTIONS) {
            cut = low + min(static_cast<unsigned>(i), width);
        } else if (step % 2 == 1) {
            // Evenly spaced logits: their density changes slowly. Every other step halves the integers thrice, whatever the density.
            const float share = 0.125f * i;
            cut = key_of(__fadd_rn(__fmul_rn(logit_of(low), 1.0f - share), __fmul_rn(logit_of(high - 1), share)));
        } else {
            cut = low + static_cast<unsigned>(static_cast<uint64_t>(width) * i / SECTIONS);
        }
        cuts[i] = min(max(cut, cuts[i - 1]), high);
    }
}

// Appends (key, id, weight) of up to four ids to the block's list where `wanted`; warps together. Beyond LIST only the count goes on,
// until it has passed LIST.
DEVICE void append(Shared &shared, const bool (&wanted)[4], const unsigned (&key)[4], unsigned id, const uint64_t (&mass)[4]) {
    const unsigned n_own = wanted[0] + wanted[1] + wanted[2] + wanted[3], lane = threadIdx.x % WARP;
    if (!__any_sync(0xffffffffu, n_own != 0)) return;
    if (__shfl_sync(0xffffffffu, *static_cast<volatile unsigned *>(&shared.n_listed), 0) > LIST) return;
    unsigned upto = n_own;
#pragma unroll
    for (int offset = 1; offset < WARP; offset <<= 1) {
        const unsigned other = __shfl_up_sync(0xffffffffu, upto, offset);
        if (lane >= offset) upto += other;
    }
    unsigned first = 0;
    if (lane == WARP - 1) first = atomicAdd(&shared.n_listed, upto);
    first = __shfl_sync(0xffffffffu, first, WARP - 1) + upto - n_own;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (wanted[i] && first < LIST) {
            shared.listed[first] = static_cast<uint64_t>(key[i]) << 32 | (id + i);
            shared.mass[first] = mass[i];
        }
        first += wanted[i];
    }
}

// Brings together what the blocks' lists have with keys in low .. high - 1, in any order; the caller knows that it is at most FINISH.
DEVICE unsigned gather(Shared &shared, Row &row, unsigned low, unsigned high) {
    cluster_sync(); // the last gathering is over everywhere
    if (threadIdx.x == 0) shared.n_few = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < shared.n_listed; i += THREADS) {
        const unsigned key = shared.listed[i] >> 32;
        if (key < low || key >= high) continue;
        const unsigned at = atomicAdd(&shared.n_few, 1u);
        shared.few[at] = shared.listed[i];
        shared.few_mass[at] = shared.mass[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) shared.slot[row.phase][0] = shared.n_few;
    cluster_sync();
    unsigned n_all = 0;
    for (unsigned r = 0; r < row.size; r++) {
        const unsigned n_other = from_block(&shared.slot[row.phase][0], r);
        for (unsigned i = threadIdx.x; i < n_other; i += THREADS) {
            shared.all[n_all + i] = from_block(&shared.few[i], r);
            shared.all_mass[n_all + i] = from_block(&shared.few_mass[i], r);
        }
        n_all += n_other;
    }
    row.phase ^= 1;
    __syncthreads();
    return n_all;
}

// Of key << 32 | id: the greater ranks first (key descending, id ascending).
DEVICE uint64_t rank_of(uint64_t key_and_id) { return key_and_id ^ 0xffffffffull; }

// The shortest run of first ranks whose measure reaches the target, which is among few candidates; `above` is the measure above them.
template <bool BY_MASS>
DEVICE Cut finish(Shared &shared, Row &row, unsigned low, unsigned high, uint64_t above, uint64_t target) {
    const unsigned n_all = gather(shared, row, low, high);
    if (threadIdx.x < n_all) {
        const uint64_t own = rank_of(shared.all[threadIdx.x]), measure = BY_MASS ? shared.all_mass[threadIdx.x] : 1;
        uint64_t upto = above;
        for (unsigned j = 0; j < n_all; j++) {
            if (rank_of(shared.all[j]) >= own) upto += BY_MASS ? shared.all_mass[j] : 1;
        }
        if (upto >= target && upto - measure < target) shared.found[0] = shared.all[threadIdx.x];
    }
    __syncthreads();
    return Cut{static_cast<unsigned>(shared.found[0] >> 32), static_cast<unsigned>(shared.found[0])};
}

// Gives what is listed inside the cut its weight, and takes everything else off the list.
DEVICE void weigh_list(Shared &shared, Cut cut, const Scale &scale) {
    __syncthreads();
    for (unsigned i = threadIdx.x; i < shared.n_listed; i += THREADS) {
        const unsigned key = shared.listed[i] >> 32;
        const bool is_kept = is_inside(cut, key, static_cast<unsigned>(shared.listed[i]));
        shared.mass[i] = is_kept ? weight(logit_of(key), scale) : 0;
        if (!is_kept) shared.listed[i] = 0; // below every key of a logit
    }
    __syncthreads();
}

// The shortest run of first ranks, inside `outer` and not below the key `low`, whose measure reaches a target: the number of
// ids `n` (BY_MASS false), or `top_p` of the weight of all of them. All of them if their measure is less.
// `lists_all`: every id inside `outer` and not below `low` is listed, in all blocks; after it, every id of the result is. Then nobody needs
// to pass over the row again. By mass only what was listed before stays so: counting ids beside their weights took an eighth longer where
// the nucleus is large.
template <bool BY_MASS>
DEVICE Cut first_ranks(Shared &shared, Row &row, Cut outer, unsigned low, unsigned max_key, float temperature, unsigned n, float top_p,
                       bool &lists_all) {
    const float max = logit_of(max_key);
    const Scale scale = scale_of(max, temperature);
    unsigned high = max_key + 1;
    uint64_t above = 0, target = n;
    uint64_t n_from_low = ~0ull; // ids above the range and in it, where they are what is measured
    bool is_listed = lists_all;
    const int first_listed = lists_all ? 0 : 1;
    for (int step = 0;; step++) {
        unsigned cuts[SECTIONS];
        place_cuts(cuts, step, low, high, max, temperature);
        uint64_t sums[SECTIONS + 1] = {}; // from each cut up, and the number of ids
        auto take = [&](unsigned key, uint64_t measure) {
#pragma unroll
            for (int i = 0; i < SECTIONS; i++) sums[i] += key >= cuts[i] ? measure : 0;
            sums[SECTIONS] += 1;
        };
        if (is_listed) {
            for (unsigned i = threadIdx.x; i < shared.n_listed; i += THREADS) {
                const unsigned key = shared.listed[i] >> 32;
                if (key >= low && key < high) take(key, BY_MASS ? shared.mass[i] : 1);
            }
        } else {
            __syncthreads();
            if (threadIdx.x == 0) shared.n_listed = 0;
            __syncthreads();
            // What is above the range is listed as well if there is room for all of it in any block. All blocks of a row say the same: in the
            // second step each of them is here, and later on only those without a list.
            if (!BY_MASS && (step == 1 || row.size == 1)) lists_all = n_from_low <= LIST;
            const unsigned upto = lists_all ? max_key + 1 : high;
            for_quads<2>(row, [&](int id, const float(&v)[4]) {
                unsigned key[4];
                bool wanted[4];
                uint64_t measure[4] = {1, 1, 1, 1};
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    key[i] = key_of(v[i]);
                    wanted[i] = key[i] >= low && key[i] < upto && is_inside(outer, key[i], id + i);
                }
                if (BY_MASS) weights(measure, v, scale, wanted[0] || wanted[1] || wanted[2] || wanted[3]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (wanted[i] && key[i] < high) take(key[i], measure[i]);
                }
                if (step > 0) append(shared, wanted, key, id, measure);
            });
        }
        join<SECTIONS + 1>(shared, row, sums);
        if (!is_listed) is_listed = step > 0 && shared.n_listed <= LIST;
        if (step == 0) {
            if (BY_MASS) {
                target = fraction_of(top_p, sums[0]);
                if (target == 0) target = 1; // rank 0 is kept, and has 2^43
            }
            if (sums[0] < target) return Cut{low, NO_ID};
        }
        // Of an id alone in the range nothing needs to be known but that it is needed.
        if (sums[SECTIONS] == 1) return Cut{low, NO_ID};
        unsigned next = high;
        uint64_t here = above, over = above; // here: from the cut up; over: above the new range
#pragma unroll
        for (int i = SECTIONS - 1; i >= 0; i--) {
            const uint64_t sum = above + sums[i];
            if (here < target) {
                if (sum < target) {
                    next = cuts[i];
                } else {
                    low = cuts[i], high = next, over = here;
                }
                here = sum;
            }
        }
        above = over;
        if (!BY_MASS) n_from_low = here;
        if (here == target) return Cut{low, NO_ID};
        if (high - low == 1) {
            const uint64_t each = BY_MASS ? weight(logit_of(low), scale) : 1;
            const uint64_t needed = (target - above + each - 1) / each;
            if (needed * each >= here - above) return Cut{low, NO_ID};
            return Cut{low, nth_equal(shared, row, low, needed, outer)};
        }
        // Every block that had no list made one in this step, for its own were few enough.
        if (step >= first_listed && sums[SECTIONS] <= FINISH) return finish<BY_MASS>(shared, row, low, high, above, target);
    }
}
