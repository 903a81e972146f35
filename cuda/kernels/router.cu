// The front of a mixture of experts for up to 8 tokens in one launch: normalisation, router, choice. For each token what `rms_norm`,
// `matmul_small_*` of one column and `moe_route` give, to the bit: the sums have their orders and the choice is their code.
// x [n, n_cols] f32   norm_weight [n_cols]   normed [n, normed_stride] f16, zero from n_cols on: what the experts read
// scores [n, n_experts] f32   experts [n, n_used] i32, weights [n, n_used] f32, both in descending order of score
// Grid (n_chunks, n), a cluster of n_chunks blocks a token (sm_90 and later if above 1), block 256.   Bound by: latency.
// Block c sums chunk c of k (tiles.cuh) of every stripe: its weights come to shared memory while the predecessor runs. Each block
// sums the squares of the whole row, and normalises its chunk; block 0 adds the chunks in ascending order and chooses.
// The barriers cannot wait forever: every thread of every block of a cluster comes to both cluster barriers, the blocks of a cluster are
// resident together, and no cluster waits for another.
#include "choose.cuh"
#include "cluster.cuh"
#include "small.cuh"

// Mirrored by `RouterArgs` in launch/router.rs.
struct RouterArgs {
    Planes w;
    const float *bias;        // [n_experts] or null
    const float *x;           // [n, n_cols]
    const float *norm_weight; // [n_cols]
    half *normed;             // [n, normed_stride]
    float *scores;            // [n, n_experts]
    int *experts;             // [n, n_used]
    float *weights;           // [n, n_used]
    float out_scale;          // a power of two
    float norm_eps;
    int n_cols, n_tiles, normed_stride;
    int n_experts, n_used;
};

constexpr int HELD = 16;                      // columns that a thread holds to sum their squares. Mirrored by `HELD` in launch/router.rs.
constexpr int OWN = HELD / MAX_CHUNKS;       // columns that a thread normalises
static_assert(HELD * NORM_LANES / TILE_K % MAX_CHUNKS == 0, "the longest row has whole chunks, which are the longest");

// A block's shared memory besides weights and activations.
struct RouterShared {
    float partial[MAX_EXPERTS]; // sums of this block's chunk, [expert]
    float bias[MAX_EXPERTS];
    float squares[NORM_WARPS];
};

// Adds the chunks, block after block, and chooses: one warp of one block.
template <int PER_LANE> DEVICE void add_and_choose(const RouterArgs &args, const RouterShared &own_block, int n_chunks, size_t token, int lane) {
    float own[PER_LANE];
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int e = lane + WARP * i;
        own[i] = -INFINITY;
        if (e >= args.n_experts) continue;
        float part[MAX_CHUNKS];
#pragma unroll
        for (int c = 0; c < MAX_CHUNKS; c++) part[c] = c < n_chunks ? from_block(own_block.partial + e, c) : 0.0f;
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < MAX_CHUNKS; c++) {
            if (c < n_chunks) sum += part[c];
        }
        const float v = args.out_scale * sum + own_block.bias[e]; // as `finish_stripe`
        args.scores[token * args.n_experts + e] = v;
        own[i] = eligible(v);
    }
    __syncwarp();
    choose_experts(args.experts + token * args.n_used, args.weights + token * args.n_used, own, args.n_experts, args.n_used, lane);
}

