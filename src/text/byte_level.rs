//! The reversible alphabet of byte-level BPE: every byte is one printable character.
//!
//! GPT-2 writes its vocabulary as text, so each of the 256 bytes got a visible character: printable Latin-1
//! bytes stand for themselves, the other 68 take the code points from U+0100 upwards, in byte order.

use std::sync::LazyLock;

/// Both directions of the alphabet.
pub(crate) struct Alphabet {
    to_char: [char; 256],
    to_byte: Vec<Option<u8>>,
}

static ALPHABET: LazyLock<Alphabet> = LazyLock::new(Alphabet::build);

impl Alphabet {
    /// The one alphabet that all byte-level vocabularies share.
    pub(crate) fn get() -> &'static Alphabet {
        &ALPHABET
    }

    fn build() -> Alphabet {
        let mut to_char = ['\0'; 256];
        let mut to_byte = vec![None; 256 + 68];
        let mut n_moved = 0;
        for byte in 0..=255u8 {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let code = if printable { u32::from(byte) } else { 256 + n_moved };
            n_moved += u32::from(!printable);
            to_char[usize::from(byte)] = char::from_u32(code).unwrap_or('\0');
            to_byte[code as usize] = Some(byte);
        }
        Alphabet { to_char, to_byte }
    }

    /// The character that stands for `byte`.
    pub(crate) fn char_of(&self, byte: u8) -> char {
        self.to_char[usize::from(byte)]
    }

    /// The byte that `c` stands for, if it is of the alphabet.
    pub(crate) fn byte_of(&self, c: char) -> Option<u8> {
        self.to_byte.get(c as usize).copied().flatten()
    }

    /// Writes `text` in the alphabet, into `out` (cleared first).
    pub(crate) fn spell(&self, text: &str, out: &mut String) {
        out.clear();
        out.extend(text.bytes().map(|b| self.char_of(b)));
    }

    /// The bytes that `spelled` stands for; `None` if a character is not of the alphabet.
    pub(crate) fn read(&self, spelled: &str) -> Option<Vec<u8>> {
        spelled.chars().map(|c| self.byte_of(c)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character() {
        let alphabet = Alphabet::get();
        let mut seen: Vec<char> = (0..=255).map(|b| alphabet.char_of(b)).collect();
        for byte in 0..=255u8 {
            assert_eq!(alphabet.byte_of(alphabet.char_of(byte)), Some(byte));
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 256);
        assert_eq!(seen.last(), Some(&'\u{143}'));
        assert_eq!((alphabet.char_of(b' '), alphabet.char_of(b'\n'), alphabet.char_of(b'a')), ('Ġ', 'Ċ', 'a'));
    }

    #[test]
    fn what_is_not_of_the_alphabet_is_not_read() {
        assert_eq!(Alphabet::get().read("Ġhi"), Some(b" hi".to_vec()));
        assert_eq!(Alphabet::get().read("a b"), None);
        assert_eq!(Alphabet::get().read("🚀"), None);
    }
}
