// Root-mean-square normalisation (Zhang and Sennrich 2019): y = x * w / sqrt(mean(x^2) + eps), f32 in, f16 out.
// x [n, n_cols] f32   w [n_cols] f32   y [n, y_stride] f16, zero from n_cols on   rows: which rows of x, or null for 0..n.
// Grid n, block 256: one block a row, thread i sums columns i, i + 256, ..., then a fixed tree: a row's bits depend on the row alone.
// Bound by: reading x once.   Reference: f64; rel err <= 2^-10 (f16's rounding).
#include "norm.cuh"

extern "C" __global__ void __launch_bounds__(NORM_LANES)
    rms_norm(half *y, const float *x, const float *w, const unsigned *rows, int n_cols, int y_stride, float eps) {
    __shared__ float partial[NORM_WARPS];
    wait_for_predecessor();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const size_t row = rows == nullptr ? blockIdx.x : rows[blockIdx.x];
    const float *in = x + row * n_cols;
    half *out = y + static_cast<size_t>(blockIdx.x) * y_stride;
    sum_squares(partial, in, n_cols, warp, lane);
    __syncthreads();
    const float inverse = inverse_rms(partial, n_cols, eps, lane);
    for (int c = threadIdx.x; c < y_stride; c += NORM_LANES) out[c] = c < n_cols ? to_half(in[c] * inverse * w[c]) : __float2half_rn(0.0f);
}