template <int KIND> DEVICE void router(const RouterArgs &args, RouterShared &own, uint8_t *shared) {
    dependents_may_start();
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP, chunk = blockIdx.x;
    const size_t token = blockIdx.y;
    const int per_chunk = chunk_tiles(args.n_tiles), n_stripes = (args.n_experts + TILE_ROWS - 1) / TILE_ROWS;
    const int begin = chunk * per_chunk, end = min(begin + per_chunk, args.n_tiles), n_own = end - begin;

    // What nobody writes: the weights of this chunk as [stripe][tile], those of the norm, the biases.
    for (int i = warp; i < n_stripes * n_own; i += NORM_WARPS) {
        const int stripe = i / n_own, tile = i % n_own;
        const uint32_t target = shared_address(shared) + (stripe * per_chunk + tile) * tile_bytes(KIND);
        copy_tile<KIND>(target, args.w, static_cast<size_t>(stripe) * args.n_tiles + begin + tile, lane);
    }
    copy_async_commit();
    float weight[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int c = begin * TILE_K + thread + i * NORM_LANES;
        weight[i] = args.norm_weight[min(c, args.n_cols - 1)];
    }
    if (thread < args.n_experts) own.bias[thread] = args.bias == nullptr ? 0.0f : args.bias[thread];
    wait_for_predecessor();

    // The sum of squares as `sum_squares` has it: a thread is one of its 256 lanes. What it normalises is loaded with them. All are loaded
    // at once, which a condition on each would prevent: a column that there is not is the last.
    const float *x = args.x + token * args.n_cols;
    float v[HELD], mine[OWN];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int c = thread + i * NORM_LANES;
        v[i] = x[min(c, args.n_cols - 1)];
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int c = begin * TILE_K + thread + i * NORM_LANES;
        mine[i] = x[min(c, args.n_cols - 1)];
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (thread + i * NORM_LANES < args.n_cols) sum = __fmaf_rn(v[i], v[i], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) own.squares[warp] = sum;
    __syncthreads();
    const float inverse = inverse_rms(own.squares, args.n_cols, args.norm_eps, lane);

    // This chunk's columns to shared memory, as `stage_x` lays them out.
    half *xs = reinterpret_cast<half *>(shared + n_stripes * per_chunk * tile_bytes(KIND));
    half normal[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int at = thread + i * NORM_LANES;
        normal[i] = begin * TILE_K + at < args.n_cols ? to_half(mine[i] * inverse * weight[i]) : __float2half_rn(0.0f);
        if (at < n_own * TILE_K) xs[shared_place(at)] = normal[i];
    }
    copy_async_wait<0>();
    __syncthreads();

    // Every column is the token's: the first is looked at.
    for (int stripe = warp; stripe < n_stripes; stripe += NORM_WARPS) {
        float acc[4] = {};
#pragma unroll 2
        for (int tile = 0; tile < n_own; tile++) {
            RawTile<KIND> raw;
            uint32_t b[8];
            load_tile_shared<KIND>(raw, shared + (stripe * per_chunk + tile) * tile_bytes(KIND), lane);
            take_staged(b, xs + tile * TILE_K + 16 * (lane % 4));
            multiply_tile(acc, raw, b);
        }
        // Column 0 is the first cell of the rows lane / 4 and lane / 4 + 8 of every fourth lane.
        if (lane % 4 == 0) {
            own.partial[stripe * TILE_ROWS + lane / 4] = acc[0];
            own.partial[stripe * TILE_ROWS + lane / 4 + 8] = acc[2];
        }
    }
    __syncthreads();
    cluster_sync();
    if (chunk == 0 && warp == 0) {
        const int n_chunks = gridDim.x;
        if (args.n_experts <= WARP) {
            add_and_choose<1>(args, own, n_chunks, token, lane);
        } else {
            add_and_choose<MAX_EXPERTS / WARP>(args, own, n_chunks, token, lane);
        }
    }
    // The rows for the experts, the last chunk with the padding: not before the barrier, which would wait until they are in memory.
    half *row = args.normed + token * args.normed_stride;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int at = thread + i * NORM_LANES;
        if (at < n_own * TILE_K) row[begin * TILE_K + at] = normal[i];
    }
    if (end == args.n_tiles) {
#pragma unroll 1
        for (int c = end * TILE_K + thread; c < args.normed_stride; c += NORM_LANES) row[c] = __float2half_rn(0.0f);
    }
    __syncthreads();
    cluster_leave(); // the first block has read everybody's sums
}

#define ROUTER(NAME, KIND)                                                                                             \
    extern "C" __global__ void __launch_bounds__(NORM_LANES, 2) router_##NAME(const RouterArgs args) {                 \
        extern __shared__ __align__(128) uint8_t shared[];                                                             \
        __shared__ RouterShared own;                                                                                   \
        router<KIND>(args, own, shared);                                                                               \
    }
ROUTER(f16, F16)
ROUTER(q8, Q8)
