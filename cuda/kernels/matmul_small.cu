// y = W x for up to 8 columns (decode): W in tiles (tiles.cuh), x f16, y f32 or f16.   Bound by: reading W once.
// x [n, x_stride] f16, zero beyond n_cols, or f32 rows to normalise first   y [n, y_stride]   n <= 8
// A gated matrix has stripes of 8 gate rows above 8 up rows and gives 8 rows of h = act(gate, up) in f16.
// Grid (blocks, jobs), block (32, n_chunks): a block keeps x in shared memory and takes every gridDim.x-th stripe; a warp sums
// one chunk of k (tiles.cuh) for 16 rows and 8 columns, then the chunks are added in ascending order: the sum of a row
// depends on its k alone. Tiles are loaded far ahead, across stripes, and before the preceding kernel has ended.
// Stacked matrices are chosen by `mat_of` (experts), a job each.
// Reference: dtype/*.rs decoders and an f64 product; w is rounded to f16, rel err <= 2^-10 of the sum of magnitudes.
#include "matmul.cuh"
#include "norm.cuh"
#include "small.cuh"

// Tiles in flight per warp: enough bytes to cover the latency of memory, few enough registers for 16 warps an SM.
template <int KIND> __host__ __device__ constexpr int depth() {
    return KIND == F16 ? 2 : KIND == Q4 || KIND == MX4 ? 8 : 4;
}

// x to shared memory, normalised if it comes in f32. Ends with a barrier.
DEVICE void stage_x(half *xs, const MatmulArgs &args, const half *x, int thread, int n_threads) {
    const int stride = shared_stride(args.n_tiles), width = args.n_tiles * TILE_K;
    if (args.x_full == nullptr) {
        const int pieces = width / 8;
        // Loads first, several at a time: a store might change what they read, for all that the compiler knows.
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
                half *target = xs + row * stride + shared_place(part * 8);
                *reinterpret_cast<uint32_t *>(target) = v[k].x, *reinterpret_cast<uint32_t *>(target + 16) = v[k].y;
                *reinterpret_cast<uint32_t *>(target + 32) = v[k].z, *reinterpret_cast<uint32_t *>(target + 48) = v[k].w;
            }
        }
        __syncthreads();
        return;
    }
    __shared__ float sums[8][NORM_WARPS];
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
DEVICE void prefetch_constants(const MatmulArgs &args, int mat, int thread, int n_threads) {
    if (args.x_full != nullptr) {
        for (int c = thread * 32; c < args.n_cols; c += n_threads * 32) prefetch(args.norm_weight + c);
    }
    const int rows = args.epilogue == GATED_F16 ? TILE_ROWS / 2 : TILE_ROWS;
    const int first = min(static_cast<int>(blockIdx.x) * rows, args.n_rows - 1);
    const size_t at = static_cast<size_t>(mat) * args.n_rows + first;
    if (thread == 0 && args.bias != nullptr) prefetch(args.bias + at);
    if (thread == 0 && args.bias_up != nullptr) prefetch(args.bias_up + at);
}

template <int KIND, bool STAGED> DEVICE void matmul_small(const MatmulArgs &args) {
    constexpr int DEPTH = depth<KIND>();
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ float partial[2][8][TILE_ROWS * 8];
    const int lane = threadIdx.x, warp = threadIdx.y, job = blockIdx.y;
    dependents_may_start();
    // Experts: the matrix of a job is known only once the router has run.
    if (args.mat_of != nullptr) wait_for_predecessor();
    const int mat = args.mat_of == nullptr ? 0 : args.mat_of[job];
    const half *x = args.x + static_cast<size_t>(args.mat_of == nullptr ? 0 : job / args.jobs_per_row) * args.x_stride;

    const int per_chunk = chunk_tiles(args.n_tiles);
    const int begin = warp * per_chunk, end = min(begin + per_chunk, args.n_tiles);
    const size_t mat_tiles = static_cast<size_t>(mat) * args.n_stripes * args.n_tiles;
    RawTile<KIND> raw[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        if (begin + d < end) load_tile(raw[d], args.w, mat_tiles + static_cast<size_t>(blockIdx.x) * args.n_tiles + begin + d, lane);
    }
    prefetch_constants(args, mat, warp * WARP + lane, blockDim.y * WARP);
    wait_for_predecessor();
    half *xs = reinterpret_cast<half *>(shared);
    if (STAGED) stage_x(xs, args, x, warp * WARP + lane, blockDim.y * WARP);
    // Columns that there are not repeat the first: their sums are not written.
    const int column = lane / 4 < args.n ? lane / 4 : 0;
    const half *x_lane = STAGED ? xs + column * shared_stride(args.n_tiles) + 16 * (lane % 4)
                                : x + static_cast<size_t>(column) * args.x_stride + 2 * (lane % 4);

    int turn = 0;
    for (int stripe = blockIdx.x; stripe < args.n_stripes; stripe += gridDim.x) {
        const size_t here = mat_tiles + static_cast<size_t>(stripe) * args.n_tiles;
        const Ends ends = load_ends(args, mat, stripe, job, warp * WARP + lane);
        float acc[4] = {};
        for (int tile0 = begin; tile0 < end; tile0 += DEPTH) {
            // What follows these tiles: those of this stripe, or the first ones of the next.
            const bool last = tile0 + DEPTH >= end;
            const int next_stripe = stripe + gridDim.x;
            const size_t next = last ? here + static_cast<size_t>(gridDim.x) * args.n_tiles + begin : here + tile0 + DEPTH;
            const int n_next = last ? (next_stripe < args.n_stripes ? end - begin : 0) : end - tile0 - DEPTH;
#pragma unroll
            for (int d = 0; d < DEPTH; d++) {
                const int tile = tile0 + d;
                if (tile < end) {
                    uint32_t b[8];
                    if constexpr (STAGED) {
                        take_staged(b, x_lane + tile * TILE_K);
                    } else {
#pragma unroll
                        for (int i = 0; i < 8; i++) b[i] = *reinterpret_cast<const uint32_t *>(x_lane + tile * TILE_K + 8 * i);
                    }
                    multiply_tile(acc, raw[d], b);
                }
                if (d < n_next) load_tile(raw[d], args.w, next + d, lane);
            }
        }
        // The barrier of one stripe lets the other half of `partial` be written again.
        keep_partial(partial[turn][warp], acc, lane);
        __syncthreads();
        finish_stripe(args, partial[turn], mat, stripe, job, blockDim.y, warp * WARP + lane, ends);
        turn ^= 1;
    }
}

#define MATMUL_SMALL(NAME, KIND)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_small_##NAME(const MatmulArgs args) {                  \
        matmul_small<KIND, true>(args);                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_small_wide_##NAME(const MatmulArgs args) {             \
        matmul_small<KIND, false>(args);                                                                               \
    }
MATMUL_SMALL(f16, F16)
MATMUL_SMALL(q8, Q8)
MATMUL_SMALL(q4, Q4)
MATMUL_SMALL(q4g16, Q4G16)
MATMUL_SMALL(mx4, MX4)
MATMUL_SMALL(q5, Q5)
MATMUL_SMALL(q6, Q6)
