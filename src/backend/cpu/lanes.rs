//! Sixteen f32 lanes: the one shape in which the CPU backend adds.
//!
//! Every sum over a row is taken as sixteen partial sums, element `i` going to lane `i % 16` in ascending order,
//! folded at the end as lanes 8, 4, 2, 1. Products are rounded before they are added (no fused multiply-add).
//! So the bits of a result depend on the row alone, not on the instruction set: [`Portable`], [`Avx2`] and
//! [`Avx512`] are three spellings of the same arithmetic, and a test compares them bit for bit.
//!
//! A kernel is a generic function over [`Lanes`], marked `#[inline(always)]`, and [`dispatch!`] compiles it once
//! per instruction set. Kernels hold no closures that compute lanes: the compiler may leave a closure outside the
//! function that enables the instruction set, and then every intrinsic in it is a call. The tokens `Avx2` and `Avx512` exist only where the CPU was asked, which is what makes the
//! intrinsics behind their safe methods sound.

/// Sixteen f32 lanes and the few operations the kernels need, with IEEE 754 results on every instruction set.
pub(crate) trait Lanes: Copy + Send + Sync + 'static {
    /// The sixteen lanes.
    type F: Copy;
    /// Sixteen bytes, from which lanes are unpacked.
    type B: Copy;
    /// Columns of a register tile of [`super::matmul`]: 4 where 16 accumulators fit the registers, else 1.
    const TILE_COLS: usize;

    fn splat(self, v: f32) -> Self::F;
    fn load(self, a: &[f32; 16]) -> Self::F;
    fn store(self, v: Self::F, out: &mut [f32; 16]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`, lane by lane: `b` where either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`, lane by lane: `b` where either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `2^n` where each lane holds `n + 1.5 * 2^23` with integral `-126 <= n <= 127`.
    fn pow2_biased(self, a: Self::F) -> Self::F;
    /// A binary16 number; exact, as are the widenings below.
    fn f16(self, bits: u16) -> f32;
    /// Sixteen binary16 numbers.
    fn widen_f16(self, a: &[u8; 32]) -> Self::F;
    /// Sixteen bfloat16 numbers.
    fn widen_bf16(self, a: &[u8; 32]) -> Self::F;

    fn bytes(self, a: &[u8; 16]) -> Self::B;
    /// `(byte >> shift) & mask` of each; `mask` has no bit above `7 - shift`.
    fn field(self, a: Self::B, shift: u32, mask: u8) -> Self::B;
    /// `byte << shift` of each, none of which overflows.
    fn raise(self, a: Self::B, shift: u32) -> Self::B;
    fn or(self, a: Self::B, b: Self::B) -> Self::B;
    /// 16 where bit `i` is set, else 0.
    fn fifth_bits(self, bits: u16) -> Self::B;
    fn widen_i8(self, a: Self::B) -> Self::F;
    fn widen_u8(self, a: Self::B) -> Self::F;
    /// `table[i]` for each of the sixteen indices, which are below 16.
    fn lookup(self, table: &[f32; 16], indices: Self::B) -> Self::F;
    /// The fold that ends every sum: halves of 8, 4, 2, 1.
    fn reduce(self, v: Self::F) -> f32;

    /// `acc + a * b`, the product rounded first.
    #[inline(always)]
    fn mul_then_add(self, acc: Self::F, a: Self::F, b: Self::F) -> Self::F {
        self.add(acc, self.mul(a, b))
    }
}

/// The instruction set that the kernels run with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// Arrays of f32, whatever the compiler makes of them.
    Portable(Portable),
    /// 256-bit registers, two per value.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// 512-bit registers.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Isa {
    /// Every instruction set this CPU has, the portable one first.
    pub(crate) fn available() -> Vec<Isa> {
        #[allow(unused_mut, reason = "other architectures have nothing to add")]
        let mut all = vec![Isa::Portable(Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(Avx2::detect().map(Isa::Avx2));
            all.extend(Avx512::detect().map(Isa::Avx512));
        }
        all
    }

    /// The widest instruction set this CPU has.
    pub(crate) fn best() -> Isa {
        Isa::available().pop().expect("the portable one is always there")
    }

    /// Its name, for reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Isa::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
        }
    }
}

