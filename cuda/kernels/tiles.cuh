// Weights as the tensor cores want them: tiles of 16 rows x 64 k, planes of quants and scales, and their way to f16.
//
// A matrix [n_rows, n_cols] is padded with zeros to whole tiles and cut into stripes of 16 rows; a stripe's tiles are consecutive
// in k. Each plane holds its part of all tiles in that order, so that a warp that walks a stripe streams every plane.
// Lane 4g + t of the warp owns rows g and g + 8 at k = 16 s + {2t, 2t + 1, 2t + 8, 2t + 9}, s = 0..3: 32 weights a tile.
//
//   kind   plane lo, bytes a lane   plane hi   scales, bytes for 8 lanes g      formats
//   F16    4 x 16 (one per s)       -          -                                F32 F16 BF16, with a power of two
//   Q8     2 x 16 (q + 128)         -          f16 s[row][2]            8       Q8_0 IQ4_NL IQ4_XS
//   Q4     16 (nibbles)             -          f16 (s, m)[row][2]      16       Q4_0 Q4_1 Q4_K
//   Q4G16  16                       -          f16 (s, m)[row][4]      32       Q2_K
//   MX4    16 (E2M1)                -          u8  exponent[row][2]     4       MXFP4
//   Q5     16                       4          f16 (s, m)[row][2]      16       Q5_0 Q5_1 Q5_K
//   Q6     16                       8          f16 s[row][4]           16       Q6_K Q3_K
// w = q s + m in one f16 rounding (Q4, Q5), q s (Q8, Q6 after subtracting 128, 32). [row] runs over g and g + 8.
#pragma once
#include "common.cuh"

constexpr int TILE_ROWS = 16;
constexpr int TILE_K = 64;

enum Kind : int { F16 = 0, Q8 = 1, Q4 = 2, Q4G16 = 3, MX4 = 4, Q5 = 5, Q6 = 6 };

// Bytes of one tile in each plane.
__host__ __device__ constexpr int lo_bytes(int kind) { return kind == F16 ? 2048 : kind == Q8 ? 1024 : 512; }
__host__ __device__ constexpr int hi_bytes(int kind) { return kind == Q5 ? 128 : kind == Q6 ? 256 : 0; }
__host__ __device__ constexpr int scale_bytes(int kind) {
    return kind == F16 ? 0 : kind == Q8 ? 64 : kind == MX4 ? 32 : kind == Q4G16 ? 256 : 128;
}
__host__ __device__ constexpr int tile_bytes(int kind) { return lo_bytes(kind) + hi_bytes(kind) + scale_bytes(kind); }
static_assert(tile_bytes(F16) == 2 * TILE_ROWS * TILE_K, "two bytes a weight");
static_assert(tile_bytes(Q8) * 8 == 8.5 * TILE_ROWS * TILE_K, "as Q8_0 in the file");
static_assert(tile_bytes(MX4) * 8 == 4.25 * TILE_ROWS * TILE_K, "as MXFP4 in the file");

// Where a matrix's planes are. The planes of stacked matrices follow each other, plane by plane.
struct Planes {
    const uint8_t *lo, *hi, *scale;
};

// What a lane holds of one tile, as loaded.
template <int KIND> struct RawTile {
    uint4 lo[lo_bytes(KIND) / 512];
    uint32_t hi[hi_bytes(KIND) == 0 ? 1 : hi_bytes(KIND) / 128];
    uint32_t scale[scale_bytes(KIND) == 0 ? 1 : scale_bytes(KIND) / 32];
};

