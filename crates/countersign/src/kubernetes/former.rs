//! Defaults of the chart that were others once. An earlier installation remembers which of them it had, because what it did not name
//! changes with them.

use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

/// A revision of the chart's defaults: it counts up with each entry of [`FORMER`] that has a number of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(u32);

impl Revision {
    /// Of installations that remember none.
    pub const FIRST: Self = Self(1);
    /// Of this binary.
    pub const NOW: Self = Self(2);
}

/// Settings whose default has changed: since which revision it is today's, the place of the setting, and the default before.
const FORMER: [(Revision, &str, bool); 1] = [(Revision(2), "/agent/csi/enabled", false)];

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Revision {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(Self).map_err(|_| format!("`{text}` is no number"))
    }
}

/// The defaults of an earlier revision, made of today's.
pub fn defaults_of(revision: Revision, mut now: Value) -> Value {
    for (since, place, before) in FORMER.iter().rev().filter(|(since, ..)| *since > revision) {
        debug_assert!(*since <= Revision::NOW);
        if let Some(value) = now.pointer_mut(place) {
            *value = json!(before);
        }
    }
    now
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::values::defaults;

    #[test]
    fn each_former_default_is_another_one_than_todays_and_todays_are_the_charts() {
        let now = defaults().unwrap();
        assert_eq!(defaults_of(Revision::NOW, now.clone()), now);
        let first = defaults_of(Revision::FIRST, now.clone());
        for (since, place, before) in FORMER {
            assert!(since <= Revision::NOW);
            assert_eq!((first.pointer(place), now.pointer(place)), (Some(&json!(before)), Some(&json!(!before))));
        }
    }
}
