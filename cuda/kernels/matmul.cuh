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
    const int *gather;      // large only: row of x per column, < 0 for none; null if column c is row c
    float *partial;         // large only: [n_chunks, n, rows] sums of chunks when the chunks are split over blocks
    float out_scale;        // a power of two
    const float *x_full;    // small only: f32 [n, n_cols] to normalise instead of x, or null
    const float *norm_weight; // [n_cols]
    float norm_eps;
    int n_cols;
    float alpha, limit;     // gated: clamped SwiGLU if limit > 0
    int n_rows;             // rows of y; of gate and up each if gated
    int n_stripes;          // stripes of one matrix
    int n_tiles;            // tiles of k
    int x_stride, y_stride; // elements
    int n;                  // columns in all
    int jobs_per_row;       // small with experts: jobs j of row j / jobs_per_row of x
    int epilogue;
    int early;              // small only: whether shared memory holds operands besides x (small.cuh)
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

// Writes one cell: the sum of row `row` to row `out` of y.
DEVICE void finish(const MatmulArgs &args, float sum, int mat, int row, size_t out) {
    if (row >= args.n_rows) return;
    const size_t cell = out * args.y_stride + row;
    const float v = args.out_scale * sum + (args.bias == nullptr ? 0.0f : args.bias[static_cast<size_t>(mat) * args.n_rows + row]);
    if (args.epilogue == STORE_F16) {
        static_cast<half *>(args.y)[cell] = to_half(v);
    } else if (args.epilogue == ADD_F32) {
        static_cast<float *>(args.y)[cell] += v;
    } else {
        static_cast<float *>(args.y)[cell] = v;
    }
}

// The same for a gated matrix, whose stripes have 8 rows of the gate above 8 of up.
DEVICE void finish_gated(const MatmulArgs &args, float sum, float sum_up, int mat, int row, size_t out) {
    if (row >= args.n_rows) return;
    const size_t bias_at = static_cast<size_t>(mat) * args.n_rows + row;
    const float g = args.out_scale * sum + (args.bias == nullptr ? 0.0f : args.bias[bias_at]);
    const float u = args.out_scale * sum_up + (args.bias_up == nullptr ? 0.0f : args.bias_up[bias_at]);
    static_cast<half *>(args.y)[out * args.y_stride + row] = to_half(gate(g, u, args.alpha, args.limit));
}