/// Compiles a kernel that is generic over [`Lanes`] once per instruction set and picks one at run time:
/// `dispatch!(fn dot(a: &[f32], b: &[f32]) -> f32 = dot_lanes);`
macro_rules! dispatch {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $kernel:path) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "mirrors the kernel's own arguments")]
        $vis fn $name(isa: $crate::backend::cpu::lanes::Isa, $($arg: $ty),*) $(-> $ret)? {
            use $crate::backend::cpu::lanes::Isa;
            #[cfg(target_arch = "x86_64")]
            use $crate::backend::cpu::lanes::{Avx2, Avx512};
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,f16c")]
            #[allow(clippy::too_many_arguments, reason = "mirrors the kernel's own arguments")]
            fn avx2(lanes: Avx2, $($arg: $ty),*) $(-> $ret)? {
                $kernel(lanes, $($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            #[allow(clippy::too_many_arguments, reason = "mirrors the kernel's own arguments")]
            fn avx512(lanes: Avx512, $($arg: $ty),*) $(-> $ret)? {
                $kernel(lanes, $($arg),*)
            }
            match isa {
                Isa::Portable(lanes) => $kernel(lanes, $($arg),*),
                // SAFETY: the token proves that this CPU has every feature the function enables.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2(lanes) => unsafe { avx2(lanes, $($arg),*) },
                // SAFETY: the token proves that this CPU has every feature the function enables.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512(lanes) => unsafe { avx512(lanes, $($arg),*) },
            }
        }
    };
}
pub(crate) use dispatch;

/// `1.5 * 2^23`: added to a small f32 it leaves the nearest integer in the low mantissa bits.
pub(crate) const ROUND_BIAS: f32 = 12_582_912.0;

/// Plain arrays: the reference spelling, and the one for CPUs without a faster one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Portable;

#[inline(always)]
fn map2(a: [f32; 16], b: [f32; 16], f: impl Fn(f32, f32) -> f32) -> [f32; 16] {
    let mut out = [0.0; 16];
    for i in 0..16 {
        out[i] = f(a[i], b[i]);
    }
    out
}

impl Lanes for Portable {
    type F = [f32; 16];
    type B = [u8; 16];
    const TILE_COLS: usize = 1;

    #[inline(always)]
    fn splat(self, v: f32) -> [f32; 16] {
        [v; 16]
    }
    #[inline(always)]
    fn load(self, a: &[f32; 16]) -> [f32; 16] {
        *a
    }
    #[inline(always)]
    fn store(self, v: [f32; 16], out: &mut [f32; 16]) {
        *out = v;
    }
    #[inline(always)]
    fn add(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        map2(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn pow2_biased(self, a: [f32; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f32::from_bits((a[i].to_bits() << 23).wrapping_add(0x3f80_0000));
        }
        out
    }
    #[inline(always)]
    fn f16(self, bits: u16) -> f32 {
        half::f16::from_bits(bits).to_f32()
    }
    #[inline(always)]
    fn widen_f16(self, a: &[u8; 32]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = half::f16::from_le_bytes([a[2 * i], a[2 * i + 1]]).to_f32();
        }
        out
    }
    #[inline(always)]
    fn widen_bf16(self, a: &[u8; 32]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f32::from_bits(u32::from(u16::from_le_bytes([a[2 * i], a[2 * i + 1]])) << 16);
        }
        out
    }
    #[inline(always)]
    fn bytes(self, a: &[u8; 16]) -> [u8; 16] {
        *a
    }
    #[inline(always)]
    fn field(self, mut a: [u8; 16], shift: u32, mask: u8) -> [u8; 16] {
        for a in &mut a {
            *a = (*a >> shift) & mask;
        }
        a
    }
    #[inline(always)]
    fn raise(self, mut a: [u8; 16], shift: u32) -> [u8; 16] {
        for a in &mut a {
            *a <<= shift;
        }
        a
    }
    #[inline(always)]
    fn or(self, mut a: [u8; 16], b: [u8; 16]) -> [u8; 16] {
        for i in 0..16 {
            a[i] |= b[i];
        }
        a
    }
    #[inline(always)]
    fn fifth_bits(self, bits: u16) -> [u8; 16] {
        let mut out = [0; 16];
        for (i, out) in out.iter_mut().enumerate() {
            *out = (((bits >> i) & 1) as u8) << 4;
        }
        out
    }
    #[inline(always)]
    fn widen_i8(self, a: [u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f32::from(a[i] as i8);
        }
        out
    }
    #[inline(always)]
    fn widen_u8(self, a: [u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = f32::from(a[i]);
        }
        out
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16], indices: [u8; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        for i in 0..16 {
            out[i] = table[usize::from(indices[i] & 15)];
        }
        out
    }
    #[inline(always)]
    fn reduce(self, v: [f32; 16]) -> f32 {
        let mut v = v;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// The x86-64 spellings. Every method runs intrinsics whose features its token proves.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Lanes;
    use std::arch::x86_64::*;

    /// Proof that the CPU has AVX2 and F16C.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Avx2(());

    /// Proof that the CPU has AVX-512 F, BW, DQ and VL, AVX2 and F16C.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Avx512(());

    impl Avx2 {
        /// Asks the CPU.
        pub(crate) fn detect() -> Option<Self> {
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(Self(()))
        }
    }

    impl Avx512 {
        /// Asks the CPU.
        pub(crate) fn detect() -> Option<Self> {
            Avx2::detect()?;
            (is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl"))
            .then_some(Self(()))
        }
    }

    /// Folds eight lanes as 4, 2, 1; the caller holds a token that proves AVX2.
    #[inline(always)]
    fn fold8(v: __m256) -> f32 {
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

    impl Lanes for Avx512 {
        type F = __m512;
        type B = __m128i;
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
            // SAFETY: the token proves F16C.
            unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits)))) }
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
            // SAFETY: the token proves AVX-512BW and VL.
            unsafe { _mm_maskz_set1_epi8(bits, 16) }
        }
        #[inline(always)]
        fn widen_i8(self, a: __m128i) -> __m512 {
            // SAFETY: the token proves AVX-512F.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a)) }
        }
        #[inline(always)]
        fn widen_u8(self, a: __m128i) -> __m512 {
            // SAFETY: the token proves AVX-512F.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(a)) }
        }
        #[inline(always)]
        fn lookup(self, table: &[f32; 16], indices: __m128i) -> __m512 {
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
}

