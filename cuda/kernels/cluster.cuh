// Blocks that share a row: a cluster (sm_90 and later) whose blocks read each other's shared memory, or a block alone.
#pragma once
#include "common.cuh"

DEVICE unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

DEVICE unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
    unsigned size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
#else
    return 1;
#endif
}

// Every thread of every block of the cluster; what they wrote before is visible after.
DEVICE void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The same without making anything visible: a block ends after it, and its shared memory with it, when no other reads there any more.
// What a thread has read from other blocks it must have used before.
DEVICE void cluster_leave() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The value at the same place of another block's shared memory.
DEVICE uint64_t from_block(const uint64_t *place, unsigned rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t address;
    uint64_t value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(rank));
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(address) : "memory");
    return value;
#else
    return *place;
#endif
}
DEVICE float from_block(const float *place, unsigned rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t address;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
#else
    return *place;
#endif
}
