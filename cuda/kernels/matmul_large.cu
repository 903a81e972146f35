// Y = W X for many columns (prefill, big batches): W in tiles (tiles.cuh), x f16, y f32 or f16.   Bound by: the tensor cores.
// x [rows, x_stride] f16, zero beyond n_cols   y [n, y_stride]   columns gathered and matrices chosen per column tile for experts.
// Grid (ceil(stripes / 8), ceil(n / NT), 1 or n_chunks), block 256: two warpgroups of 64 rows share a tile of NT columns of x.
// Tiles of x (64 k, 128-byte swizzle) and of W go to shared memory LOOKAHEAD tiles ahead; each warp dequantises its 16 rows in
// registers while the tensor cores multiply the tile before. Sums are cut at the chunk borders of tiles.cuh and added in ascending
// order: bit for bit what matmul_small.cu gives.
// With grid.z > 1 a block sums one chunk and writes it to `partial`; matmul_reduce adds them in order.
#include "matmul.cuh"
#include "wgmma.cuh"

constexpr int THREADS = 256;
constexpr int STRIPES_PER_BLOCK = 8;
// Mirrored by `stages` in launch/matmul.rs: other chips have less shared memory.
#if HAS_WGMMA
constexpr int LOOKAHEAD = 4;
#else
constexpr int LOOKAHEAD = 2;
#endif
constexpr int STAGES = LOOKAHEAD + 2; // the tiles ahead, the one that is multiplied, and the one before, which may still be

// Copies the tile `tile` of k of NT columns into a stage: row = column of x, 16-byte pieces swizzled by row.
template <int NT> DEVICE void copy_columns(uint32_t stage, const half *const (&source)[NT / 32], const bool (&live)[NT / 32], int tile) {
#pragma unroll
    for (int i = 0; i < NT / 32; i++) {
        const int piece = i * THREADS + threadIdx.x, column = piece / 8, part = piece % 8;
        copy_async_16(stage + column * 128 + ((part ^ (column & 7)) << 4), source[i] + tile * TILE_K + part * 8, live[i]);
    }
}

// acc += the products of one tile of k.
template <int KIND, int NT> DEVICE void multiply_tile(float (&acc)[NT / 8][4], const uint32_t (&a)[4][4], uint32_t stage) {
#if HAS_WGMMA
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma_16(acc, a[s], describe_b(stage + 32 * s));
    wgmma_commit();
#else
    const int lane = threadIdx.x % WARP, row = lane % 8, part = (lane / 8) % 2, upper = lane / 16;
#pragma unroll
    for (int s = 0; s < 4; s++) {
#pragma unroll
        for (int j = 0; j < NT / 8; j += 2) {
            uint32_t b[4];
            const int column = 8 * (j + upper) + row;
            ldmatrix_x4(b, stage + column * 128 + (((2 * s + part) ^ (column & 7)) << 4));
            mma_16x8x16(acc[j], a[s], b[0], b[1]);
            mma_16x8x16(acc[j + 1], a[s], b[2], b[3]);
        }
    }
#endif
}

// Waits until at most `PENDING` tiles are still being multiplied.
template <int PENDING> DEVICE void products_done() {
#if HAS_WGMMA
    wgmma_wait<PENDING>();
#endif
}

template <int KIND, int NT> DEVICE void matmul_large(const MatmulArgs &args) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t stages = shared_address(shared);
    constexpr int STAGE_BYTES = NT * TILE_K * 2;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first_column = blockIdx.y * NT;
    wait_for_predecessor();
    const int mat = args.mat_of == nullptr ? 0 : args.mat_of[blockIdx.y];
    if (mat < 0) return;

    const half *source[NT / 32];
    bool live[NT / 32];
#pragma unroll
    for (int i = 0; i < NT / 32; i++) {
        const int column = first_column + (i * THREADS + threadIdx.x) / 8;
        int row = column < args.n ? column : -1;
        if (args.gather != nullptr && row >= 0) row = args.gather[column];
        live[i] = row >= 0;
        source[i] = args.x + static_cast<size_t>(max(row, 0)) * args.x_stride;
    }

    const int per_chunk = chunk_tiles(args.n_tiles);
    const int begin = gridDim.z == 1 ? 0 : blockIdx.z * per_chunk;
    const int end = gridDim.z == 1 ? args.n_tiles : min(begin + per_chunk, args.n_tiles);
    // Stripes beyond the matrix repeat the last one: their sums are not written.
    const int stripe = blockIdx.x * STRIPES_PER_BLOCK + warp;
    const size_t first_tile =
        (static_cast<size_t>(mat) * args.n_stripes + min(stripe, args.n_stripes - 1)) * args.n_tiles;

    float acc[NT / 8][4] = {}, total[NT / 8][4] = {};
    const uint32_t own_tiles = stages + STAGES * STAGE_BYTES + warp * tile_bytes(KIND);
    constexpr int TILE_BYTES = STRIPES_PER_BLOCK * tile_bytes(KIND);
    auto copy = [&](int tile) {
        if (tile < end) {
            const int stage = (tile - begin) % STAGES;
            copy_columns<NT>(stages + stage * STAGE_BYTES, source, live, tile);
            copy_tile<KIND>(own_tiles + stage * TILE_BYTES, args.w, first_tile + tile, lane);
        }
        copy_async_commit();
    };
    auto dequantise = [&](uint32_t (&a)[4][4], int tile) {
        RawTile<KIND> raw;
        load_tile_shared(raw, shared + STAGES * STAGE_BYTES + warp * tile_bytes(KIND) + (tile - begin) % STAGES * TILE_BYTES, lane);
#pragma unroll
        for (int s = 0; s < 4; s++) fragment(a[s], raw, s);
    };
