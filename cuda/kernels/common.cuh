// What every kernel needs: warp reductions in a fixed order, 16-byte loads, tensor-core instructions.
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>

#define DEVICE __device__ __forceinline__

constexpr int WARP = 32;

// Programmatic dependent launch: the next kernel of the stream may start, up to its own wait, once every block of this one has
// said so; its wait lasts until this one has ended and its results can be seen. So it is said first of all, and nothing that
// the predecessor writes or reads is touched before the wait. Both are no-ops before sm_90 and in launches without the attribute.
DEVICE void dependents_may_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_predecessor() {
    dependents_may_start();
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Butterfly: every lane ends with the same sum, added in the same order.
DEVICE float warp_sum(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}
DEVICE float warp_max(float v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

// Sum over a block of up to 32 warps; `partial` is 32 floats of shared memory. Every thread gets the sum.
DEVICE float block_sum(float v, float *partial) {
    v = warp_sum(v);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warps = (blockDim.x + WARP - 1) / WARP;
    __syncthreads();
    if (lane == 0) partial[warp] = v;
    __syncthreads();
    return warp_sum(lane < n_warps ? partial[lane] : 0.0f);
}

// f32 to f16, saturating: an activation beyond f16's range must not become infinite.
DEVICE half to_half(float v) { return __float2half_rn(fminf(fmaxf(v, -65504.0f), 65504.0f)); }

// exp, one definition for every kernel: the same argument gives the same bits everywhere.
DEVICE float exp_f32(float v) { return expf(v); }
DEVICE float sigmoid(float v) { return 1.0f / (1.0f + exp_f32(-v)); }

// Weights are read once: keep them out of L1.
DEVICE uint4 load_stream(const uint4 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
DEVICE uint2 load_stream(const uint2 *p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
DEVICE uint32_t load_stream(const uint32_t *p) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

// Asks for the line of `p` to be near when it is read.
DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }

// d += a b for a 16 x 8 tile over 16 k (PTX ISA, mma.m16n8k16). Lane 4g + t holds of a the rows g and g + 8 at k = 2t,
// 2t + 1, 2t + 8, 2t + 9, of b column g at the same k, of d rows g and g + 8 at columns 2t, 2t + 1.
DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// 16 bytes from global to shared memory, the first `bytes` of them as they are and zeros for the rest.
DEVICE void copy_async_16(uint32_t target, const void *source, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}
DEVICE void copy_async_16(uint32_t target, const void *source, bool valid) { copy_async_16(target, source, valid ? 16 : 0); }
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
