//! Sizes ("8GiB") and durations ("1m30s"): a number never goes without its unit.

use std::fmt;
use std::time::Duration;

/// Units of size, largest first: name and bytes.
const SIZE_UNITS: &[(&str, u64)] = &[
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("B", 1),
];

/// Units of time, largest first: name and nanoseconds.
const TIME_UNITS: &[(&str, u64)] = &[
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
];

/// Why a size or a duration was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Nothing, or no digits where a number was due.
    #[error("expected a number followed by a unit, such as `{example}`, found `{found}`")]
    Number {
        /// The text.
        found: String,
        /// A good one.
        example: &'static str,
    },
    /// A number alone.
    #[error("`{found}` has no unit: write one of {units}, such as `{example}`")]
    NoUnit {
        /// The text.
        found: String,
        /// The units there are.
        units: String,
        /// A good one.
        example: String,
    },
    /// Letters that are no unit.
    #[error("unknown unit `{unit}`: expected one of {units}")]
    Unit {
        /// The letters.
        unit: String,
        /// The units there are.
        units: String,
    },
    /// More than 2^64 bytes, or than 2^64 ns.
    #[error("`{found}` is too large")]
    TooLarge {
        /// The text.
        found: String,
    },
    /// Part of a byte.
    #[error("`{found}` is not a whole number of bytes")]
    Fraction {
        /// The text.
        found: String,
    },
}

impl UnitError {
    /// The unit that was not understood, and those that would have been: for a suggestion.
    pub fn unit(&self) -> Option<(&str, Vec<&'static str>)> {
        match self {
            Self::Unit { unit, units } => {
                let table = if units.contains("GiB") { SIZE_UNITS } else { TIME_UNITS };
                Some((unit, table.iter().map(|(name, _)| *name).collect()))
            }
            _ => None,
        }
    }
}

/// Reads a size: a number, a fraction allowed, and one unit of `B KB MB GB TB` (powers of 1000) or
/// `KiB MiB GiB TiB` (powers of 1024), in any case.
///
/// # Errors
/// [`UnitError`]: no number, no unit, an unknown one, part of a byte, or more than `u64::MAX` bytes.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let (number, unit, rest) = split_term(text.trim());
    let scale = scale_of(text, number, unit, SIZE_UNITS, "8GiB")?;
    if !rest.is_empty() {
        return Err(UnitError::Number { found: text.to_owned(), example: "8GiB" });
    }
    let (scaled, exact) = scaled(number, scale, text, "8GiB")?;
    if exact { Ok(scaled) } else { Err(UnitError::Fraction { found: text.to_owned() }) }
}

/// Reads a duration: one or more numbers with units of `d h m s ms us`, such as `90s` or `1m30s`.
///
/// # Errors
/// [`UnitError`]: no number, no unit, an unknown one, or more than `u64::MAX` nanoseconds.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let mut rest = text.trim();
    let mut nanos = 0u64;
    loop {
        let (number, unit, tail) = split_term(rest);
        let scale = scale_of(text, number, unit, TIME_UNITS, "30s")?;
        let (term, _) = scaled(number, scale, text, "30s")?;
        nanos = nanos.checked_add(term).ok_or_else(|| UnitError::TooLarge { found: text.to_owned() })?;
        rest = tail.trim_start();
        if rest.is_empty() {
            return Ok(Duration::from_nanos(nanos));
        }
    }
}

/// Splits "1.5 GiB rest" into number, unit and what follows.
fn split_term(text: &str) -> (&str, &str, &str) {
    let number_len = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
    let (number, rest) = text.split_at(number_len);
    let rest = rest.trim_start();
    let unit_len = rest.find(|c: char| c.is_ascii_digit() || c.is_whitespace()).unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(unit_len);
    (number, unit, rest)
}

