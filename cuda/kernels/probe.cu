// y[i] = a * x[i] + y[i]: the smallest kernel, which shows that a context, a module and a launch work.
// x, y [n] f32.   Grid (ceil(n / 256)), block 256.   Bound by: three passes over memory.
extern "C" __global__ void probe_axpy(float *y, const float *x, float a, unsigned n) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}
