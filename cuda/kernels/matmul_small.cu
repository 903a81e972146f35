// y = W x for up to 8 columns (decode): W in tiles (tiles.cuh), x f16, y f32 or f16.   Bound by: reading W once.
// x [n, x_stride] f16, zero beyond n_cols, or f32 rows to normalise first   y [n, y_stride]   n <= 8
// A gated matrix has stripes of 8 gate rows above 8 up rows and gives 8 rows of h = act(gate, up) in f16.
// Grid (blocks, jobs), block (32, n_chunks): a block keeps x in shared memory and takes every gridDim.x-th stripe; a warp sums
// one chunk of k (tiles.cuh) for 16 rows and 8 columns, then the chunks are added in ascending order: the sum of a row
// depends on its k alone. Tiles are loaded far ahead, across stripes, and before the preceding kernel has ended.
// Stacked matrices are chosen by `mat_of` (experts), a job each.
// Reference: dtype/*.rs decoders and an f64 product; w is rounded to f16, rel err <= 2^-10 of the sum of magnitudes.
#include "small.cuh"

#define MATMUL_SMALL(NAME, KIND)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_small_##NAME(const MatmulArgs args) {                  \
        extern __shared__ __align__(128) uint8_t shared[];                                                             \
        __shared__ SmallShared own;                                                                                    \
        matmul_small<KIND, true>(args, own, shared, blockIdx.x, gridDim.x);                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) matmul_small_wide_##NAME(const MatmulArgs args) {             \
        __shared__ SmallShared own;                                                                                    \
        matmul_small<KIND, false>(args, own, nullptr, blockIdx.x, gridDim.x);                                          \
    }
MATMUL_SMALL(f16, F16)
MATMUL_SMALL(q8, Q8)
MATMUL_SMALL(q4, Q4)
MATMUL_SMALL(q4g16, Q4G16)
MATMUL_SMALL(mx4, MX4)
MATMUL_SMALL(q5, Q5)
MATMUL_SMALL(q6, Q6)
