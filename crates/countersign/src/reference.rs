//! Generates docs/cli.md from the definitions that parse the command line. A test compares the two, so the page cannot
//! be outdated.

use std::fmt::Write;

use clap::{Arg, ArgAction, Command};

/// The whole page, in Markdown.
pub fn page(mut cli: Command) -> String {
    cli.build();
    let mut text = String::from(
        "# Command line\n\nMade by `countersign reference`; a test compares. Exit codes: 0 done, 1 it was tried and failed, 2 the \
         command line or a file has to be corrected first.\n",
    );
    section(&cli, "countersign", &mut text);
    text
}

fn section(command: &Command, path: &str, text: &mut String) {
    for sub in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        let path = format!("{path} {}", sub.get_name());
        if !sub.has_subcommands() {
            describe(sub, &path, text);
        }
        section(sub, &path, text);
    }
}

fn describe(command: &Command, path: &str, text: &mut String) {
    let about = command.get_long_about().or_else(|| command.get_about()).map(ToString::to_string).unwrap_or_default();
    // Writing to a String cannot fail.
    let _ = write!(text, "\n## `{path}`\n\n{about}\n\n");
    let shown = |a: &&Arg| !a.is_hide_set() && !["help", "version"].contains(&a.get_id().as_str());
    let arguments: Vec<&Arg> = command.get_arguments().filter(shown).collect();
    if arguments.is_empty() {
        return;
    }
    text.push_str("| argument | meaning |\n|---|---|\n");
    for argument in arguments {
        let _ = writeln!(text, "| `{}` | {} |", usage(argument), meaning(argument));
    }
}

fn usage(argument: &Arg) -> String {
    let takes_value = matches!(argument.get_action(), ArgAction::Set | ArgAction::Append);
    let value = argument
        .get_value_names()
        .filter(|_| takes_value)
        .map(|names| names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
    match (argument.get_long(), value) {
        (Some(long), Some(value)) => format!("--{long} {value}"),
        (Some(long), None) => format!("--{long}"),
        (None, value) => value.unwrap_or_else(|| argument.get_id().to_string().to_uppercase()),
    }
}

fn meaning(argument: &Arg) -> String {
    let help = argument.get_long_help().or_else(|| argument.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut cell = help.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    let defaults: Vec<_> = argument.get_default_values().iter().filter_map(|v| v.to_str()).collect();
    if !defaults.is_empty() && matches!(argument.get_action(), ArgAction::Set | ArgAction::Append) {
        let _ = write!(cell, " [default: {}]", defaults.join(" "));
    }
    if let Some(variable) = argument.get_env().and_then(|v| v.to_str()) {
        let _ = write!(cell, " [environment: {variable}]");
    }
    cell
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_in_the_docs_is_what_the_definitions_say() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md");
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        let made = page(crate::cli::Cli::definitions());
        assert!(kept == made, "docs/cli.md has drifted: run `cargo run -- reference > docs/cli.md`");
    }
}
