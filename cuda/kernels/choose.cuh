// The choice of experts from a token's scores, by one warp: the highest first, ties to the lower index, weighed by a softmax over the chosen.
#pragma once
#include "common.cuh"

constexpr int MAX_EXPERTS = 256;

// A score as the choice takes it: what is no number ranks last, since an expert must exist.
DEVICE float eligible(float score) { return score > -INFINITY ? score : -INFINITY; }

// own[i] is the eligible score of expert lane + 32 i, and -INFINITY where there is none; n_experts <= 32 PER_LANE, n_used <= 32.
// experts, weights [n_used]: of this token, in descending order of score.
template <int PER_LANE>
DEVICE void choose_experts(int *experts, float *weights, const float (&own)[PER_LANE], int n_experts, int n_used, int lane) {
    unsigned taken = 0; // bit i: own[i] was chosen
    float chosen = 0.0f, top = 0.0f, sum = 0.0f;
    for (int k = 0; k < n_used; k++) {
        float best = -INFINITY;
        int at = MAX_EXPERTS;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int e = lane + WARP * i;
            if (e < n_experts && !(taken >> i & 1) && (own[i] > best || at == MAX_EXPERTS)) best = own[i], at = e;
        }
        for (int offset = 16; offset > 0; offset >>= 1) {
            const float other = __shfl_xor_sync(0xffffffffu, best, offset);
            const int other_at = __shfl_xor_sync(0xffffffffu, at, offset);
            if (other > best || (other == best && other_at < at)) best = other, at = other_at;
        }
        at = min(at, n_experts - 1); // logits that are no numbers choose some expert, not memory that is none
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            if (lane + WARP * i == at) taken |= 1u << i;
        }
        if (k == 0) top = best;
        const float w = exp_f32(best - top);
        sum += w;
        if (lane == k) chosen = w;
        if (lane == 0) experts[k] = at;
    }
    if (lane < n_used) weights[lane] = chosen / sum;
}
