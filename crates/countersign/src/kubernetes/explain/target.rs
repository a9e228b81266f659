//! What is to be explained: a kind and a name, as kubectl takes them.

use std::str::FromStr;

use crate::settings::Mistake;

/// The kinds that can be explained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Pod,
    Deployment,
    ReplicaSet,
    StatefulSet,
    DaemonSet,
    Job,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Pod, Self::Deployment, Self::ReplicaSet, Self::StatefulSet, Self::DaemonSet, Self::Job];

    /// Its name in the API, `ReplicaSet`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pod => "Pod",
            Self::Deployment => "Deployment",
            Self::ReplicaSet => "ReplicaSet",
            Self::StatefulSet => "StatefulSet",
            Self::DaemonSet => "DaemonSet",
            Self::Job => "Job",
        }
    }

    /// Its name on the command line, in the singular and in lowercase.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Deployment => "deployment",
            Self::ReplicaSet => "replicaset",
            Self::StatefulSet => "statefulset",
            Self::DaemonSet => "daemonset",
            Self::Job => "job",
        }
    }

    fn short(self) -> &'static str {
        match self {
            Self::Pod => "po",
            Self::Deployment => "deploy",
            Self::ReplicaSet => "rs",
            Self::StatefulSet => "sts",
            Self::DaemonSet => "ds",
            Self::Job => "job",
        }
    }

    /// The kind of this name in the API.
    pub fn of_api(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl FromStr for Kind {
    type Err = Mistake;

    fn from_str(text: &str) -> Result<Self, Mistake> {
        let lower = text.to_ascii_lowercase();
        let called = |kind: &Self| [kind.word(), kind.short(), &format!("{}s", kind.word())].contains(&lower.as_str());
        let words = || Self::ALL.map(Self::word).join(", ");
        Self::ALL.into_iter().find(called).ok_or_else(|| Mistake(format!("`{text}` cannot be explained: {}", words())))
    }
}

/// An object of one of the kinds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub kind: Kind,
    pub name: String,
}

impl Target {
    /// Reads `KIND NAME` or `KIND/NAME`.
    pub fn read(words: &[String]) -> Result<Self, Mistake> {
        let form = || Mistake(format!("`{}` is not KIND NAME or KIND/NAME, such as pod/web-0", words.join(" ")));
        let (kind, name) = match words {
            [both] => both.split_once('/').ok_or_else(form)?,
            [kind, name] if !kind.contains('/') => (kind.as_str(), name.as_str()),
            _ => return Err(form()),
        };
        if name.is_empty() || name.contains('/') {
            return Err(form());
        }
        Ok(Self { kind: kind.parse()?, name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<Target, String> {
        Target::read(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>()).map_err(|e| e.to_string())
    }

    #[test]
    fn an_object_is_named_as_kubectl_takes_it() {
        let target = |kind, name: &str| Ok(Target { kind, name: name.into() });
        assert_eq!(read(&["pod", "web-0"]), target(Kind::Pod, "web-0"));
        assert_eq!(read(&["deployment/web"]), target(Kind::Deployment, "web"));
        assert_eq!(read(&["deploy/web"]), target(Kind::Deployment, "web"));
        assert_eq!(read(&["Jobs", "once"]), target(Kind::Job, "once"));
        for kind in Kind::ALL {
            assert_eq!((Kind::of_api(kind.name()), kind.word().parse::<Kind>().ok()), (Some(kind), Some(kind)));
        }
    }

    #[test]
    fn everything_else_is_a_mistake_that_says_what_there_is() {
        for words in [&["web"][..], &["pod/"], &["pod", "a/b"], &["pod/web", "x"]] {
            assert!(read(words).unwrap_err().contains("is not KIND NAME"), "{words:?}");
        }
        assert!(read(&["service/web"]).unwrap_err().contains("pod, deployment, replicaset"));
    }
}
