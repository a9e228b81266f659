//! Renders a view for a window of any size: as many columns and rows as fit, and never more lines than the window has.

use super::view::{Row, View};
use crate::settings::words::escaped;

/// A line and its style.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Text, no wider than the window.
    pub text: String,
    /// Style of the whole line.
    pub style: Style,
}

/// Style of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Normal text without attributes.
    Plain,
    /// Bold, for headings.
    Head,
    /// Highlighted, because something is wrong.
    Bad,
    /// Dimmed, for hints.
    Dim,
}

/// A rendered frame and its scroll position.
#[derive(Debug)]
pub struct Frame {
    /// Lines, at most as many as the window has.
    pub lines: Vec<Line>,
    /// Index of the first row that is shown.
    pub scroll: usize,
    /// Number of rows that are shown.
    pub page: usize,
}

/// Largest width of a column, in characters.
const MAX_COLUMN: usize = 48;
/// Spaces between two columns.
const GAP: usize = 2;
/// Number of digits that are shown of a serial number.
const SERIAL: usize = 12;

type Cell = fn(&Row) -> String;

/// Columns from left to right with their rank: a narrow window drops the highest ranks first.
const COLUMNS: [(&str, u8, Cell); 10] = [
    ("WORKLOAD", 0, |r| r.name.clone()),
    ("STATE", 0, |r| r.state.clone()),
    ("RESTARTS", 2, |r| r.restarts.to_string()),
    ("REFUSED", 3, |r| r.refused.to_string()),
    ("SVID ENDS IN", 1, Row::expires),
    ("IN", 4, |r| r.connections_in.to_string()),
    ("OUT", 5, |r| r.connections_out.to_string()),
    ("BYTES", 6, Row::amount),
    ("SPIFFE ID", 7, |r| r.spiffe_id.clone()),
    ("SERIAL", 8, |r| r.serial.chars().take(SERIAL).collect()),
];

/// Lays a view out. `scroll` is the index of the first row to show.
pub fn frame(view: &View, width: usize, height: usize, scroll: usize) -> Frame {
    let (width, height) = (width.max(1), height.max(1));
    // Lines that do not scroll: title, summary, table head and footer. A low window keeps the rows and little else.
    let events = if height >= 14 { view.events.len().min((height / 5).max(2)) } else { 0 };
    let hints = if height >= 20 { view.hints.len() } else { 0 };
    let mut above = vec![];
    if height >= 4 {
        above.push(line(&view.title, Style::Head));
    }
    if height >= 3 {
        above.push(line(&view.summary, if view.troubled { Style::Bad } else { Style::Plain }));
    }
    let roomy = usize::from(height >= 12);
    let foot = usize::from(height >= 6);
    let below = foot + events + usize::from(events > 0) * (1 + roomy) + hints + usize::from(hints > 0) * roomy;
    let head = usize::from(height >= 2);
    let page = height.saturating_sub(above.len() + roomy + head + below);
    let last = view.rows.len().saturating_sub(page);
    let scroll = scroll.min(last);
    let shown = &view.rows[scroll..view.rows.len().min(scroll + page)];

    let columns = columns(&view.rows, width);
    let mut lines = above;
    lines.extend((0..roomy).map(|_| line("", Style::Plain)));
    if head == 1 {
        lines.push(line(&cells(&columns, |(name, ..)| (*name).to_owned()), Style::Head));
    }
    for row in shown {
        let style = if row.trouble > 0 { Style::Bad } else { Style::Plain };
        lines.push(line(&cells(&columns, |(_, _, cell)| cell(row)), style));
    }
    if events > 0 {
        lines.extend((0..roomy).map(|_| line("", Style::Plain)));
        lines.push(line("EVENTS", Style::Head));
        lines.extend(view.events[view.events.len() - events..].iter().map(|e| line(e, Style::Plain)));
    }
    if hints > 0 {
        lines.extend((0..roomy).map(|_| line("", Style::Plain)));
        lines.extend(view.hints.iter().map(|h| line(h, Style::Plain)));
    }
    if foot == 1 {
        lines.push(line(&foot_line(view.rows.len(), scroll, shown.len()), Style::Dim));
    }
    for one in &mut lines {
        one.text = cut(&one.text, width);
    }
    lines.truncate(height);
    Frame { lines, scroll, page: page.max(1) }
}

/// A line; what sidecars say of themselves is in it.
fn line(text: &str, style: Style) -> Line {
    Line { text: escaped(text), style }
}

fn foot_line(all: usize, scroll: usize, shown: usize) -> String {
    let where_ = if shown < all {
        format!("{}–{} of {all}   ↑ ↓ PgUp PgDn scroll   ", scroll + 1, scroll + shown)
    } else {
        String::new()
    };
    format!("{where_}q takes the mesh down")
}

