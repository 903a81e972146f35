// The mean square of a row, summed in one order wherever it is needed.
#pragma once
#include "common.cuh"

constexpr int NORM_LANES = 256;              // lane i sums columns i, i + 256, ...
constexpr int NORM_WARPS = NORM_LANES / WARP; // whose sums a fixed tree adds

// The sums of warp `warp` of the 256 lanes, to partial[warp].
DEVICE void sum_squares(float *partial, const float *row, int n_cols, int warp, int lane) {
    float sum = 0.0f;
#pragma unroll 8
    for (int c = warp * WARP + lane; c < n_cols; c += NORM_LANES) sum = __fmaf_rn(row[c], row[c], sum);
    sum = warp_sum(sum);
    if (lane == 0) partial[warp] = sum;
}

// 1 / sqrt(mean + eps) from the eight sums; every lane gets it.
DEVICE float inverse_rms(const float *partial, int n_cols, float eps, int lane) {
    return rsqrtf(warp_sum(lane < NORM_WARPS ? partial[lane] : 0.0f) / n_cols + eps);
}
