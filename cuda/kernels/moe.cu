// Routing of a mixture of experts: which experts a token uses and with what weight, and how tokens are grouped by expert.
// Reference: backend/cpu/moe.rs. All sums and orders depend on the token alone.
#include "norm.cuh"

constexpr int MAX_EXPERTS = 256;

// Chooses the n_used experts of the highest logits (ties: the lower index) and weighs them by a softmax over the chosen.
// A warp has a token; `logits` [n_experts] f32, experts and weights [n_used] in descending order of logit.
DEVICE void choose(int *experts, float *weights, const float *logits, int n_experts, int n_used, int lane) {
    float own[MAX_EXPERTS / WARP];
    for (int i = 0; i < MAX_EXPERTS / WARP; i++) {
        const int e = lane + WARP * i;
        own[i] = e < n_experts ? logits[e] : -INFINITY;
    }
    float chosen = 0.0f, top = 0.0f, sum = 0.0f;
    for (int k = 0; k < n_used; k++) {
        float best = -INFINITY;
        int at = MAX_EXPERTS;
        for (int i = 0; i < MAX_EXPERTS / WARP; i++) {
            if (own[i] > best) best = own[i], at = lane + WARP * i;
        }
        for (int offset = 16; offset > 0; offset >>= 1) {
            const float other = __shfl_xor_sync(0xffffffffu, best, offset);
            const int other_at = __shfl_xor_sync(0xffffffffu, at, offset);
            if (other > best || (other == best && other_at < at)) best = other, at = other_at;
        }
        at = min(at, n_experts - 1); // logits that are no numbers choose some expert, not memory that is none
        for (int i = 0; i < MAX_EXPERTS / WARP; i++) {
            if (lane + WARP * i == at) own[i] = -INFINITY;
        }
        if (k == 0) top = best;
        const float w = exp_f32(best - top);
        sum += w;
        if (lane == k) chosen = w;
        if (lane == 0) experts[k] = at;
    }
    if (lane < n_used) weights[lane] = chosen / sum;
}

// The choice from logits [n, n_experts].   Grid n, block 32, n_experts <= 256.   Bound by: latency.
extern "C" __global__ void __launch_bounds__(32)
    moe_route(int *experts, float *weights, const float *logits, int n_experts, int n_used) {
    wait_for_predecessor();
    const size_t token = blockIdx.x;
    choose(experts + token * n_used, weights + token * n_used, logits + token * n_experts, n_experts, n_used, threadIdx.x);
}

// Normalises x, keeps it in f16 for the experts' products, and chooses experts from a router in f32: scores that all but tie
// are not rounded to f16 first.
// x [n, n_cols] f32   norm [n_cols]   y [n, y_stride] f16, zero from n_cols on, the bits of rms_norm
// router [n_experts, n_cols] f32, bias [n_experts] or null   Grid n, block 256, shared n_cols f32.   Bound by: reading the router.
extern "C" __global__ void __launch_bounds__(NORM_LANES)
    moe_begin(int *experts, float *weights, half *y, const float *x, const float *norm, const float *router, const float *bias,
              int n_cols, int y_stride, int n_experts, int n_used, float eps) {
    extern __shared__ float row[];
    __shared__ float partial[NORM_WARPS], scores[MAX_EXPERTS];
    wait_for_predecessor();
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const size_t token = blockIdx.x;
    const float *in = x + token * n_cols;
    half *out = y + token * y_stride;
    sum_squares(partial, in, n_cols, warp, lane);
    __syncthreads();
    const float inverse = inverse_rms(partial, n_cols, eps, lane);
    for (int c = threadIdx.x; c < y_stride; c += NORM_LANES) {
        const float v = c < n_cols ? in[c] * inverse * norm[c] : 0.0f;
        if (c < n_cols) row[c] = v;
        out[c] = to_half(v);
    }
    __syncthreads();
    for (int e = warp; e < n_experts; e += NORM_WARPS) {
        const float *w = router + static_cast<size_t>(e) * n_cols;
        float sum = 0.0f;
#pragma unroll 8
        for (int c = lane; c < n_cols; c += WARP) sum = __fmaf_rn(w[c], row[c], sum);
        sum = warp_sum(sum);
        if (lane == 0) scores[e] = sum + (bias == nullptr ? 0.0f : bias[e]);
    }
    __syncthreads();
    if (warp == 0) choose(experts + token * n_used, weights + token * n_used, scores, n_experts, n_used, lane);
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
