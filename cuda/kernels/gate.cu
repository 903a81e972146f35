// h = act(gate, up) of two products that could not be fused because their matrices are of different kinds.
// g, u [n, n_rows] f32   h [n, h_stride] f16   Grid (ceil(n_rows / 256), n), block 256.   Bound by: reading g and u once.
// The same f32 operations as the epilogue of the products, so that fusing changes no bit.
#include "matmul.cuh"

extern "C" __global__ void __launch_bounds__(256)
    gate_up(half *h, const float *g, const float *u, int n_rows, int h_stride, float alpha, float limit) {
    wait_for_predecessor();
    const int row = blockIdx.x * 256 + threadIdx.x;
    if (row >= n_rows) return;
    const size_t column = blockIdx.y, cell = column * n_rows + row;
    h[column * h_stride + row] = to_half(gate(g[cell], u[cell], alpha, limit));
}
