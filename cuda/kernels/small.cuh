// What the kernels of few columns share: where x lies in shared memory, a tile's product, the sum of the chunks of a stripe, and a block's
// way through its stripes.
#pragma once
#include "matmul.cuh"
#include "norm.cuh"

constexpr int MAX_CHUNKS = 8; // of k: `chunk_tiles`

// x in shared memory: per tile of 64 k the 16 values of lane t = 0..3 of a fragment one after another, so that a lane takes them
// with two loads; rows are 16 bytes longer than they need be.
DEVICE int shared_stride(int n_tiles) { return n_tiles * TILE_K + 8; }
DEVICE int shared_place(int k) { return k / TILE_K * TILE_K + k % 8 / 2 * 16 + k % TILE_K / 8 * 2 + k % 2; }

// A lane's operands of one tile: `own` is its place in the tile of its column.
DEVICE void take_staged(uint32_t (&b)[8], const half *own) {
    const uint4 low = reinterpret_cast<const uint4 *>(own)[0], high = reinterpret_cast<const uint4 *>(own)[1];
    b[0] = low.x, b[1] = low.y, b[2] = low.z, b[3] = low.w;
    b[4] = high.x, b[5] = high.y, b[6] = high.z, b[7] = high.w;
}

template <int KIND> DEVICE void multiply_tile(float (&acc)[4], const RawTile<KIND> &raw, const uint32_t (&b)[8]) {
#pragma unroll
    for (int s = 0; s < 4; s++) {
        uint32_t a[4];
        fragment(a, raw, s);
        mma_16x8x16(acc, a, b[2 * s], b[2 * s + 1]);
    }
}

// A warp's sums of its chunk for `n` columns: [column][row].
DEVICE void keep_partial(float *partial, const float (&acc)[4], int n, int lane) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + 8 * (e / 2), col = 2 * (lane % 4) + e % 2;
        if (col < n) partial[col * TILE_ROWS + row] = acc[e];
    }
}

// What the end of a stripe needs besides the sums, for a thread's first cell: loaded before the tiles are multiplied, so that nothing
// waits for it then.
struct Ends {
    float y, bias, bias_up;
};
// The logarithm of a stripe's rows of y: a division by one of two numbers is not two shifts, for all that the compiler knows.
DEVICE int rows_shift(bool gated) { return gated ? 3 : 4; }
static_assert(TILE_ROWS == 16, "and half of it if gated");

DEVICE Ends load_ends(const MatmulArgs &args, int mat, int stripe, int job, int cell) {
    Ends ends = {};
    const bool gated = args.epilogue == GATED_F16;
    const int shift = rows_shift(gated), row = (stripe << shift) + (cell & (1 << shift) - 1), col = cell >> shift;
    if (row >= args.n_rows || col >= args.n) return ends;
    const size_t bias_at = static_cast<size_t>(mat) * args.n_rows + row, out = args.mat_of == nullptr ? col : job;
    if (args.bias != nullptr) ends.bias = args.bias[bias_at];
    if (gated && args.bias_up != nullptr) ends.bias_up = args.bias_up[bias_at];
    if (args.epilogue == ADD_F32) ends.y = static_cast<const float *>(args.y)[out * args.y_stride + row];
    return ends;
}

// The chunks of one cell, in ascending order. Loads first: one at a time, each would wait for the sum before it.
DEVICE float sum_chunks(const float (*partial)[TILE_ROWS * 8], int n_chunks, int at) {
    float part[MAX_CHUNKS], sum = 0.0f;
#pragma unroll
    for (int c = 0; c < MAX_CHUNKS; c++) part[c] = c < n_chunks ? partial[c][at] : 0.0f;
#pragma unroll
    for (int c = 0; c < MAX_CHUNKS; c++) {
        if (c < n_chunks) sum += part[c];
    }
    return sum;
}

// Adds the chunks of a stripe and writes its rows. A thread has a cell at a time, the first of them `first`, whose ends are there.
// The operations are those of `finish` and `finish_gated`.
DEVICE void finish_stripe(const MatmulArgs &args, const float (*partial)[TILE_ROWS * 8], int mat, int stripe, int job, int n_chunks, int first,
                          const Ends &ends) {
    const bool gated = args.epilogue == GATED_F16;
    const int shift = rows_shift(gated);
    for (int cell = first; cell < args.n << shift; cell += n_chunks * WARP) {
        const int row = cell & (1 << shift) - 1, col = cell >> shift, at = col * TILE_ROWS + row, y_row = (stripe << shift) + row;
        if (y_row >= args.n_rows) continue;
        const Ends own = cell == first ? ends : load_ends(args, mat, stripe, job, cell);
        const float sum = sum_chunks(partial, n_chunks, at);
        const float v = args.out_scale * sum + own.bias;
        const size_t to = static_cast<size_t>(args.mat_of == nullptr ? col : job) * args.y_stride + y_row;
        if (gated) {
            const float u = args.out_scale * sum_chunks(partial, n_chunks, at + 8) + own.bias_up;
            static_cast<half *>(args.y)[to] = to_half(gate(v, u, args.alpha, args.limit));
        } else if (args.epilogue == STORE_F16) {
            static_cast<half *>(args.y)[to] = to_half(v);
        } else {
            static_cast<float *>(args.y)[to] = args.epilogue == ADD_F32 ? own.y + v : v;
        }
    }
}

