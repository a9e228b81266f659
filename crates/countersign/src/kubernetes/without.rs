//! Pods that an uninstallation does not wait for, because its administrator says so: whoever may make pods could otherwise hold it up
//! with one that answers and never does what it is told.

use std::convert::Infallible;
use std::str::FromStr;

/// A namespace, or one pod, `NAMESPACE/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Without(String);

impl FromStr for Without {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }
}

impl Without {
    /// Whether a pod, `NAMESPACE/NAME`, is meant.
    fn covers(&self, pod: &str) -> bool {
        pod == self.0 || pod.split_once('/').is_some_and(|(namespace, _)| namespace == self.0)
    }
}

/// Whether a pod, `NAMESPACE/NAME`, is among them.
pub fn is_without(all: &[Without], pod: &str) -> bool {
    all.iter().any(|one| one.covers(pod))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_or_a_pod_is_left_out_and_nothing_else() {
        let all = ["shop", "pay/web-0", "test/"].map(|text| text.parse::<Without>().unwrap());
        for pod in ["shop/web", "pay/web-0", "test/a"] {
            assert!(is_without(&all, pod), "{pod}");
        }
        for pod in ["shop-eu/web", "pay/web-01", "pay/web", "a/shop"] {
            assert!(!is_without(&all, pod), "{pod}");
        }
    }
}
