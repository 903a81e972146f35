// What the matrix kernels share: their arguments, and what becomes of a finished sum.
#pragma once
#include "tiles.cuh"

// What is done with y = out_scale * sum + bias.
enum Epilogue : int { STORE_F32 = 0, ADD_F32 = 1, STORE_F16 = 2, GATED_F16 = 3 };

// Mirrored by `MatmulArgs` in launch/matmul.rs.
struct MatmulArgs {
    Planes w;
    const half *x;          // [rows of x, x_stride]
    void *y;                // [rows of y, y_stride], f32 or f16
    const float *bias;      // [n_mats, n_rows] or null; of the gate if gated
    const float *bias_up;   // gated only: [n_mats, n_rows] or null
    const int *mat_of;      // per job (small) or column tile (large): the matrix; null if there is one. < 0: nothing to do
    const int *gather;      // large only: row of x per column, < 0 for none; null if column n is row n
    float *partial;         // large only: [n_chunks, n, rows] sums of chunks when the chunks are split over blocks
    float out_scale;        // a power of two
    float alpha, limit;     // gated: clamped SwiGLU if limit > 0
    int n_rows;             // rows of y; of gate and up each if gated
    int n_stripes;          // stripes of one matrix; gate and up interleaved if gated
    int n_tiles;            // tiles of k
    int x_stride, y_stride; // elements
    int n;                  // columns in all
    int jobs_per_row;       // small with experts: jobs j of row j / jobs_per_row of x
    int epilogue;
};

// The gate of a feed-forward network, g and u in f32.
DEVICE float gate(float g, float u, float alpha, float limit) {
    if (limit > 0.0f) {
        g = fminf(g, limit);
        u = fminf(fmaxf(u, -limit), limit);
        return g * sigmoid(alpha * g) * (u + 1.0f);
    }
    return g * sigmoid(g) * u;
}

// Writes one cell: sum[0] of row `row` (sum[0], sum[1]: gate and up) to row `out` of y.
template <int STRIPES> DEVICE void finish(const MatmulArgs &args, const float (&sum)[STRIPES], int mat, int row, size_t out) {
    if (row >= args.n_rows) return;
    const size_t cell = out * args.y_stride + row, bias_at = static_cast<size_t>(mat) * args.n_rows + row;
    const float v = args.out_scale * sum[0] + (args.bias == nullptr ? 0.0f : args.bias[bias_at]);
    if constexpr (STRIPES == 2) {
        const float u = args.out_scale * sum[1] + (args.bias_up == nullptr ? 0.0f : args.bias_up[bias_at]);
        static_cast<half *>(args.y)[cell] = to_half(gate(v, u, args.alpha, args.limit));
    } else if (args.epilogue == STORE_F16) {
        static_cast<half *>(args.y)[cell] = to_half(v);
    } else if (args.epilogue == ADD_F32) {
        static_cast<float *>(args.y)[cell] += v;
    } else {
        static_cast<float *>(args.y)[cell] = v;
    }
}
