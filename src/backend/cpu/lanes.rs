//! Sixteen f32 lanes: the one shape in which the CPU backend adds.
//!
//! Every sum over a row is taken as sixteen partial sums, element `i` going to lane `i % 16` in ascending order,
//! folded at the end as lanes 8, 4, 2, 1. Products are rounded before they are added (no fused multiply-add).
//! So the bits of a result depend on the row alone, not on the instruction set: [`Portable`], [`Avx2`] and
//! [`Avx512`] are three spellings of the same arithmetic, and a test compares them bit for bit.
//!
//! A kernel is a generic function over [`Lanes`], marked `#[inline(always)]`, and [`dispatch!`] compiles it once
//! per instruction set. Kernels hold no closures that compute lanes: the compiler may leave a closure outside the
//! function that enables the instruction set, and then every intrinsic in it is a call. The tokens `Avx2` and `Avx512`
//! exist only where the CPU was asked, which is what makes the intrinsics behind their safe methods sound.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

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
