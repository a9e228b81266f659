//! The template of a pod's SPIFFE ID, in the syntax of the reference registrar:
//! `ns/{{.Pod.Namespace}}/sa/{{.Pod.ServiceAccount}}`.

use std::fmt;
use std::str::FromStr;

use countersign_identity::trust_domain::parse_workload_id;
use countersign_identity::{SpiffeId, TrustDomain};

use crate::store::Pod;

/// The default template.
pub const DEFAULT: &str = "ns/{{.Pod.Namespace}}/sa/{{.Pod.ServiceAccount}}";

/// The path of a pod's SPIFFE ID, with placeholders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
    text: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Namespace,
    ServiceAccount,
    Name,
    Uid,
    Label(String),
    Annotation(String),
}

/// Why a template is invalid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TemplateError {
    /// The placeholder names no property of a pod.
    #[error(
        "`{{{{{0}}}}}` names nothing of a pod: use .Pod.Namespace, .Pod.ServiceAccount, .Pod.Name, .Pod.UID, .Pod.Labels.KEY or .Pod.Annotations.KEY"
    )]
    Blank(String),
    /// A placeholder is not closed.
    #[error("`{{{{` without `}}}}` in `{0}`")]
    Open(String),
    /// The result is not a SPIFFE ID.
    #[error("`{text}` makes no SPIFFE ID: {why}")]
    Id {
        /// The text that the template produced.
        text: String,
        /// The rule that it breaks.
        why: String,
    },
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(text: &str) -> Result<Self, TemplateError> {
        let mut parts = vec![];
        let mut rest = text.trim_start_matches('/');
        while let Some((before, after)) = rest.split_once("{{") {
            let (blank, after) = after.split_once("}}").ok_or_else(|| TemplateError::Open(text.to_owned()))?;
            parts.push(Part::Text(before.to_owned()));
            let blank = blank.trim();
            parts.push(match blank {
                ".Pod.Namespace" => Part::Namespace,
                ".Pod.ServiceAccount" => Part::ServiceAccount,
                ".Pod.Name" => Part::Name,
                ".Pod.UID" => Part::Uid,
                other => match (other.strip_prefix(".Pod.Labels."), other.strip_prefix(".Pod.Annotations.")) {
                    (Some(key), _) if !key.is_empty() => Part::Label(key.to_owned()),
                    (_, Some(key)) if !key.is_empty() => Part::Annotation(key.to_owned()),
                    _ => return Err(TemplateError::Blank(blank.to_owned())),
                },
            });
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Self { parts, text: text.to_owned() })
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Template {
    /// A pod's SPIFFE ID. `None` if the pod lacks a property that the template uses: it gets no identity then.
    pub fn id_of(&self, pod: &Pod, trust_domain: &TrustDomain) -> Option<Result<SpiffeId, TemplateError>> {
        let mut path = String::new();
        for part in &self.parts {
            path.push_str(match part {
                Part::Text(text) => text,
                Part::Namespace => &pod.namespace,
                Part::ServiceAccount => &pod.service_account,
                Part::Name => &pod.name,
                Part::Uid => &pod.uid,
                Part::Label(key) => pod.labels.get(key)?,
                Part::Annotation(key) => pod.annotations.get(key)?,
            });
        }
        let text = format!("spiffe://{trust_domain}/{path}");
        Some(parse_workload_id(&text).map_err(|e| TemplateError::Id { text, why: e.to_string() }))
    }

    /// Whether some pod of a namespace could have the SPIFFE ID with this path. A placeholder's value is never empty
    /// and has no slash.
    pub fn could_give(&self, path: &str, namespace: &str) -> bool {
        fits(&self.parts, path.trim_start_matches('/'), namespace)
    }

    /// The form of the SPIFFE IDs of a namespace's pods, for messages.
    pub fn shape_in(&self, namespace: &str) -> String {
        let parts = self.parts.iter().map(|part| match part {
            Part::Text(text) => text.clone(),
            Part::Namespace => namespace.to_owned(),
            Part::ServiceAccount => "SERVICE-ACCOUNT".to_owned(),
            Part::Name => "POD".to_owned(),
            Part::Uid => "UID".to_owned(),
            Part::Label(key) | Part::Annotation(key) => key.to_ascii_uppercase(),
        });
        format!("/{}", parts.collect::<String>())
    }
}

/// Whether a path consists of these parts. The recursion is as deep as there are parts, and a path has at most 2,048
/// bytes.
fn fits(parts: &[Part], path: &str, namespace: &str) -> bool {
    let Some((first, rest)) = parts.split_first() else { return path.is_empty() };
    match first {
        Part::Text(text) => path.strip_prefix(text.as_str()).is_some_and(|after| fits(rest, after, namespace)),
        Part::Namespace => path.strip_prefix(namespace).is_some_and(|after| fits(rest, after, namespace)),
        _ => {
            let segment = path.find('/').unwrap_or(path.len());
            // Tries every length at which the segment may end.
            (1..=segment).filter(|end| path.is_char_boundary(*end)).any(|end| fits(rest, &path[end..], namespace))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        Pod {
            namespace: "shop".into(),
            name: "web-0".into(),
            uid: "u1".into(),
            service_account: "web".into(),
            labels: [("spiffe".to_owned(), "front".to_owned()), ("bad".to_owned(), "a b".to_owned())].into(),
            ..Pod::default()
        }
    }

    fn id(template: &str) -> Option<String> {
        let td = TrustDomain::new("td").unwrap();
        template.parse::<Template>().unwrap().id_of(&pod(), &td).map(|id| match id {
            Ok(id) => id.to_string(),
            Err(e) => e.to_string(),
        })
    }

    #[test]
    fn blanks_are_filled_from_the_pod() {
        assert_eq!(id(DEFAULT).as_deref(), Some("spiffe://td/ns/shop/sa/web"));
        assert_eq!(
            id("/{{ .Pod.Labels.spiffe }}/{{.Pod.Name}}/{{.Pod.UID}}").as_deref(),
            Some("spiffe://td/front/web-0/u1")
        );
        assert_eq!(id("{{.Pod.Labels.absent}}"), None);
        assert!(id("{{.Pod.Labels.bad}}").unwrap().contains("makes no SPIFFE ID"));
    }

    #[test]
    fn a_template_with_a_mistake_says_what_there_is() {
        assert_eq!("x/{{.Pod.Node}}".parse::<Template>(), Err(TemplateError::Blank(".Pod.Node".into())));
        assert_eq!("x/{{.Pod.Name".parse::<Template>(), Err(TemplateError::Open("x/{{.Pod.Name".into())));
        let said = "{{x}}".parse::<Template>().unwrap_err().to_string();
        assert!(said.starts_with("`{{x}}` names nothing of a pod"), "{said}");
    }

    #[test]
    fn an_id_is_one_that_a_namespaces_pods_could_have_or_not() {
        let could = |template: &str, path: &str| template.parse::<Template>().unwrap().could_give(path, "shop");
        for (template, path, expected) in [
            (DEFAULT, "/ns/shop/sa/web", true),
            (DEFAULT, "/ns/shop/sa/", false),
            (DEFAULT, "/ns/shop/sa/web/x", false),
            (DEFAULT, "/ns/shopping/sa/web", false),
            (DEFAULT, "/ns/other/sa/web", false),
            (DEFAULT, "/ns/shop", false),
            (DEFAULT, "/x/ns/shop/sa/web", false),
            ("{{.Pod.Namespace}}-{{.Pod.Name}}-x/{{.Pod.UID}}", "/shop-a-b-x/u", true),
            ("{{.Pod.Namespace}}-{{.Pod.Name}}-x/{{.Pod.UID}}", "/shop-a-b/u", false),
            ("{{.Pod.Labels.spiffe}}", "/front", true),
            ("{{.Pod.Labels.spiffe}}", "/front/x", false),
        ] {
            assert_eq!(could(template, path), expected, "{template} {path}");
        }
        assert_eq!(DEFAULT.parse::<Template>().unwrap().shape_in("shop"), "/ns/shop/sa/SERVICE-ACCOUNT");
    }
}
