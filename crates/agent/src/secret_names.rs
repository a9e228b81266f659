//! Names by which an Envoy asks for a secret that it knows no SPIFFE ID of.

use countersign_identity::shown::shown;

/// Longest such name, in bytes.
const MAX_BYTES: usize = 256;

/// The three names; no two are equal, and none is a SPIFFE ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretNames {
    svid: Box<str>,
    bundle: Box<str>,
    all_bundles: Box<str>,
}

/// What such a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// The caller's default SVID.
    Svid,
    /// Our own trust domain's bundle.
    Bundle,
    /// All bundles that the caller may verify with.
    AllBundles,
}

/// Why names cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SecretNameError {
    /// It could be mistaken for something else.
    #[error("`{}` is no name for a secret: {why}", shown(name))]
    Name {
        /// The name as given.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// One name for two secrets.
    #[error("`{}` names two secrets; give each a name of its own", shown(name))]
    Twice {
        /// The name as given.
        name: String,
    },
}

impl Default for SecretNames {
    /// SPIRE's names.
    fn default() -> Self {
        Self { svid: "default".into(), bundle: "ROOTCA".into(), all_bundles: "ALL".into() }
    }
}

impl SecretNames {
    /// Errors: see [`SecretNameError`]. `None` leaves a default.
    pub fn new(
        svid: Option<String>,
        bundle: Option<String>,
        all_bundles: Option<String>,
    ) -> Result<Self, SecretNameError> {
        let default = Self::default();
        let names = Self {
            svid: svid.map_or(default.svid, Box::from),
            bundle: bundle.map_or(default.bundle, Box::from),
            all_bundles: all_bundles.map_or(default.all_bundles, Box::from),
        };
        let all = [&names.svid, &names.bundle, &names.all_bundles];
        for (at, name) in all.into_iter().enumerate() {
            if let Some(why) = unusable(name) {
                return Err(SecretNameError::Name { name: name.to_string(), why });
            }
            if all[..at].contains(&name) {
                return Err(SecretNameError::Twice { name: name.to_string() });
            }
        }
        Ok(names)
    }

    /// What a name stands for; `None` if it is none of the three.
    pub fn meaning(&self, name: &str) -> Option<Special> {
        match name {
            _ if name == &*self.svid => Some(Special::Svid),
            _ if name == &*self.bundle => Some(Special::Bundle),
            _ if name == &*self.all_bundles => Some(Special::AllBundles),
            _ => None,
        }
    }

    /// The three names, for a person.
    pub fn list(&self) -> [&str; 3] {
        [&self.svid, &self.bundle, &self.all_bundles]
    }
}

fn unusable(name: &str) -> Option<&'static str> {
    match name {
        "" => Some("it is empty"),
        "*" => Some("it means everything"),
        _ if name.starts_with("spiffe://") => Some("it looks like a SPIFFE ID"),
        _ if name.len() > MAX_BYTES => Some("it is longer than 256 bytes"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_stands_for_one_secret() {
        let names = SecretNames::new(None, Some("null".into()), Some("ROOTCA".into())).unwrap();
        let meanings = ["default", "null", "ROOTCA", "ALL"].map(|name| names.meaning(name));
        assert_eq!(meanings, [Some(Special::Svid), Some(Special::Bundle), Some(Special::AllBundles), None]);
        for bad in ["", "*", "spiffe://a/b", &"x".repeat(257)] {
            assert!(
                matches!(SecretNames::new(Some(bad.into()), None, None), Err(SecretNameError::Name { .. })),
                "{bad}"
            );
        }
        let twice = SecretNames::new(None, None, Some("default".into()));
        assert_eq!(twice, Err(SecretNameError::Twice { name: "default".into() }));
    }
}