// Tiles in flight per warp: enough bytes to cover the latency of memory, few enough registers for 16 warps an SM.
template <int KIND> __host__ __device__ constexpr int depth() {
    return KIND == F16 ? 2 : KIND == Q4 || KIND == MX4 ? 8 : 4;
}

// A block's shared memory besides x.
struct SmallShared {
    float partial[2][MAX_CHUNKS][TILE_ROWS * 8]; // sums of chunks, in turn
    float squares[8][NORM_WARPS];
};

// Columns of a row that a thread keeps in registers.
constexpr int OWN_COLUMNS = 16;

// One row that is normalised by 256 / SUMS threads, each of which reads its columns once: those whose squares it sums for SUMS of the 256
// lanes that norm.cuh sums by. The bits are those of `sum_squares`.
template <int SUMS> DEVICE void stage_row(half *xs, float *sums, const MatmulArgs &args, int thread) {
    constexpr int THREADS = NORM_LANES / SUMS;
    const int warp = thread / WARP, lane = thread % WARP, width = args.n_tiles * TILE_K;
    float v[OWN_COLUMNS], sum[SUMS] = {};
#pragma unroll
    for (int i = 0; i < OWN_COLUMNS; i++) {
        const int c = thread + i * THREADS;
        v[i] = c < args.n_cols ? args.x_full[c] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < OWN_COLUMNS; i++) sum[i % SUMS] = __fmaf_rn(v[i], v[i], sum[i % SUMS]);
#pragma unroll
    for (int s = 0; s < SUMS; s++) sum[s] = warp_sum(sum[s]);
#pragma unroll
    for (int s = 0; s < SUMS; s++) {
        if (lane == 0) sums[warp + s * (THREADS / WARP)] = sum[s];
    }
    float w[OWN_COLUMNS]; // before anything is stored: a store might change what they read, for all that the compiler knows
#pragma unroll
    for (int i = 0; i < OWN_COLUMNS; i++) {
        const int c = thread + i * THREADS;
        w[i] = c < args.n_cols ? args.norm_weight[c] : 0.0f;
    }
    __syncthreads();
    const float inverse = inverse_rms(sums, args.n_cols, args.norm_eps, lane);
#pragma unroll
    for (int i = 0; i < OWN_COLUMNS; i++) {
        const int c = thread + i * THREADS;
        if (c < width) xs[shared_place(c)] = c < args.n_cols ? to_half(v[i] * inverse * w[i]) : __float2half_rn(0.0f);
    }
    __syncthreads();
}

// Eight values of a row of f16, from the `part`-th eight on, to their places.
DEVICE void place_eight(half *row, int part, uint4 v) {
    half *target = row + shared_place(part * 8);
    *reinterpret_cast<uint32_t *>(target) = v.x, *reinterpret_cast<uint32_t *>(target + 16) = v.y;
    *reinterpret_cast<uint32_t *>(target + 32) = v.z, *reinterpret_cast<uint32_t *>(target + 48) = v.w;
}

// One row of f16. Loads first, several at a time: a store might change what they read, for all that the compiler knows.
DEVICE void stage_half_row(half *xs, const half *x, int width, int thread, int n_threads) {
    constexpr int AHEAD = 8;
    const int pieces = width / 8;
    for (int first = thread; first < pieces; first += AHEAD * n_threads) {
        uint4 v[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (first + k * n_threads < pieces) v[k] = reinterpret_cast<const uint4 *>(x)[first + k * n_threads];
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (first + k * n_threads < pieces) place_eight(xs, first + k * n_threads, v[k]);
        }
    }
    __syncthreads();
}

