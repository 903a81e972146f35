// y = W x for up to 8 columns (decode): W in tiles (tiles.cuh), x f16, y f32 or f16.   Bound by: reading W once.
// x [n, x_stride] f16, zero beyond n_cols   y [n, y_stride]   n <= 8, stacked matrices chosen by `mat_of` (experts).
// A gated matrix has stripes of 8 gate rows above 8 up rows and gives 8 rows of h = act(gate, up) in f16.
// Grid (stripes, jobs), block (32, n_chunks): a warp sums one chunk of k (tiles.cuh) for 16 rows and 8 columns, then the chunks
// are added in ascending order through shared memory: the sum of a row depends on its k alone.
// Reference: dtype/*.rs decoders and an f64 product; w is rounded to f16, rel err <= 2^-10 of the sum of magnitudes.
#include "matmul.cuh"

// Tiles in flight per warp: enough bytes to cover the latency of memory, few enough registers for 16 warps an SM.
template <int KIND> __host__ __device__ constexpr int depth() { return KIND == F16 ? 2 : KIND == Q8 ? 3 : 4; }

template <int KIND>
DEVICE void accumulate(float (&acc)[4], const Planes &w, size_t first_tile, int begin, int end, const half *x_lane, bool live) {
    constexpr int DEPTH = depth<KIND>();
    const int lane = threadIdx.x;
    RawTile<KIND> raw[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        if (begin + d < end) load_tile(raw[d], w, first_tile + begin + d, lane);
    }
    wait_for_predecessor();
    for (int tile0 = begin; tile0 < end; tile0 += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int tile = tile0 + d;
            if (tile < end) {
                uint32_t b[8];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    b[i] = live ? *reinterpret_cast<const uint32_t *>(x_lane + tile * TILE_K + 8 * i) : 0u;
                }
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    uint32_t a[4];
                    fragment(a, raw[d], s);
                    mma_16x8x16(acc, a, b[2 * s], b[2 * s + 1]);
                }
                if (tile + DEPTH < end) load_tile(raw[d], w, first_tile + tile + DEPTH, lane);
            }
        }
    }
}

template <int KIND> DEVICE void matmul_small(const MatmulArgs &args) {
    __shared__ float partial[8][TILE_ROWS * 8];
    const int lane = threadIdx.x, warp = threadIdx.y, n_chunks = blockDim.y;
    const int job = blockIdx.y;
    // Experts: the matrix of a job is known only once the router has run.
    if (args.mat_of != nullptr) wait_for_predecessor();
    const int mat = args.mat_of == nullptr ? 0 : args.mat_of[job];
    const half *x = args.x + static_cast<size_t>(args.mat_of == nullptr ? 0 : job / args.jobs_per_row) * args.x_stride;

    const int per_chunk = chunk_tiles(args.n_tiles);
    const int begin = warp * per_chunk, end = min(begin + per_chunk, args.n_tiles);
    const size_t stripe = static_cast<size_t>(mat) * args.n_stripes + blockIdx.x;
    float acc[4] = {};
    const int column = lane / 4;
    const half *x_lane = x + static_cast<size_t>(column) * args.x_stride + 2 * (lane % 4);
    accumulate<KIND>(acc, args.w, stripe * args.n_tiles, begin, end, x_lane, column < args.n);
    dependents_may_start();

#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + 8 * (e / 2), col = 2 * (lane % 4) + e % 2;
        partial[warp][col * TILE_ROWS + row] = acc[e];
    }
    __syncthreads();
    const int first = warp * WARP + lane, step = n_chunks * WARP;
    if (args.epilogue == GATED_F16) {
        for (int i = first; i < args.n * 8; i += step) {
            const int row = i % 8, col = i / 8, cell = col * TILE_ROWS + row;
            float sum = 0.0f, sum_up = 0.0f;
            for (int c = 0; c < n_chunks; c++) sum += partial[c][cell], sum_up += partial[c][cell + 8];
            finish_gated(args, sum, sum_up, mat, blockIdx.x * 8 + row, args.mat_of == nullptr ? col : job);
        }
    } else {
        for (int cell = first; cell < args.n * TILE_ROWS; cell += step) {
            const int row = cell % TILE_ROWS, col = cell / TILE_ROWS;
            float sum = 0.0f;
            for (int c = 0; c < n_chunks; c++) sum += partial[c][cell];
            finish(args, sum, mat, blockIdx.x * TILE_ROWS + row, args.mat_of == nullptr ? col : job);
        }
    }
}

#define MATMUL_SMALL(NAME, KIND)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) matmul_small_##NAME(const MatmulArgs args) {                     \
        matmul_small<KIND>(args);                                                                                      \
    }
MATMUL_SMALL(f16, F16)
MATMUL_SMALL(q8, Q8)
MATMUL_SMALL(q4, Q4)
MATMUL_SMALL(q4g16, Q4G16)
MATMUL_SMALL(mx4, MX4)
MATMUL_SMALL(q5, Q5)
MATMUL_SMALL(q6, Q6)
