//! The Helm chart, the only source of the manifests, and the subset of its template language that it uses: `if` blocks
//! of whole lines with `not`, and values, the release's namespace or `printf` of them. Each of these ends with
//! `toJson`: YAML includes JSON, and no value can end the text that it is put into.

use serde_json::Value;

/// Default settings (`values.yaml`).
pub const VALUES: &str = include_str!("../../../../charts/countersign/values.yaml");
/// JSON schema of the settings.
pub const SCHEMA: &str = include_str!("../../../../charts/countersign/values.schema.json");
/// Name and text of each template, in the order of applying.
pub const TEMPLATES: [(&str, &str); 5] = [
    ("server.yaml", include_str!("../../../../charts/countersign/templates/server.yaml")),
    ("agent.yaml", include_str!("../../../../charts/countersign/templates/agent.yaml")),
    ("injector.yaml", include_str!("../../../../charts/countersign/templates/injector.yaml")),
    ("admission.yaml", include_str!("../../../../charts/countersign/templates/admission.yaml")),
    ("monitoring.yaml", include_str!("../../../../charts/countersign/templates/monitoring.yaml")),
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
                Some(("if", path)) => {
                    let (path, wanted) = path.trim().strip_prefix("not ").map_or((path, true), |path| (path, false));
                    open.push(is_set(look_up(path.trim(), values, namespace).map_err(wrong)?) == wanted);
                }
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
            let (action, after) = after.split_once("}}").ok_or_else(|| wrong("`{{` without `}}`".into()))?;
            out.push_str(before);
            out.push_str(&filled(action.trim(), values, namespace).map_err(wrong)?);
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

/// What stands in the place of `PATH | toJson` or `printf "FORMAT" PATH… | toJson`.
fn filled(action: &str, values: &Value, namespace: &str) -> Result<String, String> {
    let Some((what, function)) = action.rsplit_once('|') else { return Err(format!("`{action}` needs `toJson`")) };
    let (what, function) = (what.trim(), function.trim());
    if function != "toJson" {
        return Err(format!("`{function}` is not known"));
    }
    match what.strip_prefix("printf ") {
        Some(rest) => Ok(Value::String(formatted(rest.trim(), values, namespace)?).to_string()),
        None => Ok(look_up(what, values, namespace)?.to_string()),
    }
}

/// What `"FORMAT" PATH…` makes, as Go's `printf` has it for `%s` of a text and `%v` of a text, number or boolean.
fn formatted(call: &str, values: &Value, namespace: &str) -> Result<String, String> {
    let wrong = || format!("`printf {call}` is not known");
    let (format, paths) = call.strip_prefix('"').and_then(|rest| rest.split_once('"')).ok_or_else(wrong)?;
    let mut paths = paths.split_whitespace();
    let mut parts = format.split('%');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let path = paths.next().ok_or_else(wrong)?;
        let (verb, rest) = part.split_at_checked(1).ok_or_else(wrong)?;
        match (verb, &*look_up(path, values, namespace)?) {
            ("s" | "v", Value::String(text)) => out.push_str(text),
            ("v", value @ (Value::Number(_) | Value::Bool(_))) => out.push_str(&value.to_string()),
            // Go would print its form of them.
            _ => return Err(format!("`%{verb}` does not fit `{path}`")),
        }
        out.push_str(rest);
    }
    if paths.next().is_some() { Err(wrong()) } else { Ok(out) }
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
        let template = "a: {{ printf \"%v-%s\" .Values.x.y .Release.Namespace | toJson }}\n  {{- if .Values.on }}\n\
                        b: 1\n  {{- end }}\n{{- if .Values.off }}\nc: 1\n{{- end }}\nd: 2\n";
        let values = json!({ "x": { "y": 7 }, "on": "yes", "off": "" });
        assert_eq!(render(template, &values, "ns").unwrap(), "a: \"7-ns\"\nb: 1\nd: 2\n");
    }

    #[test]
    fn a_block_may_be_for_what_is_not_set() {
        let template = "{{- if not .Values.on }}\na\n{{- end }}\nb\n";
        assert_eq!(render(template, &json!({ "on": true }), "ns").unwrap(), "b\n");
        assert_eq!(render(template, &json!({ "on": false }), "ns").unwrap(), "a\nb\n");
    }

    #[test]
    fn lists_and_objects_are_json_and_json_is_yaml() {
        let values =
            json!({ "list": [{ "operator": "Exists" }], "map": { "a/b": "c: \"d\" #e" }, "none": [], "text": "x" });
        let template = "a: {{ .Values.list | toJson }}\nb: {{ .Values.map|toJson }}\nc: {{ .Values.none | toJson }}\n\
                        d: {{ .Values.text | toJson }}\ne:\n  {{- if .Values.map }}\n  <<: {{ .Values.map | toJson }}\n  \
                        {{- end }}\n  a/b: ours\n";
        let rendered = render(template, &values, "ns").unwrap();
        assert!(rendered.starts_with("a: [{\"operator\":\"Exists\"}]\n"));
        let read: Value = serde_saphyr::from_str(&rendered).unwrap();
        let (list, map) = (&values["list"], &values["map"]);
        assert_eq!(read, json!({ "a": list, "b": map, "c": [], "d": "x", "e": { "a/b": "ours" } }));
        let said = |t: &str| render(t, &values, "ns").unwrap_err().to_string();
        for bare in [".Values.text", ".Values.list", "printf \"a%s\" .Values.text"] {
            assert_eq!(said(&format!("{{{{ {bare} }}}}")), format!("template line 1: `{bare}` needs `toJson`"));
        }
        assert_eq!(said("{{ .Values.list | toYaml }}"), "template line 1: `toYaml` is not known");
    }

    #[test]
    fn text_is_put_together_before_it_is_quoted() {
        let values = json!({ "text": "a\"b: #c\n- d", "number": 7, "on": true, "list": [] });
        let made = |action: &str| {
            let rendered =
                render(&format!("- {{{{ {action} | toJson }}}}\n"), &values, "ns").map_err(|e| e.to_string())?;
            let read: Value = serde_saphyr::from_str(&rendered).unwrap();
            Ok::<_, String>(read[0].clone())
        };
        assert_eq!(made(".Values.text"), Ok(values["text"].clone()));
        assert_eq!(
            made("printf \"--x=%s\" .Values.text"),
            Ok(format!("--x={}", values["text"].as_str().unwrap()).into())
        );
        assert_eq!(made("printf \"%s/%v.%v\" .Release.Namespace .Values.number .Values.on"), Ok("ns/7.true".into()));
        for (action, said) in [
            ("printf \"%s\" .Values.number", "`%s` does not fit `.Values.number`"),
            ("printf \"%v\" .Values.list", "`%v` does not fit `.Values.list`"),
            ("printf \"%d\" .Values.number", "`%d` does not fit `.Values.number`"),
            ("printf \"%s%s\" .Values.text", "is not known"),
            ("printf \"%s\" .Values.text .Values.text", "is not known"),
            ("printf \"%\" .Values.text", "is not known"),
            ("printf .Values.text", "is not known"),
        ] {
            assert!(made(action).unwrap_err().contains(said), "{action}");
        }
    }

    #[test]
    fn what_is_not_known_is_a_mistake_with_its_line() {
        let said = |t: &str| render(t, &json!({}), "ns").unwrap_err().to_string();
        assert_eq!(said("a\n{{ .Values.x | toJson }}"), "template line 2: `.Values.x` is not among the values");
        assert_eq!(said("{{ .Chart.Name | toJson }}"), "template line 1: `.Chart.Name` is not known");
        assert_eq!(said("{{- range .Values.x }}"), "template line 1: `range .Values.x` is not known");
        assert_eq!(said("{{- end }}"), "template line 1: `end` without `if`");
        assert_eq!(said("{{ .Values"), "template line 1: `{{` without `}}`");
    }
}
