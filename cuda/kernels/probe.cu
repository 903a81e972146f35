// y[i] = a * x[i] + y[i]: the smallest kernel, which shows that a context, a module and a launch work.
// x, y [n] f32.   Grid (ceil(n / 256)), block 256.   Bound by: three passes over memory.
extern "C" __global__ void probe_axpy(float *y, const float *x, float a, unsigned n) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}

// Reads n uint4 and keeps nothing but their XOR where it is 1: the most that memory gives.
// x [n]   sink [1]   Grid: any, block 256; a thread has four loads of 16 bytes in flight.   Bound by: reading x once.
extern "C" __global__ void __launch_bounds__(256) probe_read(uint4 *sink, const uint4 *x, unsigned long long n) {
    const size_t step = static_cast<size_t>(gridDim.x) * 256;
    uint4 all = make_uint4(0, 0, 0, 0);
    for (size_t i = static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x; i < n; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = i + j * step < n ? __ldg(x + i + j * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 4; j++) all.x ^= v[j].x, all.y ^= v[j].y, all.z ^= v[j].z, all.w ^= v[j].w;
    }
    if (all.x == 1 && all.y == 1 && all.z == 1 && all.w == 1) *sink = all;
}
