//! The lanes in two registers of AVX2. Every method runs intrinsics whose features the token proves.

use super::Lanes;
use std::arch::x86_64::*;

/// Proof that the CPU has AVX2 and F16C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// Asks the CPU.
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }
}

/// Folds eight lanes as 4, 2, 1; the caller holds a token that proves AVX2.
#[inline(always)]
pub(super) fn fold8(v: __m256) -> f32 {
    // SAFETY: only called from methods of `Avx2` and `Avx512`, whose tokens prove AVX.
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }
}

impl Lanes for Avx2 {
    type F = [__m256; 2];
    type B = __m128i;
    const TILE_COLS: usize = 1;

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_set1_ps(v); 2] }
    }
    #[inline(always)]
    fn load(self, a: &[f32; 16]) -> Self::F {
        // SAFETY: the token proves AVX; both reads are inside the sixteen elements, of any alignment.
        unsafe { [_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(a.as_ptr().add(8))] }
    }
    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; 16]) {
        // SAFETY: the token proves AVX; both writes are inside the sixteen elements, of any alignment.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }
    #[inline(always)]
    fn pow2_biased(self, a: Self::F) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe {
            let one = _mm256_set1_epi32(0x3f80_0000);
            let (low, high) = (_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1]));
            let (low, high) = (_mm256_slli_epi32::<23>(low), _mm256_slli_epi32::<23>(high));
            [_mm256_castsi256_ps(_mm256_add_epi32(low, one)), _mm256_castsi256_ps(_mm256_add_epi32(high, one))]
        }
    }
    #[inline(always)]
    fn f16(self, bits: u16) -> f32 {
        // SAFETY: the token proves F16C.
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
    }
    #[inline(always)]
    fn widen_f16(self, a: &[u8; 32]) -> Self::F {
        // SAFETY: the token proves F16C; both reads are inside the 32 bytes, of any alignment.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(a.as_ptr().cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(a.as_ptr().add(16).cast())),
            ]
        }
    }
    #[inline(always)]
    fn widen_bf16(self, a: &[u8; 32]) -> Self::F {
        // SAFETY: the token proves AVX2; both reads are inside the 32 bytes, of any alignment.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(a.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(a.as_ptr().add(16).cast()));
            let (low, high) = (_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high));
            [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
        }
    }
    #[inline(always)]
    fn bytes(self, a: &[u8; 16]) -> __m128i {
        // SAFETY: SSE2 is part of x86-64; the read is the sixteen bytes, of any alignment.
        unsafe { _mm_loadu_si128(a.as_ptr().cast()) }
    }
    #[inline(always)]
    fn field(self, a: __m128i, shift: u32, mask: u8) -> __m128i {
        // A shift of 16-bit pairs moves bits of the upper byte into the lower, where the mask removes them.
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_and_si128(_mm_srl_epi16(a, _mm_cvtsi32_si128(shift as i32)), _mm_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    fn raise(self, a: __m128i, shift: u32) -> __m128i {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_sll_epi16(a, _mm_cvtsi32_si128(shift as i32)) }
    }
    #[inline(always)]
    fn or(self, a: __m128i, b: __m128i) -> __m128i {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_or_si128(a, b) }
    }
    #[inline(always)]
    fn fifth_bits(self, bits: u16) -> __m128i {
        // SAFETY: the token proves AVX2, which includes SSSE3.
        unsafe {
            let spread = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            let each = _mm_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let bits = _mm_and_si128(_mm_shuffle_epi8(_mm_cvtsi32_si128(i32::from(bits)), spread), each);
            _mm_and_si128(_mm_cmpeq_epi8(bits, each), _mm_set1_epi8(16))
        }
    }
    #[inline(always)]
    fn widen_i8(self, a: __m128i) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe {
            let high = _mm_unpackhi_epi64(a, a);
            [_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(a)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))]
        }
    }
    #[inline(always)]
    fn widen_u8(self, a: __m128i) -> Self::F {
        // SAFETY: the token proves AVX2.
        unsafe {
            let high = _mm_unpackhi_epi64(a, a);
            [_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(a)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high))]
        }
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16], indices: __m128i) -> Self::F {
        // SAFETY: the token proves AVX2; masked with 15, every gathered index lies in the table.
        unsafe {
            let low = _mm_and_si128(indices, _mm_set1_epi8(15));
            let high = _mm_unpackhi_epi64(low, low);
            [
                _mm256_i32gather_ps::<4>(table.as_ptr(), _mm256_cvtepu8_epi32(low)),
                _mm256_i32gather_ps::<4>(table.as_ptr(), _mm256_cvtepu8_epi32(high)),
            ]
        }
    }
    #[inline(always)]
    fn reduce(self, v: Self::F) -> f32 {
        // SAFETY: the token proves AVX.
        fold8(unsafe { _mm256_add_ps(v[0], v[1]) })
    }
}
