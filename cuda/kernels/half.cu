// y = x in f16, saturating, for products whose input is in f32.
// x [n, n_cols] f32   y [n, y_stride] f16, zero from n_cols on   Grid (ceil(y_stride / 256), n), block 256.   Bound by: memory.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) to_half_rows(half *y, const float *x, int n_cols, int y_stride) {
    wait_for_predecessor();
    const int c = blockIdx.x * 256 + threadIdx.x;
    if (c >= y_stride) return;
    const size_t row = blockIdx.y;
    y[row * y_stride + c] = c < n_cols ? to_half(x[row * n_cols + c]) : __float2half_rn(0.0f);
}
