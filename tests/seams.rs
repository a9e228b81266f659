//! ARCHITECTURE.md's table of seams against the code: a new choice touches the files that name the example, and no others.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// One line of the table.
struct Seam {
    /// What may be added.
    choice: String,
    /// The word that stands for the example in the code.
    example: String,
    /// Where it is looked for.
    below: String,
    /// The files that name it, its own first.
    files: BTreeSet<String>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The rows below `## Seams`: `| choice | example | below | files |`, code in backticks.
fn seams() -> Vec<Seam> {
    let page = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let section = page.split("\n## Seams\n").nth(1).expect("the page has the section");
    let rows =
        section.split("\n## ").next().unwrap().lines().filter(|line| line.starts_with("| ") && line.contains('`'));
    let code = |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(ToOwned::to_owned).collect() };
    let seam = |row: &str| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let one = |cell: &str| code(cell).into_iter().next().unwrap_or_else(|| panic!("no code in `{cell}`"));
        let below = one(cells[2]);
        let files = code(cells[3]).into_iter().map(|file| format!("crates/{file}")).collect();
        Seam { choice: cells[0].to_owned(), example: one(cells[1]), below, files }
    };
    rows.map(seam).collect()
}

/// Sources of a crate, without its tests.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if ["tests", "testing", "conformance"].contains(&name.as_str()) {
            continue;
        }
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Whether a word stands in a text by itself.
fn names(text: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let alone = |(at, _): (usize, &str)| {
        let before = text[..at].chars().next_back();
        let after = text[at + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    };
    text.match_indices(word).any(alone)
}

#[test]
fn a_new_choice_touches_the_files_that_the_table_names() {
    let root = root();
    let all = seams();
    assert!(all.len() >= 7, "{}", all.len());
    for Seam { choice, example, below, files } in all {
        let mut found = vec![];
        below.split(' ').for_each(|part| sources(&root.join("crates").join(part), &mut found));
        let naming = found.into_iter().filter(|path| names(&std::fs::read_to_string(path).unwrap(), &example));
        let naming: BTreeSet<String> =
            naming.map(|path| path.strip_prefix(&root).unwrap().display().to_string()).collect();
        assert_eq!(naming, files, "{choice}: what names `{example}` below {below}");
    }
}
