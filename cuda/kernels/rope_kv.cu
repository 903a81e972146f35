// Rotates q and k and writes k and v into the paged cache (Su et al. 2021, kv layout below).
// qkv [n, qkv_stride] f32: per token NH heads of q, then at k_first NKV heads of k, at v_first NKV heads of v
// table [n_ctx, n_rot] f32: per position n_rot / 2 cosines, then as many sines   positions, slots [n]
// q_out [n, NH * HS] f16   cache k, v: kv.cuh, f16 or 8 bit, slot = 32 * block + token
// q_norm, k_norm [HS] f32 or null: RMS normalisation of each head before the rotation.
// Grid (n, (NH + 2 NKV) / 8 rounded up), block (32, 8): a warp has one head of one token.   Bound by: reading qkv once.
#include "rope.cuh"

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
    const float *row = args.table + static_cast<size_t>(is_v ? 0 : args.positions[token]) * args.n_rot;
    const Angles angles = load_angles(row, args.n_rot, !is_v, lane);
    wait_for_predecessor();
    if (slot == NO_SLOT) return;
    auto store = [&](int i, float v) {
        if (as_bytes) rotated[i] = v; else out[i] = to_half(v);
    };
    if (is_v) {
        for (int i = lane; i < dim; i += WARP) store(i, in[i]);
    } else {
        rotate_head([&](int i) { return in[i]; }, store, angles, is_q ? args.q_norm : args.k_norm, args.norm_eps, args.n_rot, dim,
                    args.interleaved, lane);
    }
    if (as_bytes) {
        __syncwarp();
        const unsigned at = slot % KV_BLOCK_TOKENS;
        store_bytes(rows + at * byte_row(dim), reinterpret_cast<half *>(rows + KV_BLOCK_TOKENS * byte_row(dim)) + at, rotated, dim, lane);
    }
}

extern "C" __global__ void __launch_bounds__(32 * HEADS_PER_BLOCK) rope_kv(const RopeKvArgs args) { rope_kv<false>(args); }
extern "C" __global__ void __launch_bounds__(32 * HEADS_PER_BLOCK) rope_kv_q8(const RopeKvArgs args) { rope_kv<true>(args); }
