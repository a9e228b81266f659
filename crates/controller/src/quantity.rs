//! Kubernetes quantities, such as `100m`, `1.5Gi` or `2e3`: parsed once, then compared by value and never as text.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

/// Longest text that is parsed, in bytes. The largest quantity in the finest unit has 28 digits.
const MAX_TEXT: usize = 48;
/// Parts of a unit in which values are held: Kubernetes rounds up to them as well.
const NANOS: u128 = 1_000_000_000;
/// The largest value, in units: Kubernetes holds one as a signed number of 64 bits.
const MAX_UNITS: u128 = (1 << 63) - 1;

/// Why a text is no quantity that a container can have.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum NoQuantity {
    /// It does not follow the grammar.
    #[error("is no quantity, such as 100m or 64Mi")]
    Malformed,
    /// It is less than zero.
    #[error("is no quantity of a resource: it is negative")]
    Negative,
    /// It is more than Kubernetes can hold.
    #[error("is no quantity of a resource: it is 2^63 or more")]
    TooLarge,
}

/// A quantity of a resource, zero or more. CPU is counted in cores, memory in bytes.
#[derive(Debug, Clone)]
pub struct Quantity {
    /// As it was written; manifests hold this.
    text: String,
    nanos: u128,
}

impl Quantity {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether this is more than `times` times the other quantity.
    pub fn is_more_than(&self, times: &Self, other: &Self) -> bool {
        self.nanos.saturating_mul(NANOS) > other.nanos.saturating_mul(times.nanos)
    }

    /// Whether this is nothing at all.
    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }
}

impl FromStr for Quantity {
    type Err = NoQuantity;

    /// Parses by the grammar of `k8s.io/apimachinery/pkg/api/resource`: a number, then a binary suffix (`Ki` to `Ei`), a
    /// decimal one (`n` to `E`) or an exponent (`e3`, `E-3`).
    fn from_str(text: &str) -> Result<Self, NoQuantity> {
        if text.len() > MAX_TEXT {
            return Err(NoQuantity::Malformed);
        }
        let (is_negative, unsigned) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
            return Err(NoQuantity::Malformed);
        }
        let scale = Scale::of(suffix).ok_or(NoQuantity::Malformed)?;
        let digits = format!("{whole}{fraction}");
        let digits: u128 = match digits.trim_start_matches('0') {
            "" => 0,
            digits => digits.parse().map_err(|_| NoQuantity::TooLarge)?,
        };
        let places = i32::try_from(fraction.len()).map_err(|_| NoQuantity::Malformed)?;
        let nanos = scale.nanos(digits, places).ok_or(NoQuantity::TooLarge)?;
        match nanos {
            0 => {}
            _ if is_negative => return Err(NoQuantity::Negative),
            _ if nanos > MAX_UNITS * NANOS => return Err(NoQuantity::TooLarge),
            _ => {}
        }
        Ok(Self { text: text.to_owned(), nanos })
    }
}

/// What a suffix multiplies by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scale {
    /// A power of two.
    Two(u32),
    /// A power of ten.
    Ten(i32),
}

impl Scale {
    /// The longest exponent that is read: more is out of range in either direction, unless the number is zero.
    const MAX_EXPONENT: i32 = 99;