// x to shared memory, normalised if it comes in f32. Ends with a barrier.
DEVICE void stage_x(half *xs, float (&sums)[8][NORM_WARPS], const MatmulArgs &args, const half *x, int thread, int n_threads) {
    const int stride = shared_stride(args.n_tiles), width = args.n_tiles * TILE_K;
    if (args.x_full == nullptr) {
        if (args.n == 1) return stage_half_row(xs, x, width, thread, n_threads);
        const int pieces = width / 8;
        // As there.
        constexpr int AHEAD = 4;
        for (int first = thread; first < args.n * pieces; first += AHEAD * n_threads) {
            uint4 v[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const int i = first + k * n_threads, row = i / pieces, part = i % pieces;
                if (row < args.n) v[k] = *reinterpret_cast<const uint4 *>(x + static_cast<size_t>(row) * args.x_stride + part * 8);
            }
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const int i = first + k * n_threads, row = i / pieces, part = i % pieces;
                if (row >= args.n) break;
                place_eight(xs + row * stride, part, v[k]);
            }
        }
        __syncthreads();
        return;
    }
    if (args.n == 1 && width <= OWN_COLUMNS * n_threads) {
        if (n_threads == NORM_LANES) return stage_row<1>(xs, sums[0], args, thread);
        if (2 * n_threads == NORM_LANES) return stage_row<2>(xs, sums[0], args, thread);
    }
    const int warp = thread / WARP, lane = thread % WARP, n_warps = n_threads / WARP;
    for (int i = warp; i < args.n * NORM_WARPS; i += n_warps) {
        const int row = i / NORM_WARPS;
        sum_squares(sums[row], args.x_full + static_cast<size_t>(row) * args.n_cols, args.n_cols, i % NORM_WARPS, lane);
    }
    __syncthreads();
    for (int row = 0; row < args.n; row++) {
        const float *in = args.x_full + static_cast<size_t>(row) * args.n_cols;
        const float inverse = inverse_rms(sums[row], args.n_cols, args.norm_eps, lane);
        // As above.
        constexpr int AHEAD = 8;
        for (int first = thread; first < width; first += AHEAD * n_threads) {
            float v[AHEAD], w[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int c = first + i * n_threads;
                v[i] = c < args.n_cols ? in[c] : 0.0f, w[i] = c < args.n_cols ? args.norm_weight[c] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                const int c = first + i * n_threads;
                if (c < width) xs[row * stride + shared_place(c)] = c < args.n_cols ? to_half(v[i] * inverse * w[i]) : __float2half_rn(0.0f);
            }
        }
    }
    __syncthreads();
}

// What does not depend on the predecessor and is read after it: the norm's weights, and the biases of the first stripe.
DEVICE void prefetch_constants(const MatmulArgs &args, int mat, int block, int thread, int n_threads) {
    if (args.x_full != nullptr) {
        for (int c = thread * 32; c < args.n_cols; c += n_threads * 32) prefetch(args.norm_weight + c);
    }
    const int rows = args.epilogue == GATED_F16 ? TILE_ROWS / 2 : TILE_ROWS;
    const int first = min(block * rows, args.n_rows - 1);
    const size_t at = static_cast<size_t>(mat) * args.n_rows + first;
    if (thread == 0 && args.bias != nullptr) prefetch(args.bias + at);
    if (thread == 0 && args.bias_up != nullptr) prefetch(args.bias_up + at);
}

// Tiles of a warp that become operands while the predecessor runs.
constexpr int EARLY = 4;

constexpr int KEPT = 4 * WARP; // of a tile's operands, in shared memory: [step of 16 k][lane]

DEVICE void multiply_kept(float (&acc)[4], const uint4 *kept, const uint32_t (&b)[8]) {
    uint4 all[4];
#pragma unroll
    for (int s = 0; s < 4; s++) all[s] = kept[s * WARP];
#pragma unroll
    for (int s = 0; s < 4; s++) {
        const uint32_t a[4] = {all[s].x, all[s].y, all[s].z, all[s].w};
        mma_16x8x16(acc, a, b[2 * s], b[2 * s + 1]);
    }
}

// A warp's way: its chunk of a stripe, then of the block's next one.
struct Way {
    size_t mat_tiles;
    int begin, end, n_tiles, n_stripes, n_blocks;

    // The first of the tiles that come `depth` tiles after `tile` of `stripe`, and how many there are: of this stripe, or of the next.
    DEVICE size_t after(int &n, int stripe, int tile, int depth) const {
        const size_t here = mat_tiles + static_cast<size_t>(stripe) * n_tiles;
        if (tile + depth < end) return n = end - tile - depth, here + tile + depth;
        n = stripe + n_blocks < n_stripes ? end - begin : 0;
        return here + static_cast<size_t>(n_blocks) * n_tiles + begin;
    }
};