/// Splits a slice into its whole chunks of sixteen and the rest.
#[inline(always)]
pub(crate) fn chunks(a: &[f32]) -> (&[[f32; 16]], &[f32]) {
    a.as_chunks::<16>()
}

/// Sixteen lanes of which the first `rest.len()` are `rest` and the others zero.
#[inline(always)]
pub(crate) fn padded(rest: &[f32]) -> [f32; 16] {
    let mut out = [0.0; 16];
    out[..rest.len()].copy_from_slice(rest);
    out
}

#[inline(always)]
fn dot_lanes<S: Lanes>(s: S, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: lengths differ");
    let ((a, a_rest), (b, b_rest)) = (chunks(a), chunks(b));
    let mut acc = s.splat(0.0);
    for (a, b) in a.iter().zip(b) {
        acc = s.mul_then_add(acc, s.load(a), s.load(b));
    }
    if !a_rest.is_empty() {
        acc = s.mul_then_add(acc, s.load(&padded(a_rest)), s.load(&padded(b_rest)));
    }
    s.reduce(acc)
}

#[inline(always)]
fn sum_lanes<S: Lanes>(s: S, a: &[f32]) -> f32 {
    let (a, rest) = chunks(a);
    let mut acc = s.splat(0.0);
    for a in a {
        acc = s.add(acc, s.load(a));
    }
    if !rest.is_empty() {
        acc = s.add(acc, s.load(&padded(rest)));
    }
    s.reduce(acc)
}

dispatch!(
    /// `sum a[i] * b[i]` in the order of this module.
    pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 = dot_lanes
);
#[inline(always)]
fn max_lanes<S: Lanes>(s: S, a: &[f32], floor: f32) -> f32 {
    let (a, rest) = chunks(a);
    let mut most = s.splat(floor);
    for a in a {
        most = s.max(s.load(a), most);
    }
    let mut out = [0.0; 16];
    s.store(most, &mut out);
    out.iter().chain(rest).copied().fold(floor, f32::max)
}

dispatch!(
    /// The largest of `floor` and all elements; NaNs are passed over.
    pub(crate) fn max(a: &[f32], floor: f32) -> f32 = max_lanes
);
dispatch!(
    /// `sum a[i]` in the order of this module.
    pub(crate) fn sum(a: &[f32]) -> f32 = sum_lanes
);