    fn of(suffix: &str) -> Option<Self> {
        Some(match suffix {
            "" => Self::Ten(0),
            "n" => Self::Ten(-9),
            "u" => Self::Ten(-6),
            "m" => Self::Ten(-3),
            "k" => Self::Ten(3),
            "M" => Self::Ten(6),
            "G" => Self::Ten(9),
            "T" => Self::Ten(12),
            "P" => Self::Ten(15),
            "E" => Self::Ten(18),
            "Ki" => Self::Two(10),
            "Mi" => Self::Two(20),
            "Gi" => Self::Two(30),
            "Ti" => Self::Two(40),
            "Pi" => Self::Two(50),
            "Ei" => Self::Two(60),
            _ => {
                let exponent = suffix.strip_prefix(['e', 'E'])?;
                let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
                if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                    return None;
                }
                Self::Ten(exponent.parse().ok().filter(|e: &i32| e.abs() <= Self::MAX_EXPONENT)?)
            }
        })
    }

    /// The value of these digits, of which the last `places` stand behind the point, in parts of a unit; `None` if it is
    /// out of range. Parts of a part are rounded up, so that what is asked for is never less than what was written.
    fn nanos(self, digits: u128, places: i32) -> Option<u128> {
        let (digits, power) = match self {
            Self::Two(power) => (digits.checked_mul(1 << power)?, 9 - places),
            Self::Ten(power) => (digits, power + 9 - places),
        };
        match (digits, 10_u128.checked_pow(power.unsigned_abs())) {
            (0, _) => Some(0),
            (_, Some(factor)) if power >= 0 => digits.checked_mul(factor),
            (_, Some(factor)) => Some(digits.div_ceil(factor)),
            (_, None) if power >= 0 => None,
            (_, None) => Some(1),
        }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantity(text: &str) -> Quantity {
        text.parse().unwrap_or_else(|e| panic!("{text} {e}"))
    }

    #[test]
    fn one_value_may_be_written_in_many_ways() {
        for same in [
            &["1", "1000m", "1.0", "+1", "1.", "01", "1e0", "1E0", "1000000u", "1000000000n", "10e-1", "0.001k"][..],
            &["64Mi", "65536Ki", "67108864", "0.0625Gi", "67108864000m", "67108.864k"],
            &["1E", "1e18", "1E18", "1000P"],
            &[".5", "0.5", "500m", "5e-1"],
            &["0", "0Mi", "0e9", "-0", "0.000", "0e99", ".0"],
            &["1.5Gi", "1536Mi"],
        ] {
            for text in same {
                assert_eq!(quantity(text), quantity(same[0]), "{text}");
                assert_eq!(quantity(text).as_str(), *text, "it is kept as it was written");
            }
        }
    }

    #[test]
    fn values_are_compared_and_not_texts() {
        for (less, more) in [
            ("9m", "10m"),
            ("100m", "1"),
            ("999Ki", "1Mi"),
            ("1G", "1Gi"),
            ("256Mi", "1Gi"),
            ("2", "1k"),
            ("1M", "1Mi"),
        ] {
            assert!(quantity(less) < quantity(more), "{less} {more}");
        }
        assert!(quantity("0.0000000001") > quantity("0"), "parts of a nano are rounded up, as Kubernetes does");
        assert_eq!(quantity("0.0000000001"), quantity("1n"));
        assert_eq!(quantity("1e-99"), quantity("1n"));
    }

    #[test]
    fn a_multiple_is_exact() {
        let more = |a: &str, times: &str, b: &str| quantity(a).is_more_than(&quantity(times), &quantity(b));
        assert!(!more("100m", "10", "10m") && more("101m", "10", "10m"));
        assert!(!more("25m", "2.5", "10m") && more("26m", "2.5", "10m"));
        assert!(more("1", "1", "0") && !more("0", "1", "0"));
        assert!(!more("7Ei", "2", "7E"));
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in [
            "", " ", "lots", "1 ", " 1", "1mm", "1ki", "1K", "1mi", "1MiB", "Mi", ".", "1.2.3", "1e", "1e+", "1e1.5",
            "e3", "--1", "+-1", "1e100", "0x10", "1_000", "1,5", "١", "∞", "NaN", "inf",
        ] {
            assert_eq!(text.parse::<Quantity>(), Err(NoQuantity::Malformed), "{text}");
        }
        assert_eq!("1".repeat(49).parse::<Quantity>(), Err(NoQuantity::Malformed));
        for text in ["-1", "-1n", "-64Mi", "-.5", "-1e-99"] {
            assert_eq!(text.parse::<Quantity>(), Err(NoQuantity::Negative), "{text}");
        }
        for text in ["8Ei", "9223372036854775808", "1e19", "10E", "1e99", &"9".repeat(48)] {
            assert_eq!(text.parse::<Quantity>(), Err(NoQuantity::TooLarge), "{text}");
        }
        assert!("9223372036854775807".parse::<Quantity>().is_ok());
    }
}
