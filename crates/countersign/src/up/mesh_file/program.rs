//! Finds the program of a command as a shell would, with the reason if it cannot be started.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::settings::words::shown;

/// Finds a program as a shell would. Errors name the reason.
pub fn find_program(program: &str) -> Result<PathBuf, String> {
    if program.is_empty() {
        return Err("the program is an empty text; expected a name or a path".into());
    }
    if program.contains('/') {
        return executable(Path::new(program)).map(|()| program.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut not_executable = None;
    for folder in std::env::split_paths(&path) {
        let candidate = folder.join(program);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(why) if candidate.is_file() => not_executable = Some(why),
            Err(_) => {}
        }
    }
    if let Some(why) = not_executable {
        return Err(why);
    }
    // The most common cause is a whole command line in one text.
    let one_text =
        if program.contains(char::is_whitespace) { "; write its arguments as further items of the list" } else { "" };
    let shown = shown(program);
    Err(if one_text.is_empty() {
        format!("there is no program `{shown}` on the PATH; install it, or write its whole path")
    } else {
        format!("there is no program `{shown}` on the PATH{one_text}")
    })
}

fn executable(path: &Path) -> Result<(), String> {
    let shown = shown(&path.display().to_string());
    let about = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => format!("there is no program `{shown}`"),
        _ => format!("`{shown}` cannot be reached: {e}"),
    })?;
    if about.is_dir() {
        return Err(format!("`{shown}` is a folder; expected a program"));
    }
    if !about.is_file() {
        return Err(format!("`{shown}` is not a regular file; expected a program"));
    }
    if about.permissions().mode() & 0o111 == 0 {
        return Err(format!("`{shown}` is not executable; make it so with `chmod +x`"));
    }
    Ok(())
}
