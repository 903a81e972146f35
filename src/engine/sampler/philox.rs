//! Random numbers that are a function of their key: Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random
//! numbers: as easy as 1, 2, 3"). No state: a restarted engine needs the token's index and nothing else.

/// Ten rounds of Philox on four 32-bit words with a key of two.
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let (high0, low0) = wide_product(0xd251_1f53, counter[0]);
        let (high1, low1) = wide_product(0xcd9e_8d57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

/// The random number of a token: key = seed (low, high), counter = (token index, 0, choice, 0), the first two words of
/// the result as (low, high).
pub fn random_u64(seed: u64, choice: u32, token_index: u32) -> u64 {
    let [low, high, ..] = philox4x32_10([token_index, 0, choice, 0], [seed as u32, (seed >> 32) as u32]);
    u64::from(high) << 32 | u64::from(low)
}

fn wide_product(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // From the paper's library, Random123, file `kat_vectors`.
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn every_part_of_the_key_matters() {
        let base = random_u64(1, 0, 0);
        for other in [random_u64(2, 0, 0), random_u64(1 << 32, 0, 0), random_u64(1, 1, 0), random_u64(1, 0, 1)] {
            assert_ne!(base, other);
        }
    }
}
