//! The `console` blocks of README and of the pages in `docs`, as a reader meets them.

use std::path::{Path, PathBuf};

/// Languages that a block may be in. What a reader types is `console`; a block in no language could be anything.
const LANGUAGES: [&str; 3] = ["console", "text", "yaml"];

/// A line of a block, without the remark at its end.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    /// Where it stands, as `PAGE:LINE`.
    pub place: String,
    /// What is typed.
    pub command: String,
}

impl Step {
    /// The command with what the reader has to fill in.
    pub fn with(&self, filled: &[(&str, &str)]) -> String {
        filled.iter().fold(self.command.clone(), |command, (placeholder, value)| command.replace(placeholder, value))
    }
}

/// A block of commands.
#[derive(Debug, PartialEq, Eq)]
pub struct Block {
    /// The page's path, from the top of the sources.
    pub page: String,
    /// Its commands, one a line.
    pub steps: Vec<Step>,
}

/// A file of the sources.
pub fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// All blocks, page by page, in the order in which they stand.
pub fn blocks() -> Vec<Block> {
    let mut pages: Vec<String> = ["", "docs"].iter().flat_map(|folder| pages_of(folder)).collect();
    pages.sort();
    pages.iter().flat_map(|page| blocks_of(page, &std::fs::read_to_string(source(page)).unwrap())).collect()
}

fn pages_of(folder: &str) -> Vec<String> {
    let files = std::fs::read_dir(source(folder)).unwrap().map(|entry| entry.unwrap().path());
    let pages = files.filter(|path| path.extension().is_some_and(|e| e == "md"));
    pages.map(|path| Path::new(folder).join(path.file_name().unwrap()).display().to_string()).collect()
}

fn blocks_of(page: &str, text: &str) -> Vec<Block> {
    let mut blocks = vec![];
    let mut open: Option<(&str, Block)> = None;
    for (line, number) in text.lines().map(str::trim).zip(1..) {
        let place = format!("{page}:{number}");
        match (line.strip_prefix("```"), open.take()) {
            (Some(language), None) => {
                assert!(LANGUAGES.contains(&language), "{place}: `{language}` is none of {}", LANGUAGES.join(", "));
                open = Some((language, Block { page: page.to_owned(), steps: vec![] }));
            }
            (Some(_), Some(("console", block))) => blocks.push(block),
            (None, Some((language, mut block))) => {
                let command = without_remark(line).to_owned();
                block.steps.extend((!command.is_empty()).then_some(Step { place, command }));
                open = Some((language, block));
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
    assert!(open.is_none(), "{page}: a block does not end");
    blocks
}

fn without_remark(line: &str) -> &str {
    if line.starts_with('#') { "" } else { line.split(" # ").next().unwrap_or(line).trim_end() }
}

#[test]
fn a_block_is_its_commands_without_remarks() {
    let page = "# Page\n\n```console\na --b c#d        # a remark\n# another\n\nb 'c'\n```\n\n```text\nno command\n```\n\n```console\nc\n```\n";
    let step = |line: u32, command: &str| Step { place: format!("p.md:{line}"), command: command.to_owned() };
    let block = |steps| Block { page: "p.md".into(), steps };
    assert_eq!(
        blocks_of("p.md", page),
        [block(vec![step(4, "a --b c#d"), step(7, "b 'c'")]), block(vec![step(15, "c")])]
    );
}
