// Y = W X for hundreds of columns (prefill, big batches) on Hopper: W in tiles (tiles.cuh), x f16, y f32 or f16.   Bound by: the
// tensor cores.   x [n, x_stride] f16, zero beyond n_cols   y [n, y_stride]   One matrix, no experts. Other chips: matmul_large.cu.
//
// A cluster of two blocks has 128 rows and 2 NT columns of y at a time and walks all such cells of y (`place_of`). In a block one
// thread has the copy engine bring tiles of x (64 k x NT, 128-byte swizzle) and its half of the tiles of W, which go to both blocks,
// into a ring of stages; two warpgroups of 64 rows each turn the next part of W into f16 registers while the tensor cores
// multiply. Sums are cut at the chunk borders of tiles.cuh and added in ascending order: bit for bit what matmul_small.cu gives.
// Grid: whole clusters, at most as many as the device holds at once; block 384.   Barriers: full[s] the stage's bytes are
// there; empty[s] the consumers of both blocks have done with the stage.
#include "bulk.cuh"
#include "matmul.cuh"
#include "wgmma.cuh"

// Maps of x and of the planes of W; those that the kind has not are not read.
struct WideMaps {
    TensorMap x, lo, hi, scale;
};

#if HAS_WGMMA
constexpr int STRIPES_PER_BLOCK = 8;
constexpr int CONSUMER_WARPS = 8;
constexpr int WIDE_THREADS = 384;
constexpr int CLUSTER = 2; // blocks with the same rows
// Mirrored by launch/wide.rs.
constexpr int SHARED_BYTES = 227 * 1024;
constexpr int BAND = 8; // cells of columns that are walked together: x stays in the L2 cache

template <int KIND, int NT> struct Ring {
    static constexpr int X_BYTES = NT * TILE_K * 2;
    static constexpr int W_BYTES = STRIPES_PER_BLOCK * tile_bytes(KIND);
    static constexpr int FIT = (SHARED_BYTES - 256) / (X_BYTES + W_BYTES);
    static constexpr int STAGES = FIT < 8 ? FIT : 8;
    static constexpr int SCALE_AT = STRIPES_PER_BLOCK * lo_bytes(KIND), HI_AT = SCALE_AT + STRIPES_PER_BLOCK * scale_bytes(KIND);
    static constexpr int BARRIERS = STAGES * (X_BYTES + W_BYTES); // x of all stages, W of all stages, barriers
};

// Which cell of y a cluster takes in turn: bands of columns, in a band row by row.
struct Place {
    int row, column;
};
DEVICE Place place_of(int turn, int n_row_cells, int n_column_cells) {
    const int band = turn / (n_row_cells * BAND), rest = turn - band * n_row_cells * BAND;
    const int width = min(BAND, n_column_cells - band * BAND);
    return {rest / width, band * BAND + rest % width};
}

// Writes the sums of a thread: of rows g and g + 8 of a stripe, at columns 2t and 2t + 1 of each eight.
template <int NT> DEVICE void store_sums(const MatmulArgs &args, const float (&total)[NT / 8][4], int stripe, int first_column, int lane) {
    const int column = first_column + 2 * (lane % 4), left = args.n - column;
    const size_t stride = args.y_stride;
    if (args.epilogue == GATED_F16) {
        const int row = stripe * 8 + lane / 4;
        if (row >= args.n_rows) return;
        const float bias = args.bias == nullptr ? 0.0f : args.bias[row], bias_up = args.bias_up == nullptr ? 0.0f : args.bias_up[row];
        half *y = static_cast<half *>(args.y) + column * stride + row;
#pragma unroll
        for (int i = 0; i < NT / 4; i++) {
            const int c = 8 * (i / 2) + i % 2;
            const float g = args.out_scale * total[i / 2][i % 2] + bias, u = args.out_scale * total[i / 2][i % 2 + 2] + bias_up;
            if (c < left) y[c * stride] = to_half(gate(g, u, args.alpha, args.limit));
        }
        return;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = stripe * TILE_ROWS + lane / 4 + 8 * r;
        if (row >= args.n_rows) return;
        const float bias = args.bias == nullptr ? 0.0f : args.bias[row];
        auto value = [&](int i) { return args.out_scale * total[i / 2][i % 2 + 2 * r] + bias; };
        float *y = static_cast<float *>(args.y) + column * stride + row;
        if (args.epilogue == STORE_F32) {
#pragma unroll
            for (int i = 0; i < NT / 4; i++) {
                const int c = 8 * (i / 2) + i % 2;
                if (c < left) y[c * stride] = value(i);
            }
        } else if (args.epilogue == ADD_F32) {
            constexpr int BATCH = 16; static_assert(NT / 4 % BATCH == 0, "whole batches"); // read before the first of them is written: one latency, not one a cell
#pragma unroll
            for (int first = 0; first < NT / 4; first += BATCH) {
                float old[BATCH];
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    const int c = 8 * ((first + i) / 2) + i % 2;
                    old[i] = c < left ? y[c * stride] : 0.0f;
                }
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    const int c = 8 * ((first + i) / 2) + i % 2;
                    if (c < left) y[c * stride] = old[i] + value(first + i);
                }
            }
        } else {
            half *y16 = static_cast<half *>(args.y) + column * stride + row;
#pragma unroll
            for (int i = 0; i < NT / 4; i++) {
                const int c = 8 * (i / 2) + i % 2;
                if (c < left) y16[c * stride] = to_half(value(i));
            }
        }
    }
}

