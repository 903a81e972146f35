// GGUF's blocks taken apart into small integers and f32 scales: w = q s + m, 16 weights (half a group of 32) at a time.
// Layouts as in dtype/*.rs, which is the reference; block sizes are asserted there and compared in a test.
#pragma once
#include "common.cuh"

enum Format : int {
    FMT_F32, FMT_F16, FMT_BF16, FMT_Q4_0, FMT_Q4_1, FMT_Q5_0, FMT_Q5_1, FMT_Q8_0,
    FMT_Q2_K, FMT_Q3_K, FMT_Q4_K, FMT_Q5_K, FMT_Q6_K, FMT_IQ4_NL, FMT_IQ4_XS, FMT_MXFP4
};

// 16 consecutive weights. For Q8 kinds q is signed + 128, for Q6 signed + 32, else as stored; MXFP4's s is
// 2^(e - 128), half of what e stands for, so that twice a value times it is never beyond f32 before the value is.
struct Sixteen {
    uint8_t q[16];
    float s, m;
};

DEVICE float load_half(const uint8_t *p) { return __half2float(__ushort_as_half(p[0] | (p[1] << 8))); }
DEVICE float load_float(const uint8_t *p) {
    return __uint_as_float(p[0] | (p[1] << 8) | (p[2] << 16) | (static_cast<uint32_t>(p[3]) << 24));
}