template <int KIND> DEVICE void load_tile(RawTile<KIND> &raw, const Planes &planes, size_t tile, int lane) {
    const uint4 *lo = reinterpret_cast<const uint4 *>(planes.lo + tile * lo_bytes(KIND)) + lane;
#pragma unroll
    for (int i = 0; i < lo_bytes(KIND) / 512; i++) raw.lo[i] = load_stream(lo + 32 * i);
    if constexpr (KIND == Q5) {
        raw.hi[0] = load_stream(reinterpret_cast<const uint32_t *>(planes.hi + tile * 128) + lane);
    } else if constexpr (KIND == Q6) {
        const uint2 v = load_stream(reinterpret_cast<const uint2 *>(planes.hi + tile * 256) + lane);
        raw.hi[0] = v.x, raw.hi[1] = v.y;
    }
    const uint8_t *scale = planes.scale + tile * scale_bytes(KIND) + (lane / 4) * (scale_bytes(KIND) / 8);
    if constexpr (KIND == MX4) {
        raw.scale[0] = load_stream(reinterpret_cast<const uint32_t *>(scale));
    } else if constexpr (KIND == Q8) {
        const uint2 v = load_stream(reinterpret_cast<const uint2 *>(scale));
        raw.scale[0] = v.x, raw.scale[1] = v.y;
    } else if constexpr (KIND != F16) {
#pragma unroll
        for (int i = 0; i < scale_bytes(KIND) / 128; i++) {
            const uint4 v = load_stream(reinterpret_cast<const uint4 *>(scale) + i);
            raw.scale[4 * i] = v.x, raw.scale[4 * i + 1] = v.y, raw.scale[4 * i + 2] = v.z, raw.scale[4 * i + 3] = v.w;
        }
    }
}

// The same from a tile whose planes lie in shared memory.
template <int KIND>
DEVICE void load_planes_shared(RawTile<KIND> &raw, const uint8_t *lo_plane, const uint8_t *hi, const uint8_t *scales, int lane) {
    const uint4 *lo = reinterpret_cast<const uint4 *>(lo_plane) + lane;
#pragma unroll
    for (int i = 0; i < lo_bytes(KIND) / 512; i++) raw.lo[i] = lo[32 * i];
    if constexpr (KIND == Q5) {
        raw.hi[0] = reinterpret_cast<const uint32_t *>(hi)[lane];
    } else if constexpr (KIND == Q6) {
        const uint2 v = reinterpret_cast<const uint2 *>(hi)[lane];
        raw.hi[0] = v.x, raw.hi[1] = v.y;
    }
    const uint8_t *scale = scales + (lane / 4) * (scale_bytes(KIND) / 8);
    if constexpr (KIND == MX4) {
        raw.scale[0] = *reinterpret_cast<const uint32_t *>(scale);
    } else if constexpr (KIND == Q8) {
        const uint2 v = *reinterpret_cast<const uint2 *>(scale);
        raw.scale[0] = v.x, raw.scale[1] = v.y;
    } else if constexpr (KIND != F16) {
#pragma unroll
        for (int i = 0; i < scale_bytes(KIND) / 128; i++) {
            const uint4 v = reinterpret_cast<const uint4 *>(scale)[i];
            raw.scale[4 * i] = v.x, raw.scale[4 * i + 1] = v.y, raw.scale[4 * i + 2] = v.z, raw.scale[4 * i + 3] = v.w;
        }
    }
}

// The same, planes one after another, as `copy_tile` puts them there.
template <int KIND> DEVICE void load_tile_shared(RawTile<KIND> &raw, const uint8_t *tile, int lane) {
    load_planes_shared<KIND>(raw, tile, tile + lo_bytes(KIND), tile + lo_bytes(KIND) + hi_bytes(KIND), lane);
}

// A warp copies tile `tile` to shared memory, asynchronously.
template <int KIND> DEVICE void copy_tile(uint32_t target, const Planes &planes, size_t tile, int lane) {
    const auto copy = [&](uint32_t at, const uint8_t *plane, int bytes) {
#pragma unroll
        for (int i = 0; i < (bytes + 511) / 512; i++) {
            const int offset = 512 * i + 16 * lane;
            if (offset < bytes) copy_async_16(target + at + offset, plane + tile * bytes + offset, true);
        }
    };
    copy(0, planes.lo, lo_bytes(KIND));
    if constexpr (hi_bytes(KIND) > 0) copy(lo_bytes(KIND), planes.hi, hi_bytes(KIND));
    if constexpr (scale_bytes(KIND) > 0) copy(lo_bytes(KIND) + hi_bytes(KIND), planes.scale, scale_bytes(KIND));
}

DEVICE uint32_t bits(half2 v) { return *reinterpret_cast<uint32_t *>(&v); }
DEVICE half2 as_half2(uint32_t v) { return *reinterpret_cast<half2 *>(&v); }
DEVICE half2 low2(uint32_t v) { return __low2half2(as_half2(v)); }
DEVICE half2 high2(uint32_t v) { return __high2half2(as_half2(v)); }

