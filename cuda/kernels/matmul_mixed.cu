// Products of the same x with up to three matrices of any kinds, for up to 8 columns (decode): q, k and v of a file that has v in a format
// of its own, in one launch.   Bound by: reading the matrices once, and the latency of one launch instead of two or three.
// Each part as in matmul_small.cu, x staged: all have the same n_cols and n.
// Grid (blocks of all parts), block (32, n_chunks), shared memory as there: a part has the blocks from first_block on. A block runs the code
// of its part's kind; which blocks a row falls to changes no bit of it.
// Reference: matmul_small.cu, bit for bit.
#include "small.cuh"

constexpr int PARTS = 3;

// Mirrored by `MixedArgs` in launch/mixed.rs.
struct MixedArgs {
    MatmulArgs part[PARTS];
    int kind[PARTS];
    int first_block[PARTS + 1]; // that of a part that there is not, and of the end: the number of blocks
};

extern "C" __global__ void __launch_bounds__(256, 2) matmul_mixed(const __grid_constant__ MixedArgs args) {
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ SmallShared own;
    const int at = static_cast<int>(blockIdx.x), which = (at >= args.first_block[1]) + (at >= args.first_block[2]);
    const int block = at - args.first_block[which], n_blocks = args.first_block[which + 1] - args.first_block[which];
    const MatmulArgs &part = args.part[which];
    switch (args.kind[which]) {
    case F16: return matmul_small<F16, true>(part, own, shared, block, n_blocks);
    case Q8: return matmul_small<Q8, true>(part, own, shared, block, n_blocks);
    case Q4: return matmul_small<Q4, true>(part, own, shared, block, n_blocks);
    case Q4G16: return matmul_small<Q4G16, true>(part, own, shared, block, n_blocks);
    case MX4: return matmul_small<MX4, true>(part, own, shared, block, n_blocks);
    case Q5: return matmul_small<Q5, true>(part, own, shared, block, n_blocks);
    case Q6: return matmul_small<Q6, true>(part, own, shared, block, n_blocks);
    }
}