type Column<'a> = (&'a (&'static str, u8, Cell), usize);

/// The columns that fit, with their widths. Widths are computed from all rows, so that they do not change while
/// scrolling.
fn columns(rows: &[Row], width: usize) -> Vec<Column<'static>> {
    let all: Vec<Column<'static>> = COLUMNS
        .iter()
        .map(|column| {
            let widest = rows.iter().map(|r| column.2(r).chars().count()).max().unwrap_or(0);
            (column, widest.max(column.0.len()).min(MAX_COLUMN))
        })
        .collect();
    let mut kept = all;
    // Drops the least important column until the rest fits; the first two columns always stay and are shortened
    // instead.
    while kept.len() > 2 && kept.iter().map(|(_, w)| w + GAP).sum::<usize>() - GAP > width {
        let Some(least) = kept.iter().map(|(c, _)| c.1).max() else { break };
        kept.retain(|(c, _)| c.1 != least);
    }
    if kept.len() == 2 && kept[0].1 + GAP + kept[1].1 > width {
        // A long state must not displace the name, nor the name the state.
        let state = kept[1].1.min((width / 3).max(1));
        kept[0].1 = kept[0].1.min(width.saturating_sub(state + GAP).max(1));
    }
    kept
}

fn cells(columns: &[Column<'_>], text: impl Fn(&(&'static str, u8, Cell)) -> String) -> String {
    let one = |(column, width): &Column<'_>| format!("{:<width$}", cut(&text(column), *width));
    let cells: Vec<String> = columns.iter().map(one).collect();
    cells.join(&" ".repeat(GAP)).trim_end().to_owned()
}

/// Shortens a text to `width` characters. All texts here have characters of one cell: names and IDs are ASCII, and
/// everything else is escaped on input.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize) -> Row {
        Row {
            name: format!("workload-{n:02}"),
            state: "running".into(),
            spiffe_id: format!("spiffe://shop.local/ns/default/sa/workload-{n:02}"),
            serial: "0123456789abcdef0123".into(),
            ..Row::default()
        }
    }

    /// 61 workloads of which one is broken, and some events.
    fn view() -> View {
        let mut rows: Vec<Row> = (0..61).map(row).collect();
        rows[0].trouble = 3;
        rows[0].state = "no answer for 8s".into();
        View {
            title: "mesh shop  trust domain shop.local  mode strict".into(),
            summary: "61 workloads: 60 running, 1 not".into(),
            troubled: true,
            rows,
            events: (0..9).map(|n| format!("10:00:0{n}Z event {n}")).collect(),
            hints: vec!["join it: …".into(), "logs: …".into()],
        }
    }

    fn text(frame: &Frame) -> String {
        frame.lines.iter().map(|l| l.text.as_str()).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_frame_fits_every_window_and_shows_what_is_wrong() {
        let view = view();
        for (width, height) in [(120, 30), (60, 12), (80, 24), (20, 5), (200, 100), (10, 3), (3, 2), (1, 1), (0, 0)] {
            let frame = frame(&view, width, height, 0);
            assert!(frame.lines.len() <= height.max(1), "{width}x{height}: {} lines", frame.lines.len());
            let widest = frame.lines.iter().map(|l| l.text.chars().count()).max().unwrap_or(0);
            assert!(widest <= width.max(1), "{width}x{height}: {widest} wide");
            if height >= 3 && width >= 20 {
                assert!(text(&frame).contains("workload-00"), "{width}x{height}:\n{}", text(&frame));
            }
        }
    }

    #[test]
    fn a_window_of_120_by_30_has_the_head_the_broken_one_events_and_the_foot() {
        let frame = frame(&view(), 120, 30, 0);
        let text = text(&frame);
        assert_eq!(frame.lines.len(), 30, "{text}");
        assert!(text.starts_with("mesh shop") && text.contains("\n61 workloads: 60 running, 1 not\n"), "{text}");
        assert!(text.contains("RESTARTS") && text.contains("event 8") && text.contains("logs: …"), "{text}");
        let bad: Vec<&Line> = frame.lines.iter().filter(|l| l.style == Style::Bad).collect();
        assert!(bad[1].text.starts_with("workload-00  no answer for 8s"), "{bad:?}");
        assert!(text.ends_with("of 61   ↑ ↓ PgUp PgDn scroll   q takes the mesh down"), "{text}");
    }

    #[test]
    fn a_window_of_60_by_12_drops_columns_and_wraps_nothing() {
        let frame = frame(&view(), 60, 12, 0);
        let head = &frame.lines.iter().find(|l| l.text.starts_with("WORKLOAD")).unwrap().text;
        assert!(head.contains("STATE") && head.contains("RESTARTS") && !head.contains("SPIFFE ID"), "{head}");
        assert!(frame.page >= 6, "{}", text(&frame));
    }

    #[test]
    fn nothing_that_a_sidecar_says_moves_the_cursor() {
        let mut view = view();
        view.rows[0].serial = "\u{1b}[2J\u{9b}1A".into();
        view.rows[0].state = "\r\nforged".into();
        view.summary.push('\u{7}');
        let frame = frame(&view, 200, 100, 0);
        assert!(frame.lines.iter().all(|l| !l.text.contains(char::is_control)), "{}", text(&frame));
        assert!(frame.lines.iter().all(|l| l.text.chars().count() <= 200));
    }

    #[test]
    fn scrolling_ends_at_the_last_row() {
        let frame = frame(&view(), 120, 30, usize::MAX);
        assert!(text(&frame).contains("workload-60"));
        assert_eq!(frame.scroll + frame.page, 61);
        let small = View { rows: vec![row(1)], events: vec![], ..view() };
        let all = super::frame(&small, 120, 30, 7);
        assert_eq!(all.scroll, 0);
        assert!(text(&all).ends_with("\nq takes the mesh down"));
    }
}
