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

// Tiles in flight per warp: enough bytes to cover the latency of memory, few enough registers for 16 warps an SM.
template <int KIND> __host__ __device__ constexpr int depth() {
    return KIND == F16 ? 2 : KIND == Q4 || KIND == MX4 ? 8 : 4;
}

// x in shared memory: per tile of 64 k the 16 values of lane t = 0..3 of a fragment one after another, so that a lane takes them
// with two loads; rows are 16 bytes longer than they need be.
DEVICE int shared_stride(int n_tiles) { return n_tiles * TILE_K + 8; }
DEVICE int shared_place(int k) { return k / TILE_K * TILE_K + k % 8 / 2 * 16 + k % TILE_K / 8 * 2 + k % 2; }

// x to shared memory, normalised if it comes in f32. Ends with a barrier.
DEVICE void stage_x(half *xs, const MatmulArgs &args, const half *x, int thread, int n_threads) {
    const int stride = shared_stride(args.n_tiles), width = args.n_tiles * TILE_K;
    if (args.x_full == nullptr) {
        const int pieces = width / 8;
        for (int i = thread; i < args.n * pieces; i += n_threads) {
            const int row = i / pieces, part = i % pieces;
            const uint4 v = *reinterpret_cast<const uint4 *>(x + static_cast<size_t>(row) * args.x_stride + part * 8);
            half *target = xs + row * stride + shared_place(part * 8);
            *reinterpret_cast<uint32_t *>(target) = v.x, *reinterpret_cast<uint32_t *>(target + 16) = v.y;
            *reinterpret_cast<uint32_t *>(target + 32) = v.z, *reinterpret_cast<uint32_t *>(target + 48) = v.w;
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
        for (int c = thread; c < width; c += n_threads) {
            xs[row * stride + shared_place(c)] = c < args.n_cols ? to_half(in[c] * inverse * args.norm_weight[c]) : __float2half_rn(0.0f);
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

// Adds the chunks of a stripe and writes its rows. A thread has a cell at a time.
DEVICE void finish_stripe(const MatmulArgs &args, const float (*partial)[TILE_ROWS * 8], int mat, int stripe, int job) {
    const int n_chunks = blockDim.y, first = threadIdx.y * WARP + threadIdx.x, step = n_chunks * WARP;
    if (args.epilogue == GATED_F16) {
        for (int i = first; i < args.n * 8; i += step) {
            const int row = i % 8, col = i / 8, cell = col * TILE_ROWS + row;
            float sum = 0.0f, sum_up = 0.0f;
            for (int c = 0; c < n_chunks; c++) sum += partial[c][cell], sum_up += partial[c][cell + 8];
            finish_gated(args, sum, sum_up, mat, stripe * 8 + row, args.mat_of == nullptr ? col : job);
        }
    } else {
        for (int cell = first; cell < args.n * TILE_ROWS; cell += step) {
            const int row = cell % TILE_ROWS, col = cell / TILE_ROWS;
            float sum = 0.0f;
            for (int c = 0; c < n_chunks; c++) sum += partial[c][cell];
            finish(args, sum, mat, stripe * TILE_ROWS + row, args.mat_of == nullptr ? col : job);
        }
    }
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
    if (args.epilogue == ADD_F32 && warp == 0 && lane < args.n && blockIdx.x * TILE_ROWS < args.n_rows) {
        prefetch(static_cast<const float *>(args.y) + static_cast<size_t>(lane) * args.y_stride + blockIdx.x * TILE_ROWS);
    }
    half *xs = reinterpret_cast<half *>(shared);
    if (STAGED) stage_x(xs, args, x, warp * WARP + lane, blockDim.y * WARP);
    // Columns that there are not repeat the first: their sums are not written.
    const int column = lane / 4 < args.n ? lane / 4 : 0;
    const half *x_lane = STAGED ? xs + column * shared_stride(args.n_tiles) + 16 * (lane % 4)
                                : x + static_cast<size_t>(column) * args.x_stride + 2 * (lane % 4);

    int turn = 0;
    for (int stripe = blockIdx.x; stripe < args.n_stripes; stripe += gridDim.x) {
        const size_t here = mat_tiles + static_cast<size_t>(stripe) * args.n_tiles;
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
                        const uint4 *own = reinterpret_cast<const uint4 *>(x_lane + tile * TILE_K);
                        const uint4 low = own[0], high = own[1];
                        b[0] = low.x, b[1] = low.y, b[2] = low.z, b[3] = low.w;
                        b[4] = high.x, b[5] = high.y, b[6] = high.z, b[7] = high.w;
                    } else {
#pragma unroll
                        for (int i = 0; i < 8; i++) b[i] = *reinterpret_cast<const uint32_t *>(x_lane + tile * TILE_K + 8 * i);
                    }
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        uint32_t a[4];
                        fragment(a, raw[d], s);
                        mma_16x8x16(acc, a, b[2 * s], b[2 * s + 1]);
                    }
                }
                if (d < n_next) load_tile(raw[d], args.w, next + d, lane);
            }
        }
        // The barrier of one stripe lets the other half of `partial` be written again.
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = lane / 4 + 8 * (e / 2), col = 2 * (lane % 4) + e % 2;
            partial[turn][warp][col * TILE_ROWS + row] = acc[e];
        }
        __syncthreads();
        finish_stripe(args, partial[turn], mat, stripe, job);
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
