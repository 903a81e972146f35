// x[t] = scale * table[tokens[t]]: rows of the embedding table, still in GGUF's blocks, to f32.
// table [n_vocab, row_bytes]   tokens [n], each below n_vocab   x [n, n_cols] f32
// Grid (n, ceil(n_cols / 1024)), block 64: a thread decodes 16 columns.   Bound by: latency.   Reference: dtype/*.rs, bit for bit
// before the scale.
#include "blocks.cuh"

template <int FORMAT> DEVICE void embed(float *x, const uint8_t *table, const unsigned *tokens, unsigned long long row_bytes, int n_cols, float scale) {
    wait_for_predecessor();
    const uint8_t *row = table + tokens[blockIdx.x] * row_bytes;
    float *out = x + static_cast<size_t>(blockIdx.x) * n_cols;
    const int sixteen = blockIdx.y * 64 + threadIdx.x, first = sixteen * 16;
    if (first >= n_cols) return;
    if constexpr (FORMAT <= FMT_BF16) {
        for (int k = first; k < min(first + 16, n_cols); k++) out[k] = scale * take_plain<FORMAT>(row, k);
    } else {
        constexpr bool HAS_MIN = FORMAT == FMT_Q4_1 || FORMAT == FMT_Q5_1 || FORMAT == FMT_Q2_K || FORMAT == FMT_Q4_K || FORMAT == FMT_Q5_K;
        Sixteen part;
        take_sixteen<FORMAT>(part, row, sixteen);
        for (int k = 0; k < 16; k++) {
            int q = part.q[k];
            if (FORMAT == FMT_Q8_0 || FORMAT == FMT_IQ4_NL || FORMAT == FMT_IQ4_XS) q -= 128;
            if (FORMAT == FMT_Q6_K || FORMAT == FMT_Q3_K) q -= 32;
            if (FORMAT == FMT_Q4_0) q -= 8;
            if (FORMAT == FMT_Q5_0) q -= 16;
            if (FORMAT == FMT_MXFP4) {
                const int magnitude = q & 7, twice = magnitude < 2 ? magnitude : (2 + (magnitude & 1)) << ((magnitude >> 1) - 1);
                q = q & 8 ? -twice : twice;
            }
            // Formats without a minimum keep the sign of a zero.
            const float value = static_cast<float>(q) * part.s;
            out[first + k] = scale * (HAS_MIN ? value + part.m : value);
        }
    }
}

#define EMBED(NAME, FORMAT)                                                                                            \
    extern "C" __global__ void __launch_bounds__(64) embed_##NAME(float *x, const uint8_t *table, const unsigned *tokens, \
                                                                  unsigned long long row_bytes, int n_cols, float scale) { \
        embed<FORMAT>(x, table, tokens, row_bytes, n_cols, scale);                                                     \
    }
EMBED(f32, FMT_F32)
EMBED(f16, FMT_F16)
EMBED(bf16, FMT_BF16)
EMBED(q8_0, FMT_Q8_0)
EMBED(iq4_nl, FMT_IQ4_NL)
EMBED(iq4_xs, FMT_IQ4_XS)
EMBED(q4_0, FMT_Q4_0)
EMBED(q4_1, FMT_Q4_1)
EMBED(q4_k, FMT_Q4_K)
EMBED(q2_k, FMT_Q2_K)
EMBED(mxfp4, FMT_MXFP4)
EMBED(q5_0, FMT_Q5_0)
EMBED(q5_1, FMT_Q5_1)
EMBED(q5_k, FMT_Q5_K)
EMBED(q6_k, FMT_Q6_K)
EMBED(q3_k, FMT_Q3_K)
