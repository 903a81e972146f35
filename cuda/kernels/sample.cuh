// The arithmetic of the sampler, operation by operation that of engine/sampler: nothing here may be contracted or approximated.
#pragma once
#include "common.cuh"

// The weight of the most likely id. Mirrors WEIGHT_ONE in engine/sampler/weight.rs.
constexpr uint64_t WEIGHT_ONE = 1ull << 43;
constexpr float LARGEST = 3.40282347e38f;

// A logit as an integer of the same order; both zeros are one logit.
DEVICE unsigned key_of(float logit) {
    const unsigned bits = __float_as_uint(__fadd_rn(logit, 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float logit_of(unsigned key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }
constexpr unsigned KEY_OF_MINUS_INFINITY = 0x007fffffu;
constexpr unsigned KEY_OF_SMALLEST = 0x00800000u; // the lowest finite logit

// exp(x) for -700 <= x <= 0: see `exp_nonpositive` in weight.rs.
DEVICE double exp_nonpositive(double x) {
    constexpr double INVERSE_FACTORIALS[13] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                                               1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                                               1.0 / 2.0,         1.0,              1.0};
    const double k = floor(__dadd_rn(__dmul_rn(x, 1.44269504088896340736), 0.5));
    const double high = __dmul_rn(k, __longlong_as_double(0x3fe62e42fee00000ll));
    const double low = __dmul_rn(k, __longlong_as_double(0x3dea39ef35793c76ll));
    const double r = __dsub_rn(__dsub_rn(x, high), low);
    double sum = 1.0 / 6227020800.0;
#pragma unroll
    for (int i = 0; i < 13; i++) sum = __dadd_rn(__dmul_rn(sum, r), INVERSE_FACTORIALS[i]);
    return __dmul_rn(sum, __longlong_as_double((static_cast<long long>(k) + 1023) << 52));
}

// What logits are weighed by: the highest, and the temperature with its reciprocal.
struct Scale {
    double max, temperature, inverse;
};
DEVICE Scale scale_of(float max, float temperature) {
    const double t = temperature;
    return {max, t, __drcp_rn(t)};
}

// x / temperature, correctly rounded (Markstein 1990): the second quotient is within one unit in the last place, and a
// residual that is exact corrects such a quotient with a reciprocal that is correctly rounded. Nothing here leaves the range of
// f64, since the temperature is an f32. Without branches, so that the divisions of several logits run side by side.
DEVICE double divided(double x, const Scale &scale) {
    const double first = __dmul_rn(x, scale.inverse);
    const double second = __fma_rn(__fma_rn(-first, scale.temperature, x), scale.inverse, first);
    return __fma_rn(__fma_rn(-second, scale.temperature, x), scale.inverse, second);
}

// w[i] = round(2^43 exp((logit[i] - max) / temperature)): see `weight` in weight.rs. f64 is slow everywhere: a warp none of whose
// logits has a weight passes over it, and the rest is without branches.
DEVICE void weights(uint64_t (&w)[4], const float (&logits)[4], const Scale &scale, bool wanted = true) {
    double x[4];
    bool has_weight[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const double difference = __dsub_rn(static_cast<double>(logits[i]), scale.max);
        // Surely below -31 temperatures; what this lets through is decided below.
        has_weight[i] = wanted && !(difference < __dmul_rn(-31.5, scale.temperature));
        x[i] = has_weight[i] ? difference : 0.0;
        w[i] = 0;
    }
    if (!__any_sync(__activemask(), has_weight[0] || has_weight[1] || has_weight[2] || has_weight[3])) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[i] = divided(x[i], scale);
        has_weight[i] = has_weight[i] && !(x[i] < -31.0);
        x[i] = exp_nonpositive(has_weight[i] ? x[i] : 0.0);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint64_t rounded = __double2ull_rz(__dadd_rn(__dmul_rn(x[i], static_cast<double>(WEIGHT_ONE)), 0.5));
        w[i] = has_weight[i] ? rounded : 0;
    }
}

DEVICE uint64_t weight(float logit, const Scale &scale) {
    const float logits[4] = {logit, -INFINITY, -INFINITY, -INFINITY};
    uint64_t w[4];
    weights(w, logits, scale);
    return w[0];
}

// ln(x) for normal x >= 1, as libm computes it (FreeBSD's e_log.c), each operation rounded.
DEVICE double log_f64(double x) {
    const uint64_t bits = __double_as_longlong(x);
    const unsigned high = static_cast<unsigned>(bits >> 32) + (0x3ff00000u - 0x3fe6a09eu);
    if (x == 1.0) return 0.0;
    const double k = static_cast<int>(high >> 20) - 0x3ff;
    const uint64_t reduced = static_cast<uint64_t>((high & 0xfffffu) + 0x3fe6a09eu) << 32 | (bits & 0xffffffffu);
    const double f = __dsub_rn(__longlong_as_double(reduced), 1.0);
    const double half_square = __dmul_rn(__dmul_rn(0.5, f), f);
    const double s = __ddiv_rn(f, __dadd_rn(2.0, f)), z = __dmul_rn(s, s), w = __dmul_rn(z, z);
    auto step = [&](double c, double inner) { return __dadd_rn(c, __dmul_rn(w, inner)); };
    const double even = __dmul_rn(w, step(3.999999999940941908e-01, step(2.222219843214978396e-01, 1.531383769920937332e-01)));
    const double odd = __dmul_rn(z, step(6.666666666666735130e-01, step(2.857142874366239149e-01,
                                 step(1.818357216161805012e-01, 1.479819860511658591e-01))));
    const double r = __dadd_rn(odd, even);
    const double tail = __dadd_rn(__dmul_rn(s, __dadd_rn(half_square, r)), __dmul_rn(k, 1.90821492927058770002e-10));
    return __dadd_rn(__dadd_rn(__dsub_rn(tail, half_square), f), __dmul_rn(k, 6.93147180369123816490e-01));
}

// ceil(fraction * whole): see `fraction_of` in engine/sampler/mod.rs. The fraction is in 0 ..= 1.
DEVICE uint64_t fraction_of(float fraction, uint64_t whole) {
    const uint64_t scaled = __double2ull_rz(__dmul_rn(static_cast<double>(fraction), 4611686018427387904.0)); // 2^62
    const uint64_t high = __umul64hi(scaled, whole), low = scaled * whole;
    return (high << 2 | low >> 62) + ((low & ((1ull << 62) - 1)) != 0);
}

// Philox4x32-10 of (seed, choice, token index): see `random_u64` in philox.rs.
DEVICE uint64_t random_u64(unsigned seed_low, unsigned seed_high, unsigned choice, unsigned index) {
    unsigned c0 = index, c1 = 0, c2 = choice, c3 = 0, k0 = seed_low, k1 = seed_high;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned high0 = __umulhi(0xd2511f53u, c0), low0 = 0xd2511f53u * c0;
        const unsigned high1 = __umulhi(0xcd9e8d57u, c2), low1 = 0xcd9e8d57u * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    return static_cast<uint64_t>(c1) << 32 | c0;
}

DEVICE float clamp_finite(float v) { return v < -LARGEST ? -LARGEST : v > LARGEST ? LARGEST : v; }

DEVICE float with_bias(float logit, float bias) {
    if (logit == -INFINITY || bias == -INFINITY) return -INFINITY;
    return clamp_finite(__fadd_rn(logit, bias));
}

// `seen` is 0 for an id that was not seen, else 1 + how often it was emitted: see penalties.rs.
DEVICE float penalised(float logit, unsigned seen, float repetition, float presence, float frequency) {
    if (seen == 0 || logit == -INFINITY) return logit;
    logit = logit > 0.0f ? __fdiv_rn(logit, repetition) : __fmul_rn(logit, repetition);
    if (seen > 1) {
        logit = __fsub_rn(logit, presence);
        logit = __fsub_rn(logit, __fmul_rn(frequency, __uint2float_rn(seen - 1)));
    }
    return clamp_finite(logit);
}
