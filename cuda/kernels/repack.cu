// Rows of GGUF blocks to tiles (tiles.cuh), once per weight at load.   Bound by: reading and writing the weight once.
// source: n_rows encoded rows of n_cols weights   planes: the matrix's tiles; rows and k beyond it become zeros.
// A stripe has 16 rows of the source, or 8 rows of it (gate) above 8 of `second` (up), so that one thread of a product holds both.
// Grid (ceil(n_k32 / 8), stripes), block (8 row pairs, 8 segments): a thread moves 32 k of rows g and g + 8 of a stripe.
// Reference: dtype/*.rs; the test unpacks the tiles again and compares every weight.
#include "blocks.cuh"
#include "tiles.cuh"

// Mirrored by `RepackArgs` in launch/matrix.rs.
struct RepackArgs {
    const uint8_t *source, *second; // second: null unless gated
    uint8_t *lo, *hi, *scale;
    unsigned long long row_bytes, first_stripe;
    int n_rows, n_cols; // of the source, and of `second`
    int n_tiles;        // tiles of k
    float factor;       // multiplies scales and minima; a power of two
};

// Row g + 8 r of the block's stripe: where its bytes are, or null where there is no such row.
DEVICE const uint8_t *source_row(const RepackArgs &args, int g, int r) {
    const bool gated = args.second != nullptr;
    const int row = gated ? blockIdx.y * 8 + g : blockIdx.y * TILE_ROWS + g + 8 * r;
    if (row >= args.n_rows) return nullptr;
    return (gated && r == 1 ? args.second : args.source) + row * args.row_bytes;
}

template <int KIND> DEVICE uint8_t zero_quant() { return KIND == Q8 ? 128 : KIND == Q6 ? 32 : 0; }

// Bits of the E8M0-like exponent byte: f16's exponent field of 2^14 times the scale, of which s is half; clamped to f16's normal
// range.
DEVICE uint8_t f16_exponent(float s) {
    const int e = static_cast<int>((__float_as_uint(s) >> 23) & 0xff) - 127 + 1 + 14 + 15;
    return static_cast<uint8_t>(min(max(e, 0), 30));
}

template <int FORMAT, int KIND> DEVICE void repack(const RepackArgs &args) {
    const int g = threadIdx.x, k32 = blockIdx.x * 8 + threadIdx.y;
    if (k32 >= 2 * args.n_tiles) return;
    const int tile = k32 / 2, segment = k32 % 2;
    const size_t at = (args.first_stripe + blockIdx.y) * args.n_tiles + tile;

    if constexpr (KIND == F16) {
        for (int k = 0; k < 32; k++) {
            for (int r = 0; r < 2; r++) {
                const uint8_t *row = source_row(args, g, r);
                const int col = k32 * 32 + k;
                float v = 0.0f;
                if (row != nullptr && col < args.n_cols) v = take_plain<FORMAT>(row, col);
                const int s = 2 * segment + k / 16, kk = k % 16, lane = 4 * g + (kk % 8) / 2, reg = 2 * (kk / 8) + r;
                half *target = reinterpret_cast<half *>(args.lo + at * lo_bytes(F16) + s * 512 + lane * 16 + reg * 4);
                target[kk % 2] = to_half(v * args.factor);
            }
        }
        return;
    } else {
        Sixteen part[2][2]; // [row][half of the segment]
        for (int r = 0; r < 2; r++) {
            const uint8_t *row = source_row(args, g, r);
            for (int h = 0; h < 2; h++) {
                if (row != nullptr && k32 * 32 < args.n_cols) {
                    take_sixteen<FORMAT>(part[r][h], row, 2 * k32 + h);
                } else {
                    part[r][h].s = part[r][h].m = 0.0f;
                    for (int k = 0; k < 16; k++) part[r][h].q[k] = zero_quant<KIND>();
                }
            }
        }
        for (int h = 0; h < 2; h++) {
            const int s = 2 * segment + h;
            for (int t = 0; t < 4; t++) {
                const int lane = 4 * g + t;
                uint32_t word = 0, wide[2] = {0, 0}, high = 0;
                for (int reg = 0; reg < 4; reg++) {
                    for (int e = 0; e < 2; e++) {
                        const uint32_t q = part[reg & 1][h].q[8 * (reg / 2) + 2 * t + e];
                        word |= (q & 15) << (4 * reg + 16 * e);
                        wide[reg / 2] |= q << (16 * (reg & 1) + 8 * e);
                        high |= (q >> 4) << ((KIND == Q6 ? 2 : 1) * reg + 16 * e);
                    }
                }
                if constexpr (KIND == Q8) {
                    uint32_t *lo = reinterpret_cast<uint32_t *>(args.lo + at * 1024 + segment * 512 + lane * 16);
                    lo[2 * h] = wide[0], lo[2 * h + 1] = wide[1];
                } else {
                    reinterpret_cast<uint32_t *>(args.lo + at * 512 + lane * 16)[s] = word;
                }
                // Bits of k16 step s: Q5 4 of 16 bits a half, Q6 8 of 16 bits in the word of its segment. Another thread of the
                // block owns the other segment's bits of a Q5 word.
                if constexpr (KIND == Q5) {
                    atomicOr(reinterpret_cast<uint32_t *>(args.hi + at * 128) + lane, high << (4 * s));
                } else if constexpr (KIND == Q6) {
                    atomicOr(reinterpret_cast<uint32_t *>(args.hi + at * 256 + lane * 8) + segment, high << (8 * h));
                }
            }
        }
        uint8_t *scale = args.scale + at * scale_bytes(KIND) + g * (scale_bytes(KIND) / 8);
        half *scales = reinterpret_cast<half *>(scale);
        for (int r = 0; r < 2; r++) {
            const Sixteen *p = part[r];
            if constexpr (KIND == MX4) {
                scale[2 * r + segment] = f16_exponent(p[0].s * args.factor);
            } else if constexpr (KIND == Q8) {
                scales[2 * r + segment] = to_half(p[0].s * args.factor);
            } else if constexpr (KIND == Q4 || KIND == Q5) {
                scales[4 * r + 2 * segment] = to_half(p[0].s * args.factor);
                scales[4 * r + 2 * segment + 1] = to_half(p[0].m * args.factor);
            } else {
                for (int h = 0; h < 2; h++) {
                    const int group = 2 * segment + h;
                    if constexpr (KIND == Q4G16) {
                        scales[8 * r + 2 * group] = to_half(p[h].s * args.factor);
                        scales[8 * r + 2 * group + 1] = to_half(p[h].m * args.factor);
                    } else { // Q6
                        scales[4 * r + group] = to_half(p[h].s * args.factor);
                    }
                }
            }
        }
    }
}

