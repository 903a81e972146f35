// Rotates q and k and writes k and v into the paged cache (Su et al. 2021, kv layout below).
// qkv [n, qkv_stride] f32: per token NH heads of q, then at k_first NKV heads of k, at v_first NKV heads of v
// table [n_ctx, n_rot] f32: per position n_rot / 2 cosines, then as many sines   positions, slots [n]
// q_out [n, NH * HS] f16   cache k, v: [block][kv head][32 tokens][HS] f16, slot = 32 * block + token
// q_norm, k_norm [HS] f32 or null: RMS normalisation of each head before the rotation.
// Grid (n, NH + 2 NKV), block 32: a warp has one head of one token.   Bound by: reading qkv once.
#include "common.cuh"

constexpr int BLOCK_TOKENS = 32;
constexpr unsigned NO_SLOT = 0xffffffffu; // a row of the batch without a token: nothing is written

// Mirrored by `RopeKvArgs` in launch/attention.rs.
struct RopeKvArgs {
    const float *qkv, *table, *q_norm, *k_norm;
    const unsigned *positions, *slots;
    half *q_out, *k_cache, *v_cache;
    float norm_eps;
    int qkv_stride, k_first, v_first;
    int n_heads, n_kv_heads, head_dim, n_rot;
    int interleaved; // pairs (2i, 2i + 1), else (i, i + n_rot / 2)
};

extern "C" __global__ void __launch_bounds__(32) rope_kv(const RopeKvArgs args) {
    wait_for_predecessor();
    const int token = blockIdx.x, head = blockIdx.y, lane = threadIdx.x, dim = args.head_dim;
    const bool is_q = head < args.n_heads, is_v = head >= args.n_heads + args.n_kv_heads;
    const int kv_head = is_q ? 0 : (head - args.n_heads) % args.n_kv_heads;
    const float *in = args.qkv + static_cast<size_t>(token) * args.qkv_stride +
                      (is_q ? head * dim : (is_v ? args.v_first : args.k_first) + kv_head * dim);
    half *out;
    if (is_q) {
        out = args.q_out + (static_cast<size_t>(token) * args.n_heads + head) * dim;
    } else {
        const unsigned slot = args.slots[token];
        if (slot == NO_SLOT) return;
        const size_t row = (static_cast<size_t>(slot / BLOCK_TOKENS) * args.n_kv_heads + kv_head) * BLOCK_TOKENS + slot % BLOCK_TOKENS;
        out = (is_v ? args.v_cache : args.k_cache) + row * dim;
    }
    dependents_may_start();
    if (is_v) {
        for (int i = lane; i < dim; i += WARP) out[i] = to_half(in[i]);
        return;
    }
    const float *norm = is_q ? args.q_norm : args.k_norm;
    float inverse = 1.0f;
    if (norm != nullptr) {
        float sum = 0.0f;
        for (int i = lane; i < dim; i += WARP) sum += in[i] * in[i];
        inverse = rsqrtf(warp_sum(sum) / dim + args.norm_eps);
    }
    const int half_rot = args.n_rot / 2;
    const float *cosines = args.table + static_cast<size_t>(args.positions[token]) * args.n_rot, *sines = cosines + half_rot;
    for (int i = lane; i < half_rot; i += WARP) {
        const int a = args.interleaved ? 2 * i : i, b = args.interleaved ? 2 * i + 1 : i + half_rot;
        float x = in[a], y = in[b];
        if (norm != nullptr) x *= inverse * norm[a], y *= inverse * norm[b];
        // Written so that no compiler contracts it differently in two places.
        out[a] = to_half(__fmaf_rn(x, cosines[i], -__fmul_rn(y, sines[i])));
        out[b] = to_half(__fmaf_rn(y, cosines[i], __fmul_rn(x, sines[i])));
    }
    for (int i = args.n_rot + lane; i < dim; i += WARP) out[i] = to_half(norm != nullptr ? in[i] * inverse * norm[i] : in[i]);
}
