// Multiplies what lies in registers and shared memory, again and again: the most that the tensor cores give, under the power that
// random operands draw.
// sink [1] f32, written only by a sum that cannot be   n_steps: each is 32 x 64 x 128 x 16 multiply-adds a warpgroup
// Grid: any, block 256, 17 KB of shared memory: two blocks fill a multiprocessor.   Bound by: tensor cores.
#include "wgmma.cuh"

// f16 in [-1, 1), different for every n.
DEVICE uint32_t random_pair(uint32_t n) {
    n ^= n >> 16, n *= 0x7feb352du, n ^= n >> 15, n *= 0x846ca68bu, n ^= n >> 16;
    const half2 v = __floats2half2_rn((n & 0xffff) / 32768.0f - 1.0f, (n >> 16) / 32768.0f - 1.0f);
    return *reinterpret_cast<const uint32_t *>(&v);
}

extern "C" __global__ void __launch_bounds__(256) peak_multiply(float *sink, int n_steps) {
    __shared__ __align__(1024) uint32_t b[128 * 64 / 2];
    for (int i = threadIdx.x; i < 128 * 64 / 2; i += 256) b[i] = random_pair(i);
    uint32_t a[4];
    for (int i = 0; i < 4; i++) a[i] = random_pair(7919 * threadIdx.x + 104729 * i + blockIdx.x);
    float d[16][4] = {};
    __syncthreads();
#if HAS_WGMMA
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); // what threads wrote, the tensor cores read
    const uint64_t at = describe_b(static_cast<uint32_t>(__cvta_generic_to_shared(b)));
    for (int step = 0; step < n_steps; step++) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 32; i++) wgmma_64x128x16(d, a, at + 2 * (i % 4)); // 32 bytes are 16 k
        wgmma_commit();
        wgmma_wait<0>();
    }
#else
    // A warp's share of the same: 16 rows and 128 columns.
    const int lane = threadIdx.x % WARP;
    for (int step = 0; step < n_steps; step++) {
        for (int i = 0; i < 32; i++) {
#pragma unroll
            for (int j = 0; j < 16; j++) mma_16x8x16(d[j], a, b[(i % 4) * 64 + lane], b[(i % 4) * 64 + 32 + lane]);
        }
    }
#endif
    float sum = 0.0f;
    for (int i = 0; i < 16; i++) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
    if (sum == 3.0e38f) *sink = sum;
}
