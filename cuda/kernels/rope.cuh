// Rotation of one head of one token by a warp, and how a row is written into the paged cache (kv.cuh).
#pragma once
#include "kv.cuh"

constexpr int MAX_DIM = 128;
// An 8-bit group's largest magnitude becomes 127 times an f16 scale; beyond this their product could round to infinity.
constexpr float BYTE_LIMIT = 64000.0f;
constexpr unsigned NO_SLOT = 0xffffffffu; // a row of the batch without a token: nothing is written

// A lane's share of a position's angles: those of pairs lane and lane + 32.
struct Angles {
    float cosine[MAX_DIM / 2 / WARP], sine[MAX_DIM / 2 / WARP];
};

// `row`: n_rot / 2 cosines, then as many sines.
DEVICE Angles load_angles(const float *row, int n_rot, bool rotates, int lane) {
    Angles angles;
#pragma unroll
    for (int p = 0; p < MAX_DIM / 2 / WARP; p++) {
        const int i = lane + p * WARP;
        const bool there = rotates && i < n_rot / 2;
        angles.cosine[p] = there ? row[i] : 1.0f, angles.sine[p] = there ? row[n_rot / 2 + i] : 0.0f;
    }
    return angles;
}

// in(i) gives an element of the head, store(i, v) takes the rotated one. norm [dim] or null: RMS normalisation before the rotation.
template <class In, class Store>
DEVICE void rotate_head(const In &in, const Store &store, const Angles &angles, const float *norm, float norm_eps, int n_rot, int dim,
                        bool interleaved, int lane) {
    const int half_rot = n_rot / 2;
    float inverse = 1.0f;
    if (norm != nullptr) {
        float sum = 0.0f;
        for (int i = lane; i < dim; i += WARP) sum = __fmaf_rn(in(i), in(i), sum);
        inverse = rsqrtf(warp_sum(sum) / dim + norm_eps);
    }
    constexpr int PAIRS = MAX_DIM / 2 / WARP;
    float first[PAIRS], second[PAIRS]; // all before anything is stored: a store might change what they read, for all that the compiler knows
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        const int i = lane + p * WARP;
        if (i < half_rot) first[p] = in(interleaved ? 2 * i : i), second[p] = in(interleaved ? 2 * i + 1 : i + half_rot);
    }
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
        const int i = lane + p * WARP;
        if (i >= half_rot) break;
        const int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half_rot;
        float x = first[p], y = second[p];
        if (norm != nullptr) x *= inverse * norm[a], y *= inverse * norm[b];
        // Written so that no compiler contracts it differently in two places.
        store(a, __fmaf_rn(x, angles.cosine[p], -__fmul_rn(y, angles.sine[p])));
        store(b, __fmaf_rn(y, angles.cosine[p], __fmul_rn(x, angles.sine[p])));
    }
    for (int i = n_rot + lane; i < dim; i += WARP) store(i, norm != nullptr ? in(i) * inverse * norm[i] : in(i));
}

// One row of the 8-bit cache from its elements in shared memory, the rounding of backend/cpu/kv.rs: bytes to `bytes`, the scale of
// group g to scales[32 g].
DEVICE void store_bytes(uint8_t *bytes, half *scales, const float *row, int dim, int lane) {
    for (int group = 0; group * 32 < dim; group++) {
        const int i = group * 32 + lane;
        const float v = i < dim ? fminf(fmaxf(row[i], -BYTE_LIMIT), BYTE_LIMIT) : 0.0f;
        const float scale = __fdiv_rn(warp_max(fabsf(v)), 127.0f);
        const float inverse = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale);
        const int q = min(max(__float2int_rz(roundf(__fmul_rn(v, inverse))), -128), 127);
        bytes[i] = static_cast<uint8_t>(q + 128);
        if (lane == 0) scales[group * KV_BLOCK_TOKENS] = __float2half_rn(scale);
    }
}

// One row of the f16 cache.
DEVICE void store_halves(half *out, const float *row, int dim, int lane) {
    for (int i = lane; i < dim; i += WARP) out[i] = to_half(row[i]);
}
