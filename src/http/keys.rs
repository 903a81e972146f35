//! API keys: kept as hashes, compared in constant time.

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// Some keys. Only their SHA-256 is kept, and comparing takes the same time whichever key is shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct KeyRing(Vec<[u8; 32]>);

impl KeyRing {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Which of the keys this is. Every key is compared, to the last byte.
    pub fn find(&self, shown: &[u8]) -> Option<usize> {
        let shown: [u8; 32] = Sha256::digest(shown).into();
        let (mut found, mut at) = (Choice::from(0), 0);
        for (index, key) in self.0.iter().enumerate() {
            let is_it = key.ct_eq(&shown);
            // Which key it was is no secret: the client showed it.
            at = if bool::from(is_it) { index } else { at };
            found |= is_it;
        }
        bool::from(found).then_some(at)
    }
}

impl<T: AsRef<[u8]>> FromIterator<T> for KeyRing {
    fn from_iter<I: IntoIterator<Item = T>>(keys: I) -> Self {
        Self(keys.into_iter().map(|key| Sha256::digest(key.as_ref()).into()).collect())
    }
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyRing({} keys)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_in_their_own_case_are_found() {
        let ring: KeyRing = ["sk-Moon", "sk-river"].into_iter().collect();
        assert_eq!(ring.find(b"sk-river"), Some(1));
        assert_eq!(ring.find(b"sk-Moon"), Some(0));
        for wrong in ["", "sk-moon", "sk-Moo", "sk-Moon ", "sk-Moonsk-river"] {
            assert_eq!(ring.find(wrong.as_bytes()), None, "{wrong:?}");
        }
        assert_eq!(KeyRing::default().find(b""), None);
        assert_eq!(format!("{ring:?}"), "KeyRing(2 keys)", "no hash is printed");
    }
}