template <int KIND, int NT> DEVICE void copy_all(const WideMaps &maps, const MatmulArgs &args, uint32_t x_ring, uint32_t w_ring, uint32_t full, uint32_t empty,
                                                 int n_row_cells, int n_column_cells) {
    using R = Ring<KIND, NT>;
    constexpr int STRIPES = STRIPES_PER_BLOCK / CLUSTER; // of W that this block copies
    constexpr uint16_t BOTH = (1 << CLUSTER) - 1;
    const int rank = cluster_rank();
    int stage = 0, parity = 1;
    for (int turn = blockIdx.x / CLUSTER; turn < n_row_cells * n_column_cells; turn += gridDim.x / CLUSTER) {
        const Place place = place_of(turn, n_row_cells, n_column_cells);
        const int column = (place.column * CLUSTER + rank) * NT, stripe = place.row * STRIPES_PER_BLOCK + rank * STRIPES;
        for (int tile = 0; tile < args.n_tiles; tile++) {
            const uint32_t barrier = full + 8 * stage, w = w_ring + stage * R::W_BYTES;
            barrier_wait(empty + 8 * stage, parity);
            barrier_expect(barrier, R::X_BYTES + R::W_BYTES);
            bulk_copy_box<false>(x_ring + stage * R::X_BYTES, maps.x, tile * TILE_K, column, barrier, 0);
            auto plane = [&](const TensorMap &map, int at, int bytes) { // the map's elements are 8 bytes
                bulk_copy_box<true>(w + at + rank * STRIPES * bytes, map, tile * (bytes / 8), stripe, barrier, BOTH);
            };
            plane(maps.lo, 0, lo_bytes(KIND));
            if constexpr (scale_bytes(KIND) > 0) plane(maps.scale, R::SCALE_AT, scale_bytes(KIND));
            if constexpr (hi_bytes(KIND) > 0) plane(maps.hi, R::HI_AT, hi_bytes(KIND));
            if (++stage == R::STAGES) stage = 0, parity ^= 1;
        }
    }
}

