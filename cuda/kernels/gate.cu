// h = act(gate, up) from the product of an interleaved matrix: stripes of 16 gate rows and 16 up rows in turn.
// y [n, y_stride] f32   h [n, h_stride] f16   bias, bias_up [n_mats, n_rows] or null; the matrix of column c is
// mat_of[c / column_tile], or 0.   Grid (ceil(n_rows / 256), n), block 256.   Bound by: reading y once.
// The same f32 operations as the epilogue of matmul_small.cu, so few columns and many give the same bits.
#include "matmul.cuh"

extern "C" __global__ void __launch_bounds__(256)
    gate_up(half *h, const float *y, const float *bias, const float *bias_up, const int *mat_of, int column_tile, int n_rows,
            int y_stride, int h_stride, float alpha, float limit) {
    wait_for_predecessor();
    const int row = blockIdx.x * 256 + threadIdx.x, column = blockIdx.y;
    const int mat = mat_of == nullptr ? 0 : mat_of[column / column_tile];
    dependents_may_start();
    if (row >= n_rows || mat < 0) return;
    const float *in = y + static_cast<size_t>(column) * y_stride + (row / TILE_ROWS) * 2 * TILE_ROWS + row % TILE_ROWS;
    const size_t bias_at = static_cast<size_t>(mat) * n_rows + row;
    const float g = in[0] + (bias == nullptr ? 0.0f : bias[bias_at]);
    const float u = in[TILE_ROWS] + (bias_up == nullptr ? 0.0f : bias_up[bias_at]);
    h[static_cast<size_t>(column) * h_stride + row] = to_half(gate(g, u, alpha, limit));
}
