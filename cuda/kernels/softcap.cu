// x = cap * tanh(x / cap), in place (Gemma 2's logits).
// x [n] f32   Grid ceil(n / 256), block 256.   Bound by: memory.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) softcap(float *x, unsigned long long n, float cap) {
    wait_for_predecessor();
    const size_t i = static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x;
    if (i < n) x[i] = cap * tanhf(x[i] / cap);
}