// A register of the fragment is a half2 of the row `r & 1` (g or g + 8): registers 0, 2 are row g, 1, 3 row g + 8.
// Integers below 1024 become f16 by giving them the exponent of 1024, exactly.
constexpr uint32_t EXP_1024 = 0x64006400u;

// (a & mask) | b, which is one instruction.
DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t b) {
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(a), "r"(mask), "r"(b));
    return v;
}
// Left, or right by a negative count.
DEVICE uint32_t shifted(uint32_t v, int left) { return left < 0 ? v >> -left : v << left; }

// The four A registers of k16 step `s`.
template <int KIND> DEVICE void fragment(uint32_t (&a)[4], const RawTile<KIND> &raw, int s) {
    if constexpr (KIND == F16) {
        a[0] = raw.lo[s].x, a[1] = raw.lo[s].y, a[2] = raw.lo[s].z, a[3] = raw.lo[s].w;
    } else if constexpr (KIND == Q8) {
        const uint4 quad = raw.lo[s / 2];
        const uint32_t word[2] = {s % 2 == 0 ? quad.x : quad.z, s % 2 == 0 ? quad.y : quad.w};
        const half2 bias = __float2half2_rn(1152.0f);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const uint32_t q = __byte_perm(word[r / 2], 0x64646464u, r % 2 == 0 ? 0x4140 : 0x4342);
            const half2 scale = s / 2 == 0 ? low2(raw.scale[r & 1]) : high2(raw.scale[r & 1]);
            a[r] = bits(__hmul2(__hsub2(as_half2(q), bias), scale));
        }
    } else {
        const uint32_t word = s == 0 ? raw.lo[0].x : s == 1 ? raw.lo[0].y : s == 2 ? raw.lo[0].z : raw.lo[0].w;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            if constexpr (KIND == MX4) {
                // E2M1 as the top of an f16: sign to bit 15, the rest to bits 9-11, 2^14 too small.
                const uint32_t sign = shifted(word, 12 - 4 * r) & 0x80008000u, f = and_or(shifted(word, 9 - 4 * r), 0x0e000e00u, sign);
                const uint32_t e = (raw.scale[0] >> (16 * (r & 1) + 8 * (s / 2))) & 0xffu;
                a[r] = bits(__hmul2(as_half2(f), as_half2((e << 10) | (e << 26))));
            } else {
                // Registers 1 and 3 leave their nibbles where they are and have 16 q; the sum that takes 1024 off divides it, exactly.
                const int up = r % 2 == 0 ? 0 : 4;
                uint32_t q = and_or(r < 2 ? word : word >> 8, 0x000f000fu << up, EXP_1024);
                if constexpr (KIND == Q5) q = and_or(shifted(raw.hi[0], 4 + up - (4 * s + r)), 0x00100010u << up, q);
                if constexpr (KIND == Q6) q = and_or(shifted(raw.hi[s / 2], 4 + up - 2 * (4 * (s % 2) + r)), 0x00300030u << up, q);
                constexpr float ZERO = KIND == Q6 ? 32.0f : 0.0f;
                const half2 x = up == 0 ? __hsub2(as_half2(q), __float2half2_rn(1024.0f + ZERO))
                                        : __hfma2(as_half2(q), __float2half2_rn(0.0625f), __float2half2_rn(-64.0f - ZERO));
                if constexpr (KIND == Q4 || KIND == Q5) {
                    const uint32_t sm = raw.scale[2 * (r & 1) + s / 2];
                    a[r] = bits(__hfma2(x, low2(sm), high2(sm)));
                } else if constexpr (KIND == Q4G16) {
                    const uint32_t sm = raw.scale[4 * (r & 1) + s];
                    a[r] = bits(__hfma2(x, low2(sm), high2(sm)));
                } else { // Q6
                    const uint32_t pair = raw.scale[2 * (r & 1) + s / 2];
                    a[r] = bits(__hmul2(x, s % 2 == 0 ? low2(pair) : high2(pair)));
                }
            }
        }
    }
}

// K is summed in chunks that depend on K alone (in tiles): at most 8, of at least 256 k each.
DEVICE int chunk_tiles(int n_tiles) {
    const int eighth = (n_tiles + 7) / 8;
    return eighth < 4 ? 4 : eighth;
}
