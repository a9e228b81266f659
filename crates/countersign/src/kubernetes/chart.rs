//! The Helm chart, the only source of the manifests, and the subset of its template language that it uses: values, the
//! release's namespace, and `if` blocks of whole lines.

use serde_json::Value;

/// Default settings (`values.yaml`).
pub const VALUES: &str = include_str!("../../../../charts/countersign/values.yaml");
/// JSON schema of the settings.
pub const SCHEMA: &str = include_str!("../../../../charts/countersign/values.schema.json");
/// Name and text of each template, in the order of applying.
pub const TEMPLATES: [(&str, &str); 4] = [
    ("server.yaml", include_str!("../../../../charts/countersign/templates/server.yaml")),
    ("agent.yaml", include_str!("../../../../charts/countersign/templates/agent.yaml")),
    ("injector.yaml", include_str!("../../../../charts/countersign/templates/injector.yaml")),
    ("admission.yaml", include_str!("../../../../charts/countersign/templates/admission.yaml")),
];

/// A template that uses more than the subset. A bug of ours, which a test finds.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("template line {line}: {why}")]
pub struct TemplateError {
    line: usize,
    why: String,
}

/// Renders a template.
pub fn render(template: &str, values: &Value, namespace: &str) -> Result<String, TemplateError> {
    let mut out = String::new();
    // For each open `if`: whether its lines are included.
    let mut open: Vec<bool> = vec![];
    for (number, line) in template.lines().enumerate() {
        let wrong = |why: String| TemplateError { line: number + 1, why };
        if let Some(control) = line.trim().strip_prefix("{{-").and_then(|c| c.strip_suffix("}}")) {
            match control.trim().split_once(' ') {
                Some(("if", path)) => open.push(is_set(look_up(path.trim(), values, namespace).map_err(wrong)?)),
                None if control.trim() == "end" => drop(open.pop().ok_or_else(|| wrong("`end` without `if`".into()))?),
                _ => return Err(wrong(format!("`{}` is not known", control.trim()))),
            }
            continue;
        }
        if open.iter().any(|taken| !taken) {
            continue;
        }
        let mut rest = line;
        while let Some((before, after)) = rest.split_once("{{") {
            let (path, after) = after.split_once("}}").ok_or_else(|| wrong("`{{` without `}}`".into()))?;
            out.push_str(before);
            out.push_str(&text(look_up(path.trim(), values, namespace).map_err(wrong)?));
            rest = after;
        }
        out.push_str(rest);
        out.push('\n');
    }
    if open.is_empty() {
        Ok(out)
    } else {
        Err(TemplateError { line: template.lines().count(), why: "`if` without `end`".into() })
    }
}

fn look_up<'a>(path: &str, values: &'a Value, namespace: &str) -> Result<std::borrow::Cow<'a, Value>, String> {
    if path == ".Release.Namespace" {
        return Ok(std::borrow::Cow::Owned(namespace.into()));
    }
    let keys = path.strip_prefix(".Values.").ok_or_else(|| format!("`{path}` is not known"))?;
    let found = keys.split('.').try_fold(values, |value, key| value.get(key));
    found.map(std::borrow::Cow::Borrowed).ok_or_else(|| format!("`{path}` is not among the values"))
}

fn text(value: std::borrow::Cow<'_, Value>) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

/// Whether a value is true for Go's templates.
fn is_set(value: std::borrow::Cow<'_, Value>) -> bool {
    match &*value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_filled_in_and_blocks_are_taken_or_left() {
        let template = "a: {{ .Values.x.y }}-{{ .Release.Namespace }}\n  {{- if .Values.on }}\nb: 1\n  {{- end }}\n{{- if .Values.off }}\nc: 1\n{{- end }}\nd: 2\n";
        let values = json!({ "x": { "y": 7 }, "on": "yes", "off": "" });
        assert_eq!(render(template, &values, "ns").unwrap(), "a: 7-ns\nb: 1\nd: 2\n");
    }

    #[test]
    fn what_is_not_known_is_a_mistake_with_its_line() {
        let said = |t: &str| render(t, &json!({}), "ns").unwrap_err().to_string();
        assert_eq!(said("a\n{{ .Values.x }}"), "template line 2: `.Values.x` is not among the values");
        assert_eq!(said("{{ .Chart.Name }}"), "template line 1: `.Chart.Name` is not known");
        assert_eq!(said("{{- range .Values.x }}"), "template line 1: `range .Values.x` is not known");
        assert_eq!(said("{{- end }}"), "template line 1: `end` without `if`");
        assert_eq!(said("{{ .Values"), "template line 1: `{{` without `}}`");
    }
}
