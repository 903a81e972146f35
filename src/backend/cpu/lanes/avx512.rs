//! The lanes in one register of AVX-512. Every method runs intrinsics whose features the token proves; bytes are those of
//! AVX2.

use super::Lanes;
use super::avx2::{Avx2, fold8};
use std::arch::x86_64::*;

/// Proof that the CPU has AVX-512 F, BW, DQ and VL, AVX2 and F16C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Avx512(Avx2);

impl Avx512 {
    /// Asks the CPU.
    pub(crate) fn detect() -> Option<Self> {
        let avx2 = Avx2::detect()?;
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl"))
        .then_some(Self(avx2))
    }
}

impl Lanes for Avx512 {
    type F = __m512;
    type B = <Avx2 as Lanes>::B;
    const TILE_COLS: usize = 4;

    #[inline(always)]
    fn splat(self, v: f32) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_set1_ps(v) }
    }
    #[inline(always)]
    fn load(self, a: &[f32; 16]) -> __m512 {
        // SAFETY: the token proves AVX-512F; the read is the sixteen elements, of any alignment.
        unsafe { _mm512_loadu_ps(a.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, v: __m512, out: &mut [f32; 16]) {
        // SAFETY: the token proves AVX-512F; the write is the sixteen elements, of any alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn pow2_biased(self, a: __m512) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe {
            let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(a));
            _mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f80_0000)))
        }
    }
    #[inline(always)]
    fn f16(self, bits: u16) -> f32 {
        self.0.f16(bits)
    }
    #[inline(always)]
    fn widen_f16(self, a: &[u8; 32]) -> __m512 {
        // SAFETY: the token proves AVX-512F; the read is the 32 bytes, of any alignment.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(a.as_ptr().cast())) }
    }
    #[inline(always)]
    fn widen_bf16(self, a: &[u8; 32]) -> __m512 {
        // SAFETY: the token proves AVX-512F; the read is the 32 bytes, of any alignment.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(a.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    fn bytes(self, a: &[u8; 16]) -> Self::B {
        self.0.bytes(a)
    }
    #[inline(always)]
    fn field(self, a: Self::B, shift: u32, mask: u8) -> Self::B {
        self.0.field(a, shift, mask)
    }
    #[inline(always)]
    fn raise(self, a: Self::B, shift: u32) -> Self::B {
        self.0.raise(a, shift)
    }
    #[inline(always)]
    fn or(self, a: Self::B, b: Self::B) -> Self::B {
        self.0.or(a, b)
    }
    #[inline(always)]
    fn fifth_bits(self, bits: u16) -> Self::B {
        // SAFETY: the token proves AVX-512BW and VL.
        unsafe { _mm_maskz_set1_epi8(bits, 16) }
    }
    #[inline(always)]
    fn widen_i8(self, a: Self::B) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a)) }
    }
    #[inline(always)]
    fn widen_u8(self, a: Self::B) -> __m512 {
        // SAFETY: the token proves AVX-512F.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(a)) }
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16], indices: Self::B) -> __m512 {
        // SAFETY: the token proves AVX-512F; the load reads the table's sixteen elements, and the permutation
        // uses only the low four bits of an index.
        unsafe { _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(indices), _mm512_loadu_ps(table.as_ptr())) }
    }
    #[inline(always)]
    fn reduce(self, v: __m512) -> f32 {
        // SAFETY: the token proves AVX-512DQ.
        fold8(unsafe { _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)) })
    }
}
