// Routing of a mixture of experts: which experts a token uses and with what weight, and how tokens are grouped by expert.
// Reference: backend/cpu/moe.rs. All sums and orders depend on the token alone.
#include "choose.cuh"

// Chooses the n_used experts of the highest logits (ties: the lower index) and weighs them by a softmax over the chosen.
// logits [n, n_experts] f32   experts [n, n_used] i32, weights [n, n_used] f32, both in descending order of logit
// Grid n, block 32: a warp a token, n_experts <= 256.   Bound by: latency.
extern "C" __global__ void __launch_bounds__(32)
    moe_route(int *experts, float *weights, const float *logits, int n_experts, int n_used) {
    wait_for_predecessor();
    const int lane = threadIdx.x;
    const size_t token = blockIdx.x;
    float own[MAX_EXPERTS / WARP];
#pragma unroll
    for (int i = 0; i < MAX_EXPERTS / WARP; i++) {
        const int e = lane + WARP * i;
        own[i] = e < n_experts ? eligible(logits[token * n_experts + e]) : -INFINITY;
    }
    choose_experts(experts + token * n_used, weights + token * n_used, own, n_experts, n_used, lane);
}

// Groups the (token, k) pairs by expert, each expert's group padded to whole column tiles, pairs in ascending order.
// experts [n_pairs]   tile_experts [n_tiles_max], -1 beyond the last   pair_of [n_tiles_max * tile], -1 for padding
// slot_of [n_pairs]: where each pair went.   Grid 1, block 1024.
extern "C" __global__ void __launch_bounds__(1024)
    moe_group(int *tile_experts, int *pair_of, int *slot_of, const int *experts, int n_pairs, int n_experts, int tile, int n_tiles_max) {
    __shared__ int count[MAX_EXPERTS], first[MAX_EXPERTS];
    wait_for_predecessor();
    const int thread = threadIdx.x;
    for (int e = thread; e < n_experts; e += 1024) count[e] = 0;
    for (int i = thread; i < n_tiles_max; i += 1024) tile_experts[i] = -1;
    for (int i = thread; i < n_tiles_max * tile; i += 1024) pair_of[i] = -1;
    __syncthreads();
    for (int i = thread; i < n_pairs; i += 1024) atomicAdd(&count[experts[i]], 1);
    __syncthreads();
    if (thread == 0) {
        int next = 0;
        for (int e = 0; e < n_experts; e++) {
            first[e] = next;
            next += (count[e] + tile - 1) / tile;
        }
    }
    __syncthreads();
    // A warp an expert: pairs are placed in ascending order, so that the layout is the same every time.
    const int lane = thread % WARP;
    for (int e = thread / WARP; e < n_experts; e += 1024 / WARP) {
        int placed = 0;
        for (int base = 0; base < n_pairs; base += WARP) {
            const int i = base + lane;
            const bool mine = i < n_pairs && experts[i] == e;
            const unsigned ballot = __ballot_sync(0xffffffffu, mine);
            if (mine) {
                const int slot = first[e] * tile + placed + __popc(ballot & ((1u << lane) - 1));
                pair_of[slot] = i;
                slot_of[i] = slot;
            }
            placed += __popc(ballot);
        }
        for (int t = lane; t * tile < count[e]; t += WARP) tile_experts[first[e] + t] = e;
    }
}

// Rows of x for the columns of a grouped product: token = pair / n_used. Grid ceil(n / 256), block 256.
extern "C" __global__ void __launch_bounds__(256) moe_tokens(int *token_of, const int *pair_of, int n, int n_used) {
    wait_for_predecessor();
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < n) token_of[i] = pair_of[i] < 0 ? -1 : pair_of[i] / n_used;
}

// x[t] += sum over k of weights[t, k] * y[slot of (t, k)], k ascending: descending router score.
// y [slots, n_cols] f32   slot_of [n, n_used] or null if pair p is row p   Grid (ceil(n_cols / 256), n), block 256.
extern "C" __global__ void __launch_bounds__(256)
    moe_combine(float *x, const float *y, const float *weights, const int *slot_of, int n_cols, int n_used) {
    wait_for_predecessor();
    const int c = blockIdx.x * 256 + threadIdx.x;
    const size_t t = blockIdx.y;
    if (c >= n_cols) return;
    float sum = 0.0f;
    for (int k = 0; k < n_used; k++) {
        const size_t pair = t * n_used + k, row = slot_of == nullptr ? pair : slot_of[pair];
        sum = __fmaf_rn(weights[pair], y[row * n_cols + c], sum);
    }
    x[t * n_cols + c] += sum;
}
