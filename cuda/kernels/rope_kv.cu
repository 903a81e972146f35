// Rotates q and k and writes k and v into the paged cache (Su et al. 2021, kv layout below).
// qkv [n, qkv_stride] f32: per token NH heads of q, then at k_first NKV heads of k, at v_first NKV heads of v
// table [n_ctx, n_rot] f32: per position n_rot / 2 cosines, then as many sines   positions, slots [n]
// q_out [n, NH * HS] f16   cache k, v: kv.cuh, f16 or 8 bit, slot = 32 * block + token
// q_norm, k_norm [HS] f32 or null: RMS normalisation of each head before the rotation.
// Grid (n, (NH + 2 NKV) / 8 rounded up), block (32, 8): a warp has one head of one token.   Bound by: reading qkv once.
#include "kv.cuh"

constexpr int MAX_DIM = 128;
// An 8-bit group's largest magnitude becomes 127 times an f16 scale; beyond this their product could round to infinity.
constexpr float BYTE_LIMIT = 64000.0f;
constexpr unsigned NO_SLOT = 0xffffffffu; // a row of the batch without a token: nothing is written

// Mirrored by `RopeKvArgs` in launch/attention.rs.
struct RopeKvArgs {
    const float *qkv, *table, *q_norm, *k_norm;
    const unsigned *positions, *slots;
    half *q_out;
    uint8_t *k_cache, *v_cache;
    float norm_eps;
    int qkv_stride, k_first, v_first;
    int n_heads, n_kv_heads, head_dim, n_rot;
    int interleaved; // pairs (2i, 2i + 1), else (i, i + n_rot / 2)
};

// One row of the 8-bit cache from its elements in shared memory: the rounding of backend/cpu/kv.rs.
DEVICE void store_bytes(uint8_t *head, int token, const float *row, int dim, int lane) {
    for (int group = 0; group * 32 < dim; group++) {
        const int i = group * 32 + lane;
        const float v = i < dim ? fminf(fmaxf(row[i], -BYTE_LIMIT), BYTE_LIMIT) : 0.0f;
        const float scale = __fdiv_rn(warp_max(fabsf(v)), 127.0f);
        const float inverse = scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale);
        const int q = min(max(__float2int_rz(roundf(__fmul_rn(v, inverse))), -128), 127);
        head[token * byte_row(dim) + i] = static_cast<uint8_t>(q + 128);
        if (lane == 0) {
            half *scales = reinterpret_cast<half *>(head + KV_BLOCK_TOKENS * byte_row(dim));
            scales[group * KV_BLOCK_TOKENS + token] = __float2half_rn(scale);
        }
    }
}

constexpr int HEADS_PER_BLOCK = 8; // a warp each: blocks of one warp start more slowly than they work. Mirrored in launch/attention.rs.

template <bool BYTES> DEVICE void rope_kv(const RopeKvArgs &args) {
    __shared__ float rotated_heads[HEADS_PER_BLOCK][MAX_DIM];
    float *const rotated = rotated_heads[threadIdx.y];
    const int token = blockIdx.x, head = blockIdx.y * HEADS_PER_BLOCK + threadIdx.y, lane = threadIdx.x, dim = args.head_dim;
    if (head >= args.n_heads + 2 * args.n_kv_heads) return;
    const bool is_q = head < args.n_heads, is_v = head >= args.n_heads + args.n_kv_heads;
    const int kv_head = is_q ? 0 : (head - args.n_heads) % args.n_kv_heads;
    const float *in = args.qkv + static_cast<size_t>(token) * args.qkv_stride +
                      (is_q ? head * dim : (is_v ? args.v_first : args.k_first) + kv_head * dim);
    const unsigned slot = is_q ? 0 : args.slots[token];
    uint8_t *rows = (is_v ? args.v_cache : args.k_cache) +
                    (static_cast<size_t>(slot / KV_BLOCK_TOKENS) * args.n_kv_heads + kv_head) * (BYTES ? byte_head_bytes(dim) : half_head_bytes(dim));
    half *out = is_q ? args.q_out + (static_cast<size_t>(token) * args.n_heads + head) * dim
                     : reinterpret_cast<half *>(rows) + slot % KV_BLOCK_TOKENS * dim;
    const bool as_bytes = BYTES && !is_q;
    // Inputs of the step and tables are there before the predecessor has finished.
    const int half_rot = args.n_rot / 2;
    const float *cosines = args.table + static_cast<size_t>(is_v ? 0 : args.positions[token]) * args.n_rot;
    float cosine[MAX_DIM / 2 / WARP], sine[MAX_DIM / 2 / WARP];
#pragma unroll
    for (int p = 0; p < MAX_DIM / 2 / WARP; p++) {
        const int i = lane + p * WARP;
        const bool rotates = !is_v && i < half_rot;
        cosine[p] = rotates ? cosines[i] : 1.0f, sine[p] = rotates ? cosines[half_rot + i] : 0.0f;
    }
    wait_for_predecessor();
    if (slot == NO_SLOT) return;
    auto store = [&](int i, float v) {
        if (as_bytes) rotated[i] = v; else out[i] = to_half(v);
    };
    if (is_v) {
        for (int i = lane; i < dim; i += WARP) store(i, in[i]);
    } else {
        const float *norm = is_q ? args.q_norm : args.k_norm;
        float inverse = 1.0f;
        if (norm != nullptr) {
            float sum = 0.0f;
            for (int i = lane; i < dim; i += WARP) sum += in[i] * in[i];
            inverse = rsqrtf(warp_sum(sum) / dim + args.norm_eps);
        }
#pragma unroll
        for (int p = 0; p < MAX_DIM / 2 / WARP; p++) {
            const int i = lane + p * WARP;
            if (i >= half_rot) break;
            const int a = args.interleaved ? 2 * i : i, b = args.interleaved ? 2 * i + 1 : i + half_rot;
            float x = in[a], y = in[b];
            if (norm != nullptr) x *= inverse * norm[a], y *= inverse * norm[b];
            // Written so that no compiler contracts it differently in two places.
            store(a, __fmaf_rn(x, cosine[p], -__fmul_rn(y, sine[p])));
            store(b, __fmaf_rn(y, cosine[p], __fmul_rn(x, sine[p])));
        }
        for (int i = args.n_rot + lane; i < dim; i += WARP) store(i, norm != nullptr ? in[i] * inverse * norm[i] : in[i]);
    }
    if (as_bytes) {
        __syncwarp();
        store_bytes(rows, slot % KV_BLOCK_TOKENS, rotated, dim, lane);
    }
}

extern "C" __global__ void __launch_bounds__(32 * HEADS_PER_BLOCK) rope_kv(const RopeKvArgs args) { rope_kv<false>(args); }
extern "C" __global__ void __launch_bounds__(32 * HEADS_PER_BLOCK) rope_kv_q8(const RopeKvArgs args) { rope_kv<true>(args); }