#define REPACK(NAME, FORMAT, KIND)                                                                                     \
    extern "C" __global__ void __launch_bounds__(64) repack_##NAME(const RepackArgs args) { repack<FORMAT, KIND>(args); }
REPACK(f32, FMT_F32, F16)
REPACK(f16, FMT_F16, F16)
REPACK(bf16, FMT_BF16, F16)
REPACK(q8_0, FMT_Q8_0, Q8)
REPACK(iq4_nl, FMT_IQ4_NL, Q8)
REPACK(iq4_xs, FMT_IQ4_XS, Q8)
REPACK(q4_0, FMT_Q4_0, Q4)
REPACK(q4_1, FMT_Q4_1, Q4)
REPACK(q4_k, FMT_Q4_K, Q4)
REPACK(q2_k, FMT_Q2_K, Q4G16)
REPACK(mxfp4, FMT_MXFP4, MX4)
REPACK(q5_0, FMT_Q5_0, Q5)
REPACK(q5_1, FMT_Q5_1, Q5)
REPACK(q5_k, FMT_Q5_K, Q5)
REPACK(q6_k, FMT_Q6_K, Q6)
REPACK(q3_k, FMT_Q3_K, Q6)

// Tiles to weights again, [n_mats, n_rows, n_cols] f32: the test oracle of the layout, and nothing on any hot path.
// Grid (ceil(n_cols / 64), stripes, matrices), block 32.
template <int KIND> DEVICE void untile(const Planes &planes, float *out, int n_rows, int n_cols, int n_tiles, float factor) {
    const int lane = threadIdx.x;
    const size_t stripe = static_cast<size_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    RawTile<KIND> raw;
    load_tile(raw, planes, stripe * n_tiles + blockIdx.x, lane);
#pragma unroll
    for (int s = 0; s < 4; s++) {
        uint32_t a[4];
        fragment(a, raw, s);
#pragma unroll
        for (int reg = 0; reg < 4; reg++) {
            const float2 v = __half22float2(as_half2(a[reg]));
            const int row = blockIdx.y * TILE_ROWS + lane / 4 + 8 * (reg & 1);
            const int col = blockIdx.x * TILE_K + 16 * s + 2 * (lane % 4) + 8 * (reg / 2);
            float *cell = out + (static_cast<size_t>(blockIdx.z) * n_rows + row) * n_cols + col;
            if (row < n_rows && col < n_cols) cell[0] = v.x * factor;
            if (row < n_rows && col + 1 < n_cols) cell[1] = v.y * factor;
        }
    }
}

#define UNTILE(NAME, KIND)                                                                                             \
    extern "C" __global__ void untile_##NAME(const Planes planes, float *out, int n_rows, int n_cols, int n_tiles,     \
                                             float factor) {                                                           \
        untile<KIND>(planes, out, n_rows, n_cols, n_tiles, factor);                                                    \
    }
UNTILE(f16, F16)
UNTILE(q8, Q8)
UNTILE(q4, Q4)
UNTILE(q4g16, Q4G16)
UNTILE(mx4, MX4)
UNTILE(q5, Q5)
UNTILE(q6, Q6)