fn scale_of(
    text: &str,
    number: &str,
    unit: &str,
    units: &[(&'static str, u64)],
    example: &'static str,
) -> Result<u64, UnitError> {
    let names = || units.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    if number.is_empty() {
        return Err(UnitError::Number { found: text.to_owned(), example });
    }
    if unit.is_empty() {
        let example = format!("{number}{}", example.trim_start_matches(|c: char| c.is_ascii_digit()));
        return Err(UnitError::NoUnit { found: text.to_owned(), units: names(), example });
    }
    let found = units.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
    found.map(|(_, scale)| *scale).ok_or_else(|| UnitError::Unit { unit: unit.to_owned(), units: names() })
}

/// `number * scale` in integers: the value, rounded down, and whether it is exact.
fn scaled(number: &str, scale: u64, text: &str, example: &'static str) -> Result<(u64, bool), UnitError> {
    let bad = || UnitError::Number { found: text.to_owned(), example };
    let too_large = || UnitError::TooLarge { found: text.to_owned() };
    let digits = number.replace('_', "");
    let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
    if whole.is_empty() || fraction.contains('.') || number.ends_with('.') || fraction.len() > 15 {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let whole = u128::from(whole) * u128::from(scale);
    let tens = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
    let parts = if fraction.is_empty() { 0 } else { fraction.parse::<u128>().map_err(|_| bad())? };
    let parts = parts * u128::from(scale);
    let value = u64::try_from(whole + parts / tens).map_err(|_| too_large())?;
    Ok((value, parts.is_multiple_of(tens)))
}

/// Bytes for people: the largest binary unit with at most two decimals, `12.1 GiB`.
///
/// ```
/// # use playhouse_config::units::Bytes;
/// assert_eq!(Bytes(1536 << 20).to_string(), "1.5 GiB");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = SIZE_UNITS[..4].iter().find(|(_, scale)| self.0 >= *scale);
        let Some((name, scale)) = binary else { return write!(f, "{} B", self.0) };
        let hundredths = (u128::from(self.0) * 100 + u128::from(*scale) / 2) / u128::from(*scale);
        let text = format!("{}.{:02}", hundredths / 100, hundredths % 100);
        write!(f, "{} {name}", text.trim_end_matches('0').trim_end_matches('.'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("8GiB"), Ok(8 << 30));
        assert_eq!(parse_size("1.5 gib"), Ok(3 << 29));
        assert_eq!(parse_size("12.1GB"), Ok(12_100_000_000));
        assert_eq!(parse_size("0B"), Ok(0));
        assert_eq!(parse_size("1_000KB"), Ok(1_000_000));
        for (text, message) in [
            ("8", "`8` has no unit: write one of TiB, GiB, MiB, KiB, TB, GB, MB, KB, B, such as `8GiB`"),
            ("", "expected a number followed by a unit, such as `8GiB`, found ``"),
            ("GiB", "expected a number followed by a unit, such as `8GiB`, found `GiB`"),
            ("8GiX", "unknown unit `GiX`: expected one of TiB, GiB, MiB, KiB, TB, GB, MB, KB, B"),
            ("0.5B", "`0.5B` is not a whole number of bytes"),
            ("99999999TiB", "`99999999TiB` is too large"),
            ("8GiB 1B", "expected a number followed by a unit, such as `8GiB`, found `8GiB 1B`"),
            ("1..5GiB", "expected a number followed by a unit, such as `8GiB`, found `1..5GiB`"),
            ("-1GiB", "expected a number followed by a unit, such as `8GiB`, found `-1GiB`"),
        ] {
            assert_eq!(parse_size(text).unwrap_err().to_string(), message, "{text}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("1h 5ms"), Ok(Duration::from_millis(3_600_005)));
        assert_eq!(parse_duration("0.5s"), Ok(Duration::from_millis(500)));
        assert_eq!(
            parse_duration("30").unwrap_err().to_string(),
            "`30` has no unit: write one of d, h, m, s, ms, us, such as `30s`"
        );
        assert_eq!(
            parse_duration("5min").unwrap_err().to_string(),
            "unknown unit `min`: expected one of d, h, m, s, ms, us"
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,12}|[0-9._]{0,24}[a-zA-Z]{0,4}") {
            let _ = parse_size(&text);
            let _ = parse_duration(&text);
        }

        #[test]
        fn whole_bytes_come_back(bytes in any::<u64>()) {
            prop_assert_eq!(parse_size(&format!("{bytes}B")), Ok(bytes));
        }

        #[test]
        fn milliseconds_come_back(ms in 0u64..1 << 40) {
            prop_assert_eq!(parse_duration(&format!("{ms}ms")), Ok(Duration::from_millis(ms)));
        }
    }
}
