// Copies that the copy engine of sm_90 makes, and the barriers in shared memory that say when they are there (PTX ISA,
// cp.async.bulk and mbarrier). Blocks of a cluster may write into each other's shared memory and arrive at each other's barriers.
#pragma once
#include "cluster.cuh"

// A map of a matrix in device memory as the driver encodes it (cuTensorMapEncodeTiled), passed by value as a `__grid_constant__`.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

#if __CUDA_ARCH__ >= 900
DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After this and a `cluster_sync` every block of the cluster and the copy engine see the barriers.
DEVICE void barriers_are_there() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Waits until the phase of this parity has ended.
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "again%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again%=;\n}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
// Arrives, and says that `bytes` are on their way.
DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at the barrier at the same place of block `rank` of the cluster.
DEVICE void barrier_arrive(uint32_t barrier, unsigned rank) {
    asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
                 "r"(rank)
                 : "memory");
}

// The map's box at (x, y), to the same place in every block of `mask` or in this one alone, whose barrier at the same place
// hears of it. What lies beyond the matrix is zero.
template <bool MANY> DEVICE void bulk_copy_box(uint32_t target, const TensorMap &map, int x, int y, uint32_t barrier, uint16_t mask) {
    if constexpr (MANY) {
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                     " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
                     "l"(&map), "r"(x), "r"(y), "r"(barrier), "h"(mask)
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(target),
                     "l"(&map), "r"(x), "r"(y), "r"(barrier)
                     : "memory");
    }
}
#endif
