//! What a check comes to, and how it is printed.

use std::borrow::Cow;

use countersign_watch::in_words;
use serde_json::{Value, json};

use crate::kubernetes::cluster::one_line;

/// What is fine; or what is wrong, and how to fix it.
pub type Outcome = Result<String, Fault>;

/// Something that is wrong, or that could not be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What was found.
    pub found: String,
    /// What mends it.
    pub mend: Cow<'static, str>,
    /// Whether it was looked at: a check that nobody could make has found nothing wrong, and nothing right either.
    pub is_checked: bool,
}

impl Fault {
    /// Something that is wrong.
    pub fn new(found: impl Into<String>, mend: impl Into<Cow<'static, str>>) -> Self {
        Self { found: found.into(), mend: mend.into(), is_checked: true }
    }

    /// What could not be looked at, and what would help.
    pub fn unchecked(why: impl Into<String>, mend: impl Into<Cow<'static, str>>) -> Self {
        Self { is_checked: false, ..Self::new(why, mend) }
    }

    /// The API server did not let us read something.
    pub fn unread(error: &kube::Error, mend: impl Into<Cow<'static, str>>) -> Self {
        Self::unchecked(in_words(error), mend)
    }

    /// A part of an installation is missing, or could not be read.
    #[allow(clippy::needless_pass_by_value)] // taken by `map_err`
    pub fn absent(error: kube::Error) -> Self {
        match &error {
            kube::Error::Api(status) if status.code == 404 => {
                Self::new(in_words(&error), "apply the manifests of `countersign install`")
            }
            kube::Error::Api(status) if status.code == 403 => {
                Self::unread(&error, "have the permission granted to you (docs/kubernetes.md lists what `check` needs)")
            }
            _ => Self::unread(&error, "see whether the API server answers: kubectl get --raw /readyz"),
        }
    }
}

/// Result of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The check's name.
    pub check: &'static str,
    /// What it came to.
    pub outcome: Outcome,
}

impl Finding {
    /// Result, what was found, and what mends it.
    pub fn row(&self) -> [String; 4] {
        let (found, mend) = self.told();
        [self.check.to_owned(), self.result().to_owned(), found, mend.to_owned()]
    }

    fn json(&self) -> Value {
        let (found, mend) = self.told();
        let (ok, checked) = (self.outcome.is_ok(), self.result() != "not checked");
        json!({ "check": self.check, "ok": ok, "checked": checked, "found": found, "mend": mend })
    }

    fn result(&self) -> &'static str {
        match &self.outcome {
            Ok(_) => "ok",
            Err(fault) if fault.is_checked => "FAILED",
            Err(_) => "not checked",
        }
    }

    fn told(&self) -> (String, &str) {
        match &self.outcome {
            Ok(found) => (one_line(found), ""),
            Err(fault) => (one_line(&fault.found), &fault.mend),
        }
    }
}

/// Whether everything was looked at and is fine.
pub fn are_good(findings: &[Finding]) -> bool {
    findings.iter().all(|f| f.outcome.is_ok())
}

/// The findings for programs.
pub fn json_of(findings: &[Finding]) -> Value {
    json!({ "ok": are_good(findings), "checks": findings.iter().map(Finding::json).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: u16) -> kube::Error {
        let status = json!({ "message": format!("answer {code}"), "reason": "", "code": code });
        kube::Error::Api(serde_json::from_value(status).unwrap())
    }

    #[test]
    fn what_could_not_be_looked_at_is_neither_right_nor_wrong() {
        let finding = |outcome| Finding { check: "x", outcome };
        let all = [finding(Ok("a".into())), finding(Err(Fault::unread(&status(403), "b")))];
        assert!(!are_good(&all));
        assert_eq!(all[1].row(), ["x", "not checked", "answer 403", "b"]);
        let [first, second] = [0, 1].map(|n| json_of(&all)["checks"][n].clone());
        assert_eq!((&first["ok"], &first["checked"], &first["mend"]), (&json!(true), &json!(true), &json!("")));
        assert_eq!((&second["ok"], &second["checked"]), (&json!(false), &json!(false)));
        assert_eq!(finding(Err(Fault::new("a\n b", "c"))).row(), ["x", "FAILED", "a b", "c"]);
    }

    #[test]
    fn only_what_is_not_there_is_missing() {
        let absent = |code| Fault::absent(status(code));
        assert!(absent(404).is_checked && absent(404).mend.contains("countersign install"));
        assert!(!absent(403).is_checked && absent(403).mend.contains("granted"));
        assert!(!absent(500).is_checked);
    }
}
