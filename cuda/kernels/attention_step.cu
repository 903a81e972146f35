// Attention of one new token per sequence with its rotation and the merge of its splits, in one kernel (attention_step.cuh).
// Grid n_items * NKV * max_splits, block 256, shared UnitShared::BYTES.   Bound by: latency, then reading the cache once.
// Reference: rope_kv.cu and attention_decode.cu, bit for bit.
#include "attention_step.cuh"

template <class KV, int HS> DEVICE void attention_step(const StepArgs &args) {
    extern __shared__ __align__(128) uint8_t shared[];
    dependents_may_start();
    const UnitShared<KV, HS> own(shared);
    const Unit unit(args, blockIdx.x);
    Angles angles;
    if (unit.active) {
        // Keys and values of earlier steps do not depend on the predecessor.
        fetch_unit<KV, HS>(args, unit, own);
        angles = load_angles(args.table + static_cast<size_t>(unit.high) * args.n_rot, args.n_rot, true, threadIdx.x % WARP);
    }
    wait_for_predecessor();
    if (unit.active) attend_unit<KV, HS>(args, unit, own, angles);
}

#define ATTENTION_STEP(HS)                                                                                              \
    extern "C" __global__ void __launch_bounds__(UNIT_THREADS) attention_step_##HS(const StepArgs args) {           \
        attention_step<HalfKv, HS>(args);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(UNIT_THREADS) attention_step_q8_##HS(const StepArgs args) {        \
        attention_step<ByteKv, HS>(args);                                                                               \
    }
ATTENTION_STEP(16)
ATTENTION_STEP(32)
ATTENTION_STEP(64)
ATTENTION_STEP(96)
ATTENTION_STEP(128)
