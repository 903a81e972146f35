// What the kernels of few columns share: where x lies in shared memory, a tile's product, and the sum of the chunks of a stripe.
#pragma once
#include "matmul.cuh"

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

// A warp's sums of its chunk: [column][row].
DEVICE void keep_partial(float *partial, const float (&acc)[4], int lane) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + 8 * (e / 2), col = 2 * (lane % 4) + e % 2;
        partial[col * TILE_ROWS + row] = acc[e];
    }
}

// What the end of a stripe needs besides the sums, for a thread's first cell: loaded before the tiles are multiplied, so that nothing
// waits for it then.
struct Ends {
    float y, bias, bias_up;
};
DEVICE Ends load_ends(const MatmulArgs &args, int mat, int stripe, int job, int cell) {
    Ends ends = {};
    const bool gated = args.epilogue == GATED_F16;
    const int rows = gated ? TILE_ROWS / 2 : TILE_ROWS, row = stripe * rows + cell % rows, col = cell / rows;
    if (row >= args.n_rows || col >= args.n) return ends;
    const size_t bias_at = static_cast<size_t>(mat) * args.n_rows + row, out = args.mat_of == nullptr ? col : job;
    if (args.bias != nullptr) ends.bias = args.bias[bias_at];
    if (gated && args.bias_up != nullptr) ends.bias_up = args.bias_up[bias_at];
    if (args.epilogue == ADD_F32) ends.y = static_cast<const float *>(args.y)[out * args.y_stride + row];
    return ends;
}

// Adds the chunks of a stripe and writes its rows. A thread has a cell at a time, the first of them `first`, whose ends are there.
// The operations are those of `finish` and `finish_gated`.
DEVICE void finish_stripe(const MatmulArgs &args, const float (*partial)[TILE_ROWS * 8], int mat, int stripe, int job, int n_chunks, int first,
                          const Ends &ends) {
    const bool gated = args.epilogue == GATED_F16;
    const int rows = gated ? TILE_ROWS / 2 : TILE_ROWS;
    for (int cell = first; cell < args.n * rows; cell += n_chunks * WARP) {
        const int row = cell % rows, col = cell / rows, at = col * TILE_ROWS + row, y_row = stripe * rows + row;
        if (y_row >= args.n_rows) continue;
        const Ends own = cell == first ? ends : load_ends(args, mat, stripe, job, cell);
        float sum = 0.0f;
        for (int c = 0; c < n_chunks; c++) sum += partial[c][at];
        const float v = args.out_scale * sum + own.bias;
        const size_t to = static_cast<size_t>(args.mat_of == nullptr ? col : job) * args.y_stride + y_row;
        if (gated) {
            float sum_up = 0.0f;
            for (int c = 0; c < n_chunks; c++) sum_up += partial[c][at + 8];
            const float u = args.out_scale * sum_up + own.bias_up;
            static_cast<half *>(args.y)[to] = to_half(gate(v, u, args.alpha, args.limit));
        } else if (args.epilogue == STORE_F16) {
            static_cast<half *>(args.y)[to] = to_half(v);
        } else {
            static_cast<float *>(args.y)[to] = args.epilogue == ADD_F32 ? own.y + v : v;
        }
    }
}
