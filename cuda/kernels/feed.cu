// Brings what a step needs from the host's memory to its places on the device; tokens that the step before chose come from there.
// copies: up to COPIES arrays of words, from host memory, in whole quads   chosen: the ids that the step before chose, by row
// The first array begins with n_tokens ids; one with the top bit set stands for the row of `chosen` that the other bits say.
// Grid (blocks, copies), block 256.   Bound by: latency of the bus, of which the first quads hide behind the predecessor.
#include "common.cuh"

constexpr int COPIES = 6;
constexpr unsigned CHOSEN = 0x80000000u;

// Mirrored by `Piece` in launch/feed.rs.
struct Piece {
    const uint4 *from;
    uint4 *to;
    unsigned long long n_words;
};

// Mirrored by `FeedArgs` in launch/feed.rs.
struct FeedArgs {
    Piece pieces[COPIES];
    const unsigned *chosen;
    unsigned long long n_tokens;
};

// Waits, and lets no successor start before this kernel has ended: kernels of the step read items, tables and keys of earlier steps before
// they wait themselves, and they may start as soon as their own predecessor has. All of that must be there when the first of them starts,
// whichever op that is: a backend may be asked for an attention with nothing before it.
DEVICE void wait_for_predecessor_alone() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

extern "C" __global__ void __launch_bounds__(256) feed(const __grid_constant__ FeedArgs args) {
    const Piece &piece = args.pieces[blockIdx.y];
    const unsigned n_quads = static_cast<unsigned>((piece.n_words + 3) / 4), stride = gridDim.x * 256;
    const unsigned first = blockIdx.x * 256 + threadIdx.x, n_tokens = blockIdx.y == 0 ? static_cast<unsigned>(args.n_tokens) : 0;
    // The host wrote it before the launch: nothing that runs now changes it.
    uint4 quad = first < n_quads ? __ldcv(piece.from + first) : make_uint4(0, 0, 0, 0);
    wait_for_predecessor_alone();
    for (unsigned i = first; i < n_quads; i += stride) {
        if (i != first) quad = __ldcv(piece.from + i);
        auto token = [&](unsigned word, unsigned value) {
            return word < n_tokens && (value & CHOSEN) ? args.chosen[value & ~CHOSEN] : value;
        };
        piece.to[i] = make_uint4(token(4 * i, quad.x), token(4 * i + 1, quad.y), token(4 * i + 2, quad.z), token(4 * i + 3, quad.w));
    }
    __threadfence(); // those who read before they wait must see it, too
}
