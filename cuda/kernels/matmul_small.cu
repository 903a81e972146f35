// y = W x for up to 8 columns (decode): W in tiles (tiles.cuh), x f16, y f32 or f16.   Bound by: reading W once.
// x [n, x_stride] f16, zero beyond n_cols   y [n, y_stride]   n <= 8, stacked matrices chosen by `mat_of` (experts).
// Grid (stripes, jobs), block (32, n_chunks): a warp sums one chunk of k (tiles.cuh) for 16 rows and 8 columns, then the chunks
// are added in ascending order through shared memory: the sum of a row depends on its k alone.
// Reference: dtype/*.rs decoders and an f64 product; w is rounded to f16, rel err <= 2^-10 of the sum of magnitudes.
#include "matmul.cuh"

// Tiles in flight per warp: enough bytes to cover the latency of memory, few enough registers for 16 warps an SM.
template <int KIND> __host__ __device__ constexpr int depth() { return KIND == F16 ? 2 : KIND == Q8 ? 3 : 4; }

template <int KIND, int STRIPES>
DEVICE void accumulate(float (&acc)[STRIPES][4], const Planes &w, size_t first_tile, size_t stripe_tiles, int begin, int end,
                       const half *x_lane, bool live) {
    constexpr int DEPTH = depth<KIND>();
    const int lane = threadIdx.x;
    RawTile<KIND> raw[DEPTH][STRIPES];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        if (begin + d < end) {
#pragma unroll
            for (int i = 0; i < STRIPES; i++) load_tile(raw[d][i], w, first_tile + i * stripe_tiles + begin + d, lane);
        }
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
                for (int i = 0; i < STRIPES; i++) {
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        uint32_t a[4];
                        fragment(a, raw[d][i], s);
                        mma_16x8x16(acc[i], a, b[2 * s], b[2 * s + 1]);
                    }
                    if (tile + DEPTH < end) load_tile(raw[d][i], w, first_tile + i * stripe_tiles + tile + DEPTH, lane);
                }
            }
        }
    }
}

template <int KIND, int STRIPES> DEVICE void matmul_small(const MatmulArgs &args) {
    __shared__ float partial[8][STRIPES][TILE_ROWS * 8];
    const int lane = threadIdx.x, warp = threadIdx.y, n_chunks = blockDim.y;
    const int job = blockIdx.y;
    // Experts: the matrix of a job is known only once the router has run.
    if (args.mat_of != nullptr) wait_for_predecessor();
    const int mat = args.mat_of == nullptr ? 0 : args.mat_of[job];
    const half *x = args.x + static_cast<size_t>(args.mat_of == nullptr ? 0 : job / args.jobs_per_row) * args.x_stride;

    const int per_chunk = chunk_tiles(args.n_tiles);
    const int begin = warp * per_chunk, end = min(begin + per_chunk, args.n_tiles);
    const size_t stripe = static_cast<size_t>(mat) * args.n_stripes + static_cast<size_t>(blockIdx.x) * STRIPES;
    float acc[STRIPES][4] = {};
    const int column = lane / 4;
    const half *x_lane = x + static_cast<size_t>(column) * args.x_stride + 2 * (lane % 4);
    accumulate<KIND, STRIPES>(acc, args.w, stripe * args.n_tiles, args.n_tiles, begin, end, x_lane, column < args.n);
    dependents_may_start();

#pragma unroll
    for (int i = 0; i < STRIPES; i++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = lane / 4 + 8 * (e / 2), col = 2 * (lane % 4) + e % 2;
            partial[warp][i][col * TILE_ROWS + row] = acc[i][e];
        }
    }
    __syncthreads();
    for (int cell = warp * WARP + lane; cell < args.n * TILE_ROWS; cell += n_chunks * WARP) {
        const int row = cell % TILE_ROWS, col = cell / TILE_ROWS;
        float sum[STRIPES] = {};
        for (int c = 0; c < n_chunks; c++) {
#pragma unroll
            for (int i = 0; i < STRIPES; i++) sum[i] += partial[c][i][cell];
        }
        const size_t out_row = args.mat_of == nullptr ? col : job;
        finish<STRIPES>(args, sum, mat, blockIdx.x * TILE_ROWS + row, out_row);
    }
}

#define MATMUL_SMALL(NAME, KIND)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) matmul_small_##NAME(const MatmulArgs args) {                     \
        matmul_small<KIND, 1>(args);                                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) matmul_small_gated_##NAME(const MatmulArgs args) {               \
        matmul_small<KIND, 2>(args);                                                                                   \
    }
MATMUL_SMALL(f16, F16)
MATMUL_SMALL(q8, Q8)
MATMUL_SMALL(q4, Q4)
MATMUL_SMALL(q4g16, Q4G16)
MATMUL_SMALL(mx4, MX4)
MATMUL_SMALL(q5, Q5)
MATMUL_SMALL(q6, Q6)
