//! API keys: kept as hashes, compared in constant time, read again when their files change.

use super::error::ServeError;
use playhouse_config::checked::ApiKey;
use sha2::{Digest, Sha256};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use subtle::{Choice, ConstantTimeEq};

/// Which key: its hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyId([u8; 32]);

impl std::fmt::Debug for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyId(..)")
    }
}

/// Some keys. Only their SHA-256 is kept, and comparing takes the same time whichever key is shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct KeyRing(Vec<KeyId>);

impl KeyRing {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Which of the keys this is. Every key is compared, to the last byte.
    pub fn find(&self, shown: &[u8]) -> Option<KeyId> {
        let shown: [u8; 32] = Sha256::digest(shown).into();
        let mut found = Choice::from(0);
        for key in &self.0 {
            found |= key.0.ct_eq(&shown);
        }
        bool::from(found).then_some(KeyId(shown))
    }

    /// These keys, and those of a file: one a line, each a key or `sha256:` and its hash in hexadecimal digits; `#`
    /// begins a comment.
    ///
    /// # Errors
    /// [`ServeError::Keys`] if the file cannot be read, a line is no key, or there is none: whoever names a file does
    /// not mean "everybody".
    pub fn and_file(&self, path: &Path) -> Result<Self, ServeError> {
        let error = |why: String| ServeError::Keys { path: path.display().to_string(), why };
        let text = std::fs::read_to_string(path).map_err(|why| error(why.to_string()))?;
        if std::fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o007 != 0) {
            tracing::warn!(path = %path.display(), "every user of this machine may read the keys in this file");
        }
        let mut keys = self.0.clone();
        for (number, line) in (1..).zip(text.lines()) {
            let mut words = line.split_whitespace().take_while(|word| !word.starts_with('#'));
            let Some(word) = words.next() else { continue };
            let key = read_key(word).filter(|_| words.next().is_none());
            let expected = "expected one key of visible ASCII characters, or `sha256:` and 64 hexadecimal digits";
            let key = key.ok_or_else(|| error(format!("line {number} is no key: {expected}")))?;
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        if keys.len() == self.0.len() {
            return Err(error("there is no key in it".into()));
        }
        Ok(Self(keys))
    }
}

fn read_key(word: &str) -> Option<KeyId> {
    let Some(hex) = word.strip_prefix("sha256:") else {
        return word.bytes().all(|byte| byte.is_ascii_graphic()).then(|| id_of(word.as_bytes()));
    };
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = [0; 32];
    for (byte, at) in hash.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&hex[at..at + 2], 16).ok()?;
    }
    Some(KeyId(hash))
}

fn id_of(key: &[u8]) -> KeyId {
    KeyId(Sha256::digest(key).into())
}

impl<T: AsRef<[u8]>> FromIterator<T> for KeyRing {
    fn from_iter<I: IntoIterator<Item = T>>(keys: I) -> Self {
        Self(keys.into_iter().map(|key| id_of(key.as_ref())).collect())
    }
}

impl From<&[ApiKey]> for KeyRing {
    fn from(keys: &[ApiKey]) -> Self {
        keys.iter().map(ApiKey::expose).collect()
    }
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyRing({} keys)", self.0.len())
    }
}

/// The keys in force.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys {
    pub(super) users: KeyRing,
    pub(super) admins: KeyRing,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_keys_in_their_own_case_are_found() {
        let ring: KeyRing = ["sk-Moon", "sk-river"].into_iter().collect();
        assert_eq!(ring.find(b"sk-river"), Some(id_of(b"sk-river")));
        assert_eq!(ring.find(b"sk-Moon"), Some(id_of(b"sk-Moon")));
        for wrong in ["", "sk-moon", "sk-Moo", "sk-Moon ", "sk-Moonsk-river"] {
            assert_eq!(ring.find(wrong.as_bytes()), None, "{wrong:?}");
        }
        assert_eq!(KeyRing::default().find(b""), None);
        assert_eq!(format!("{ring:?} {:?}", ring.find(b"sk-Moon")), "KeyRing(2 keys) Some(KeyId(..))", "no hash");
    }

    #[test]
    fn a_file_has_a_key_or_a_hash_in_a_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("keys");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("writable");
            KeyRing::from_iter(["sk-inline"]).and_file(&path).map_err(|error| error.to_string())
        };
        let hash = "B81AEF0E6A7DB7FE1FAE6DCC2A8F0B8E4D0C9AC9B3A3CFC2B9A2E5B2F5D9A0AA";
        let ring = read(&format!("# ours\n\n sk-moon  # the first\nsha256:{hash}\nsk-moon\n")).expect("good");
        assert_eq!(format!("{ring:?}"), "KeyRing(3 keys)");
        assert!(ring.find(b"sk-moon").is_some() && ring.find(b"sk-inline").is_some());
        assert!(ring.find(hash.as_bytes()).is_none(), "a hash is not a key");
        let hex: String = Sha256::digest(b"sk-river").iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(read(&format!("sha256:{hex}")).expect("good").find(b"sk-river").is_some());
        for (wrong, words) in [
            ("", "no key in it"),
            ("# nothing", "no key in it"),
            ("sk-a\nsk b", "line 2 is no key"),
            ("sha256:12", "line 1 is no key"),
            ("kéy", "line 1 is no key"),
        ] {
            let error = read(wrong).expect_err(wrong);
            assert!(error.contains(words) && !error.contains("sk"), "{error}");
        }
        assert!(KeyRing::default().and_file(Path::new("/nowhere")).is_err());
    }
}