#pragma unroll
    for (int i = 0; i < LOOKAHEAD; i++) copy(begin + i);
    uint32_t even[4][4], odd[4][4];
    copy_async_wait<LOOKAHEAD - 1>();
    __syncwarp();
    dequantise(even, begin);
    int left_in_chunk = per_chunk;
    // Multiplies one tile; while the tensor cores are at it, dequantises the next one, whose registers were read by the tile before.
    auto take = [&](int tile, uint32_t (&now)[4][4], uint32_t (&next)[4][4]) {
        copy_async_wait<LOOKAHEAD - 2>(); // this tile and the next are there
#if __CUDA_ARCH__ >= 900
        // wgmma reads shared memory through the asynchronous proxy; mma.sync does not.
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
        __syncthreads();
        multiply_tile<KIND, NT>(acc, now, stages + (tile - begin) % STAGES * STAGE_BYTES);
        // The stage filled here was read two tiles ago, by products that every thread waited for before this barrier.
        copy(tile + LOOKAHEAD);
        products_done<1>();
        if (tile + 1 < end) dequantise(next, tile + 1);
        if (--left_in_chunk == 0 || tile + 1 == end) {
            left_in_chunk = per_chunk;
            products_done<0>();
#pragma unroll
            for (int j = 0; j < NT / 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    asm volatile("" : "+f"(acc[j][e])::"memory"); // written behind the compiler's back until here
                    total[j][e] += acc[j][e];
                    acc[j][e] = 0.0f;
                }
            }
        }
    };
    for (int tile = begin; tile < end; tile += 2) {
        take(tile, even, odd);
        if (tile + 1 < end) take(tile + 1, odd, even);
    }
    if (stripe >= args.n_stripes) return;

#pragma unroll
    for (int j = 0; j < NT / 8; j++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int column = first_column + 8 * j + 2 * (lane % 4) + e;
            if (column >= args.n) continue;
            if (args.gather != nullptr && args.gather[column] < 0) continue;
            const int row = stripe * TILE_ROWS + lane / 4;
            if (gridDim.z > 1) {
                const size_t rows = static_cast<size_t>(args.n_stripes) * TILE_ROWS;
                float *sums = args.partial + (static_cast<size_t>(blockIdx.z) * args.n + column) * rows + row;
                sums[0] = total[j][e], sums[8] = total[j][e + 2];
            } else if (args.epilogue == GATED_F16) {
                finish_gated(args, total[j][e], total[j][e + 2], mat, stripe * 8 + lane / 4, column);
            } else {
                finish(args, total[j][e], mat, row, column);
                finish(args, total[j][e + 2], mat, row + 8, column);
            }
        }
    }
}

// y from the sums of chunks, added in ascending order. Grid (ceil(stripes * 16 / 256), n), block 256; a gated matrix needs half
// the threads.
extern "C" __global__ void __launch_bounds__(256) matmul_reduce(const MatmulArgs args, int n_chunks, int column_tile) {
    wait_for_predecessor();
    const int i = blockIdx.x * 256 + threadIdx.x, column = blockIdx.y;
    const bool gated = args.epilogue == GATED_F16;
    const int rows = args.n_stripes * TILE_ROWS;
    const int mat = args.mat_of == nullptr ? 0 : args.mat_of[column / column_tile];
    if (i >= (gated ? rows / 2 : rows) || mat < 0 || (args.gather != nullptr && args.gather[column] < 0)) return;
    const int cell = gated ? i / 8 * TILE_ROWS + i % 8 : i;
    const float *sums = args.partial + static_cast<size_t>(column) * rows + cell;
    const size_t step = static_cast<size_t>(args.n) * rows;
    float sum = 0.0f, sum_up = 0.0f;
    for (int c = 0; c < n_chunks; c++) {
        sum += sums[c * step];
        if (gated) sum_up += sums[c * step + 8];
    }
    if (gated) {
        finish_gated(args, sum, sum_up, mat, i, column);
    } else {
        finish(args, sum, mat, i, column);
    }
}

#define MATMUL_LARGE(NAME, KIND, NT)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, NT == 128 ? 1 : 2)                                           \
        matmul_large_##NT##_##NAME(const MatmulArgs args) {                                                            \
        matmul_large<KIND, NT>(args);                                                                                  \
    }
#define MATMUL_LARGE_ALL(NAME, KIND) MATMUL_LARGE(NAME, KIND, 32) MATMUL_LARGE(NAME, KIND, 64) MATMUL_LARGE(NAME, KIND, 128)
MATMUL_LARGE_ALL(f16, F16)
MATMUL_LARGE_ALL(q8, Q8)
MATMUL_LARGE_ALL(q4, Q4)
MATMUL_LARGE_ALL(q4g16, Q4G16)
MATMUL_LARGE_ALL(mx4, MX4)
MATMUL_LARGE_ALL(q5, Q5)
MATMUL_LARGE_ALL(q6, Q6)
