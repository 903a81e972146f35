//! Counter-based random numbers: a stream is a pure function of its keys, whoever draws from it and when.

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub(super) struct Stream(u64);

/// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Stream {
    /// The stream of these keys.
    pub(super) fn new(seed: u64, tensor: u64, place: u64) -> Self {
        let key = |state: u64, k: u64| mix(state.wrapping_add(GOLDEN) ^ mix(k.wrapping_add(GOLDEN)));
        Self(key(key(mix(seed.wrapping_add(GOLDEN)), tensor), place))
    }

    /// 64 random bits.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// Two independent normal numbers of mean 0 and deviation 1 (Box and Muller).
    pub(super) fn normal_pair(&mut self) -> (f32, f32) {
        let bits = self.next();
        let unit = |b: u64| (b as u32 >> 8) as f32 / (1 << 24) as f32;
        // 1 - u is never 0, so the logarithm is finite.
        let radius = libm::sqrtf(-2.0 * libm::logf(1.0 - unit(bits)));
        let (sin, cos) = libm::sincosf(std::f32::consts::TAU * unit(bits >> 32));
        (radius * cos, radius * sin)
    }

    /// Fills `out` with normal numbers.
    pub(super) fn fill_normal(&mut self, out: &mut [f32], mean: f32, std: f32) {
        for pair in out.chunks_mut(2) {
            let (a, b) = self.normal_pair();
            pair[0] = mean + std * a;
            if let Some(second) = pair.get_mut(1) {
                *second = mean + std * b;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_mean_0_and_deviation_1() {
        let mut x = vec![0.0; 100_000];
        Stream::new(1, 2, 3).fill_normal(&mut x, 0.0, 1.0);
        let n = x.len() as f64;
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let var = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.02, "{mean} {var}");
        assert!(x.iter().all(|v| v.is_finite()));
    }

    #[test]
    fn streams_depend_on_every_key() {
        let first = |s, t, p| Stream::new(s, t, p).next();
        let all = [first(1, 2, 3), first(2, 2, 3), first(1, 3, 3), first(1, 2, 4), first(2, 1, 3)];
        for (i, a) in all.iter().enumerate() {
            assert!(!all[..i].contains(a));
        }
    }
}
