//! Parsing of a role's metrics page, for commands.

/// Each line of a metric: the text of its labels, and its value.
pub fn metric<'a>(page: &'a str, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
    page.lines().filter_map(move |line| {
        let rest = line.strip_prefix(name)?;
        let (labels, value) = rest.rsplit_once(' ')?;
        (labels.is_empty() || labels.starts_with('{')).then_some(())?;
        Some((labels.trim_matches(['{', '}']), value.parse().ok()?))
    })
}

/// The value of a label in a line's labels; `None` if it is missing.
pub fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    labels.split(',').find_map(|pair| pair.strip_prefix(name)?.strip_prefix("=\"")?.strip_suffix('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metrics_lines_are_read_with_their_labels() {
        let page = "# TYPE x gauge\nx_ends{authority=\"a1\",status=\"active\"} 12\nx_ends_total 3\nx_ends{authority=\"b2\",status=\"old\"} 1.5e1\n";
        let found: Vec<_> = metric(page, "x_ends").collect();
        assert_eq!(found, [("authority=\"a1\",status=\"active\"", 12.0), ("authority=\"b2\",status=\"old\"", 15.0)]);
        assert_eq!(label(found[1].0, "status"), Some("old"));
        assert_eq!(label(found[1].0, "stat"), None);
        assert_eq!(metric(page, "x_ends_total").next(), Some(("", 3.0)));
    }
}
