//! Values as people write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use countersign_identity::policy::Mode;
use serde::{Deserialize, Deserializer};

/// A duration: `20s`, `5m`, `1h`, `30d`, or a combination such as `1h30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ttl(pub Duration);

impl FromStr for Ttl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a length of time: write 20s, 5m, 1h, 30d or 1h30m");
        let mut rest = text;
        let mut total = 0u64;
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
            let unit = match rest[digits..].chars().next() {
                Some('s') => 1,
                Some('m') => 60,
                Some('h') => 3_600,
                Some('d') => 86_400,
                _ => return Err(wrong()),
            };
            total = number.checked_mul(unit).and_then(|n| total.checked_add(n)).ok_or_else(wrong)?;
            rest = &rest[digits + 1..];
        }
        if total == 0 || total > 100 * 365 * 86_400 {
            return Err(if text.is_empty() { wrong() } else { format!("`{text}` is out of range: 1s to 36500d") });
        }
        Ok(Self(Duration::from_secs(total)))
    }
}

impl fmt::Display for Ttl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_secs();
        for (size, unit) in [(86_400, 'd'), (3_600, 'h'), (60, 'm'), (1, 's')] {
            if rest >= size {
                write!(f, "{}{unit}", rest / size)?;
                rest %= size;
            }
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Ttl {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Parses a mode. YAML reads a bare `off` as false, so `false` means off.
pub fn parse_mode(text: &str) -> Result<Mode, String> {
    if text == "false" {
        Ok(Mode::Off)
    } else {
        text.parse().map_err(|e: countersign_identity::policy::ModeError| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time() {
        for (text, seconds) in [("20s", 20), ("2m", 120), ("1h30m", 5_400), ("30d", 2_592_000)] {
            let ttl: Ttl = text.parse().unwrap();
            assert_eq!(ttl.0.as_secs(), seconds);
            assert_eq!(ttl.to_string(), text);
        }
        for bad in ["", "20", "s", "1x", "-1s", "0s", "1.5h", "99999999999999999999s", "1h 2m"] {
            assert!(bad.parse::<Ttl>().is_err(), "{bad:?}");
        }
        assert_eq!("0s".parse::<Ttl>().unwrap_err(), "`0s` is out of range: 1s to 36500d");
    }
}
