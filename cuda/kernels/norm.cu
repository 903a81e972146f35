// Root-mean-square normalisation (Zhang and Sennrich 2019): y = x * w / sqrt(mean(x^2) + eps), f32 in, f16 out.
// x [n, n_cols] f32   w [n_cols] f32   y [n, y_stride] f16, zero from n_cols on   rows: which rows of x, or null for 0..n.
// Grid n, block 256: one block a row, a thread sums what it holds in ascending order, then a fixed tree: a row's bits depend on the row
// alone.   Bound by: reading x once; for few rows by latency, so that a row is loaded at once and the weights before x is there.
// Reference: f64; rel err <= 2^-10 (f16's rounding).
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int HELD = 8; // fours of columns that a thread holds: rows of up to 8192

DEVICE uint2 to_halves(float a, float b, float c, float d) {
    half2 low = __halves2half2(to_half(a), to_half(b)), high = __halves2half2(to_half(c), to_half(d));
    return make_uint2(*reinterpret_cast<uint32_t *>(&low), *reinterpret_cast<uint32_t *>(&high));
}

// Whole fours of columns, all of them held.
DEVICE void norm_held(half *out, const float *x, const float *w, const unsigned *rows, int n_cols, int y_stride, float eps, float *partial) {
    const int n_fours = n_cols / 4;
    float4 own[HELD], weights[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = threadIdx.x + i * THREADS;
        if (at < n_fours) weights[i] = reinterpret_cast<const float4 *>(w)[at];
    }
    wait_for_predecessor();
    const size_t row = rows == nullptr ? blockIdx.x : rows[blockIdx.x];
    const float4 *in = reinterpret_cast<const float4 *>(x + row * n_cols);
    dependents_may_start();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = threadIdx.x + i * THREADS;
        own[i] = at < n_fours ? in[at] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        sum += own[i].x * own[i].x;
        sum += own[i].y * own[i].y;
        sum += own[i].z * own[i].z;
        sum += own[i].w * own[i].w;
    }
    const float inverse = rsqrtf(block_sum(sum, partial) / n_cols + eps);
    uint2 *fours = reinterpret_cast<uint2 *>(out);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int at = threadIdx.x + i * THREADS;
        if (at < n_fours) {
            const float4 v = own[i], k = weights[i];
            fours[at] = to_halves(v.x * inverse * k.x, v.y * inverse * k.y, v.z * inverse * k.z, v.w * inverse * k.w);
        }
    }
    for (int at = n_fours + threadIdx.x; at < y_stride / 4; at += THREADS) fours[at] = make_uint2(0, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(half *y, const float *x, const float *w, const unsigned *rows, int n_cols, int y_stride, float eps) {
    __shared__ float partial[WARP];
    half *out = y + static_cast<size_t>(blockIdx.x) * y_stride;
    if (n_cols % 4 == 0 && y_stride % 4 == 0 && n_cols <= 4 * HELD * THREADS) {
        norm_held(out, x, w, rows, n_cols, y_stride, eps, partial);
        return;
    }
    wait_for_predecessor();
    const size_t row = rows == nullptr ? blockIdx.x : rows[blockIdx.x];
    const float *in = x + row * n_cols;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < n_cols; c += THREADS) sum += in[c] * in[c];
    const float inverse = rsqrtf(block_sum(sum, partial) / n_cols + eps);
    dependents_may_start();
    for (int c = threadIdx.x; c < y_stride; c += THREADS) out[c] = c < n_cols ? to_half(in[c] * inverse * w[c]) : __float2half_rn(0.0f);
}