template <int KIND, int NT> DEVICE void multiply_all(const MatmulArgs &args, const uint8_t *shared, uint32_t x_ring, uint32_t full, uint32_t empty, int n_row_cells,
                                                     int n_column_cells) {
    using R = Ring<KIND, NT>;
    constexpr int STEPS = NT > 128 ? 2 : 4, PARTS = 4 / STEPS; // steps of 16 k in registers at a time; parts of a tile
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, rank = cluster_rank();
    const int per_chunk = chunk_tiles(args.n_tiles);
    int stage = 0, parity = 0;
    for (int turn = blockIdx.x / CLUSTER; turn < n_row_cells * n_column_cells; turn += gridDim.x / CLUSTER) {
        const Place place = place_of(turn, n_row_cells, n_column_cells);
        float acc[NT / 8][4], total[NT / 8][4] = {};
        uint32_t even[STEPS][4], odd[STEPS][4];
        auto dequantise = [&](uint32_t (&a)[STEPS][4], int part) {
            RawTile<KIND> raw;
            const uint8_t *w = shared + R::STAGES * R::X_BYTES + stage * R::W_BYTES;
            load_planes_shared(raw, w + warp * lo_bytes(KIND), w + R::HI_AT + warp * hi_bytes(KIND), w + R::SCALE_AT + warp * scale_bytes(KIND), lane);
#pragma unroll
            for (int s = 0; s < STEPS; s++) fragment(a[s], raw, part * STEPS + s);
        };
        // The warp has done with a stage: both blocks may copy into it.
        auto release = [&](int s) {
            if (lane < CLUSTER) barrier_arrive(empty + 8 * s, lane);
        };
        int before = stage, left = args.n_tiles; // tiles left in the row
        // Multiplies one part of a tile, and while the tensor cores are at it, gets the next part into registers.
        auto take = [&](int part, bool first, uint32_t (&now)[STEPS][4], uint32_t (&next)[STEPS][4]) {
            const uint32_t x = x_ring + stage * R::X_BYTES + 32 * STEPS * part;
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < STEPS; s++) wgmma_16(acc, now[s], describe_b(x + 32 * s), s > 0 || !first);
            wgmma_commit();
            wgmma_wait<1>(); // the part before is done
            if (part == 0 && before != stage) release(before);
            if (part + 1 < PARTS) return dequantise(next, part + 1);
            before = stage;
            if (++stage == R::STAGES) stage = 0, parity ^= 1;
            if (--left > 0) {
                barrier_wait(full + 8 * stage, parity);
                dequantise(next, 0);
            }
        };
        barrier_wait(full + 8 * stage, parity);
        dequantise(even, 0);
        while (left > 0) {
            const int n = min(per_chunk, left);
            if constexpr (PARTS == 2) {
                for (int i = 0; i < n; i++) take(0, i == 0, even, odd), take(1, false, odd, even);
            } else {
                for (int i = 0; i + 1 < n; i += 2) take(0, i == 0, even, odd), take(0, false, odd, even);
                if (n % 2 == 1) {
                    take(0, n == 1, even, odd);
                    wgmma_wait<0>();
#pragma unroll
                    for (int s = 0; s < STEPS; s++) {
#pragma unroll
                        for (int r = 0; r < 4; r++) even[s][r] = odd[s][r];
                    }
                }
            }
            wgmma_wait<0>();
#pragma unroll
            for (int j = 0; j < NT / 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    asm volatile("" : "+f"(acc[j][e])::"memory"); // written behind the compiler's back until here
                    total[j][e] += acc[j][e];
                }
            }
        }
        release(before);
        const int stripe = place.row * STRIPES_PER_BLOCK + warp;
        if (stripe < args.n_stripes) store_sums<NT>(args, total, stripe, (place.column * CLUSTER + rank) * NT, lane);
    }
}

template <int KIND, int NT> DEVICE void matmul_wide(const WideMaps &maps, const MatmulArgs &args) {
    using R = Ring<KIND, NT>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t x_ring = shared_address(shared), w_ring = x_ring + R::STAGES * R::X_BYTES;
    const uint32_t full = x_ring + R::BARRIERS, empty = full + 8 * R::STAGES;
    const int n_row_cells = (args.n_stripes + STRIPES_PER_BLOCK - 1) / STRIPES_PER_BLOCK;
    const int n_column_cells = (args.n + NT * CLUSTER - 1) / (NT * CLUSTER);
    if (threadIdx.x == 0) {
        for (int s = 0; s < R::STAGES; s++) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMER_WARPS * CLUSTER);
        }
        barriers_are_there();
    }
    cluster_sync();
    wait_for_predecessor();
    if (threadIdx.x >= CONSUMER_WARPS * WARP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == CONSUMER_WARPS * WARP) copy_all<KIND, NT>(maps, args, x_ring, w_ring, full, empty, n_row_cells, n_column_cells);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        multiply_all<KIND, NT>(args, shared, x_ring, full, empty, n_row_cells, n_column_cells);
    }
    __syncwarp();
    cluster_sync(); // no block ends while the other may write to its memory or arrive at its barriers
}

#define MATMUL_WIDE(NAME, KIND, NT)                                                                                    \
    extern "C" __global__ void __launch_bounds__(WIDE_THREADS, 1)                                                      \
        matmul_wide_##NT##_##NAME(const __grid_constant__ WideMaps maps, const __grid_constant__ MatmulArgs args) {    \
        matmul_wide<KIND, NT>(maps, args);                                                                             \
    }
#define MATMUL_WIDE_ALL(NAME, KIND) MATMUL_WIDE(NAME, KIND, 64) MATMUL_WIDE(NAME, KIND, 128) MATMUL_WIDE(NAME, KIND, 192)
MATMUL_WIDE_ALL(f16, F16)
MATMUL_WIDE_ALL(q8, Q8)
MATMUL_WIDE_ALL(q4, Q4)
MATMUL_WIDE_ALL(q4g16, Q4G16)
MATMUL_WIDE_ALL(mx4, MX4)
MATMUL_WIDE_ALL(q5, Q5)
MATMUL_WIDE_ALL(q6, Q6)
#endif