// 2^(e - 128): exact for every e; the two smallest are subnormal.
DEVICE float half_scale(unsigned e) { return __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

__device__ const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// The 6-bit scale and minimum of sub-block j of 8, as Q4_K and Q5_K pack them into 12 bytes.
DEVICE void scale_min_k4(int j, const uint8_t *p, int &scale, int &min) {
    if (j < 4) {
        scale = p[j] & 63;
        min = p[j + 4] & 63;
    } else {
        scale = (p[j + 4] & 15) | ((p[j - 4] >> 6) << 4);
        min = (p[j + 4] >> 4) | ((p[j] >> 6) << 4);
    }
}

// The 6-bit scale of sub-block j of 16 of Q3_K, still + 32.
DEVICE int scale_q3(int j, const uint8_t *p) {
    const int low = j < 8 ? p[j] & 15 : p[j - 8] >> 4;
    return low | (((p[8 + j % 4] >> (2 * (j / 4))) & 3) << 4);
}

// Weights 16 i .. 16 i + 15 of a row, i counted over the whole row.
template <int FORMAT> DEVICE void take_sixteen(Sixteen &out, const uint8_t *row, int i) {
    out.m = 0.0f;
    if constexpr (FORMAT == FMT_Q8_0) {
        const uint8_t *b = row + static_cast<size_t>(i / 2) * 34;
        out.s = load_half(b);
        for (int k = 0; k < 16; k++) out.q[k] = b[2 + 16 * (i % 2) + k] ^ 0x80;
    } else if constexpr (FORMAT == FMT_Q4_0 || FORMAT == FMT_Q4_1 || FORMAT == FMT_IQ4_NL || FORMAT == FMT_MXFP4) {
        constexpr int HEAD = FORMAT == FMT_Q4_1 ? 4 : FORMAT == FMT_MXFP4 ? 1 : 2;
        const uint8_t *b = row + static_cast<size_t>(i / 2) * (HEAD + 16);
        out.s = FORMAT == FMT_MXFP4 ? half_scale(b[0]) : load_half(b);
        if (FORMAT == FMT_Q4_0) out.m = -8.0f * out.s;
        if (FORMAT == FMT_Q4_1) out.m = load_half(b + 2);
        for (int k = 0; k < 16; k++) {
            const uint8_t q = i % 2 == 0 ? b[HEAD + k] & 15 : b[HEAD + k] >> 4;
            out.q[k] = FORMAT == FMT_IQ4_NL ? static_cast<uint8_t>(IQ4_VALUES[q] + 128) : q;
        }
    } else if constexpr (FORMAT == FMT_Q5_0 || FORMAT == FMT_Q5_1) {
        constexpr int HEAD = FORMAT == FMT_Q5_1 ? 4 : 2;
        const uint8_t *b = row + static_cast<size_t>(i / 2) * (HEAD + 20);
        out.s = load_half(b);
        out.m = FORMAT == FMT_Q5_1 ? load_half(b + 2) : -16.0f * out.s;
        const uint32_t high = b[HEAD] | (b[HEAD + 1] << 8) | (b[HEAD + 2] << 16) | (static_cast<uint32_t>(b[HEAD + 3]) << 24);
        for (int k = 0; k < 16; k++) {
            const uint8_t low = i % 2 == 0 ? b[HEAD + 4 + k] & 15 : b[HEAD + 4 + k] >> 4;
            out.q[k] = low | (((high >> (16 * (i % 2) + k)) & 1) << 4);
        }
    } else if constexpr (FORMAT == FMT_Q2_K) {
        const uint8_t *b = row + static_cast<size_t>(i / 16) * 84;
        const int j = i % 16, half128 = j / 8, shift = 2 * ((j % 8) / 2);
        out.s = load_half(b + 80) * (b[j] & 15);
        out.m = -load_half(b + 82) * (b[j] >> 4);
        for (int k = 0; k < 16; k++) out.q[k] = (b[16 + 32 * half128 + 16 * (j % 2) + k] >> shift) & 3;
    } else if constexpr (FORMAT == FMT_Q3_K) {
        const uint8_t *b = row + static_cast<size_t>(i / 16) * 110;
        const int j = i % 16, half128 = j / 8, pair = (j % 8) / 2;
        out.s = load_half(b + 108) * (scale_q3(j, b + 96) - 32);
        for (int k = 0; k < 16; k++) {
            const int low = (b[32 + 32 * half128 + 16 * (j % 2) + k] >> (2 * pair)) & 3;
            const int high = (b[16 * (j % 2) + k] >> (4 * half128 + pair)) & 1;
            out.q[k] = static_cast<uint8_t>(low - (high ? 0 : 4) + 32);
        }
    } else if constexpr (FORMAT == FMT_Q4_K || FORMAT == FMT_Q5_K) {
        constexpr int BYTES = FORMAT == FMT_Q4_K ? 144 : 176, QUANTS = FORMAT == FMT_Q4_K ? 16 : 48;
        const uint8_t *b = row + static_cast<size_t>(i / 16) * BYTES;
        const int j = (i % 16) / 2;
        int scale, min;
        scale_min_k4(j, b + 4, scale, min);
        out.s = load_half(b) * scale;
        out.m = -load_half(b + 2) * min;
        for (int k = 0; k < 16; k++) {
            const int at = 16 * (i % 2) + k;
            const uint8_t byte = b[QUANTS + 32 * (j / 2) + at];
            out.q[k] = j % 2 == 0 ? byte & 15 : byte >> 4;
            if (FORMAT == FMT_Q5_K) out.q[k] |= ((b[16 + at] >> j) & 1) << 4;
        }
    } else if constexpr (FORMAT == FMT_Q6_K) {
        const uint8_t *b = row + static_cast<size_t>(i / 16) * 210;
        const int j = i % 16, half128 = j / 8, quarter = (j % 8) / 2;
        out.s = load_half(b + 208) * static_cast<int8_t>(b[192 + j]);
        for (int k = 0; k < 16; k++) {
            const int at = 16 * (j % 2) + k;
            const uint8_t byte = b[64 * half128 + 32 * (quarter % 2) + at];
            const uint8_t low = quarter < 2 ? byte & 15 : byte >> 4;
            out.q[k] = low | (((b[128 + 32 * half128 + at] >> (2 * quarter)) & 3) << 4);
        }
    } else if constexpr (FORMAT == FMT_IQ4_XS) {
        const uint8_t *b = row + static_cast<size_t>(i / 16) * 136;
        const int j = (i % 16) / 2;
        const int low = (b[4 + j / 2] >> (4 * (j % 2))) & 15, high = ((b[2] | (b[3] << 8)) >> (2 * j)) & 3;
        out.s = load_half(b) * ((low | (high << 4)) - 32);
        for (int k = 0; k < 16; k++) {
            const uint8_t byte = b[8 + 16 * j + k];
            const uint8_t q = i % 2 == 0 ? byte & 15 : byte >> 4;
            out.q[k] = static_cast<uint8_t>(IQ4_VALUES[q] + 128);
        }
    }
}

// Weight k of a row of a plain format.
template <int FORMAT> DEVICE float take_plain(const uint8_t *row, size_t k) {
    if constexpr (FORMAT == FMT_F32) return load_float(row + 4 * k);
    if constexpr (FORMAT == FMT_F16) return load_half(row + 2 * k);
    return __uint_as_float(static_cast<uint32_t>(row[2 * k] | (row[2 * k + 1] << 8)) << 16);
}