// Makes operands of the first tiles, of which a lane keeps its own, and loads the next ones into their registers.
template <int KIND, int DEPTH>
DEVICE void make_early(uint4 *kept, RawTile<KIND> (&raw)[DEPTH], const Planes &planes, const Way &way, int block, int lane) {
    int n_next;
    const size_t next = way.after(n_next, block, way.begin, DEPTH);
#pragma unroll
    for (int d = 0; d < min(EARLY, DEPTH); d++) {
        if (way.begin + d < way.end) {
#pragma unroll
            for (int s = 0; s < 4; s++) {
                uint32_t a[4];
                fragment(a, raw[d], s);
                kept[d * KEPT + s * WARP] = make_uint4(a[0], a[1], a[2], a[3]);
            }
        }
        if (d < n_next) load_tile(raw[d], planes, next + d, lane);
    }
}

// A lane's operands of x for one tile: from where they are staged, or from a row of f16.
template <bool STAGED> DEVICE void take_x(uint32_t (&b)[8], const half *own) {
    if constexpr (STAGED) {
        take_staged(b, own);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) b[i] = *reinterpret_cast<const uint32_t *>(own + 8 * i);
    }
}

// The stripes of block `block` of the `n_blocks` that share a product.
template <int KIND, bool STAGED> DEVICE void matmul_small(const MatmulArgs &args, SmallShared &own, uint8_t *shared, int block, int n_blocks) {
    constexpr int DEPTH = depth<KIND>();
    const int lane = threadIdx.x, warp = threadIdx.y, job = blockIdx.y;
    dependents_may_start();
    // Experts: the matrix of a job is known only once the router has run.
    if (args.mat_of != nullptr) wait_for_predecessor();
    const int mat = args.mat_of == nullptr ? 0 : args.mat_of[job];
    const half *x = args.x + static_cast<size_t>(args.mat_of == nullptr ? 0 : job / args.jobs_per_row) * args.x_stride;

    const int per_chunk = chunk_tiles(args.n_tiles), begin = warp * per_chunk, end = min(begin + per_chunk, args.n_tiles);
    const Way way = {static_cast<size_t>(mat) * args.n_stripes * args.n_tiles, begin, end, args.n_tiles, args.n_stripes, n_blocks};
    RawTile<KIND> raw[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        if (begin + d < end) load_tile(raw[d], args.w, way.mat_tiles + static_cast<size_t>(block) * args.n_tiles + begin + d, lane);
    }
    prefetch_constants(args, mat, block, warp * WARP + lane, blockDim.y * WARP);
    half *xs = reinterpret_cast<half *>(shared);
    // The first tiles become operands now, and their registers take the next ones. In shared memory, since registers are short.
    uint4 *kept = reinterpret_cast<uint4 *>(xs + args.n * shared_stride(args.n_tiles)) + warp * EARLY * KEPT + lane;
    bool is_kept = STAGED && args.early; // what the first tiles of the loop are
    if (is_kept) make_early(kept, raw, args.w, way, block, lane);
    wait_for_predecessor();
    if (STAGED) stage_x(xs, own.squares, args, x, warp * WARP + lane, blockDim.y * WARP);
    // Columns that there are not repeat the first: their sums are not written.
    const int column = lane / 4 < args.n ? lane / 4 : 0;
    const half *x_lane = STAGED ? xs + column * shared_stride(args.n_tiles) + 16 * (lane % 4)
                                : x + static_cast<size_t>(column) * args.x_stride + 2 * (lane % 4);

    int turn = 0;
    for (int stripe = block; stripe < args.n_stripes; stripe += n_blocks) {
        const Ends ends = load_ends(args, mat, stripe, job, warp * WARP + lane);
        float acc[4] = {};
        for (int tile0 = begin; tile0 < end; tile0 += DEPTH) {
            int n_next;
            const size_t next = way.after(n_next, stripe, tile0, DEPTH);
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const int tile = tile0 + d;
                const bool is_ready = STAGED && d < EARLY && is_kept;
                if (tile < end) {
                    uint32_t b[8];
                    take_x<STAGED>(b, x_lane + tile * TILE_K);
                    if (is_ready) {
                        multiply_kept(acc, kept + d * KEPT, b);
                    } else {
                        multiply_tile(acc, raw[d], b);
                    }
                }
                if (d < n_next && !is_ready) load_tile(raw[d], args.w, next + d, lane);
            }
            is_kept = false;
        }
        // The barrier of one stripe lets the other half of `partial` be written again.
        keep_partial(own.partial[turn][warp], acc, args.n, lane);
        __syncthreads();
        finish_stripe(args, own.partial[turn], mat, stripe, job, blockDim.y, warp * WARP + lane, ends);
        turn ^= 1;
    }
}
