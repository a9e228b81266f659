//! Checks before the start whether a user can read the folder that its program starts in.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::account::Account;
use super::mesh_file::WorkloadSpec;

/// The first folder on the path to `folder`, including itself, that a user may not enter or, for the last one, read.
/// Only owner, group and mode are checked, not access control lists, so the result is a warning and no error.
fn obstacle(account: &Account, folder: &Path) -> Option<PathBuf> {
    if account.uid == 0 {
        return None;
    }
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let mut way: Vec<&Path> = folder.ancestors().collect();
    way.reverse();
    way.into_iter()
        .find(|part| {
            let needed = if *part == folder { 0o5 } else { 0o1 };
            std::fs::metadata(part).is_ok_and(|m| permission(account, &m) & needed != needed)
        })
        .map(Path::to_owned)
}

/// The three permission bits that apply to a user.
fn permission(account: &Account, about: &std::fs::Metadata) -> u32 {
    if about.uid() == account.uid {
        about.mode() >> 6 & 0o7
    } else if about.gid() == account.gid || account.groups.contains(&about.gid()) {
        about.mode() >> 3 & 0o7
    } else {
        about.mode() & 0o7
    }
}

/// What a program meets in the folder that it is meant to start in.
#[derive(PartialEq, Eq)]
enum Start {
    /// It starts in its home: it inherits the folder, and cannot read it.
    AtHome,
    /// It starts there and can use the folder, but not by its path.
    OnlyRelative(PathBuf),
    /// It is told to start in a folder that it cannot enter or read.
    Closed(PathBuf),
}

/// What hinders a user in the folder that it starts in; `None` if nothing does. A folder that is inherited is entered already
/// (`launch`); one of `workdir` is entered by its path.
fn hindrance(account: &Account, spec: &WorkloadSpec, folder: &Path) -> Option<Start> {
    let obstacle = obstacle(account, folder)?;
    let is_read = std::fs::metadata(folder).is_ok_and(|m| permission(account, &m) & 0o4 != 0);
    Some(match (&spec.workdir, is_read) {
        (Some(_), _) => Start::Closed(obstacle),
        (None, false) => Start::AtHome,
        (None, true) => Start::OnlyRelative(obstacle),
    })
}

/// A warning for each folder that workloads start in and cannot use; `current` applies to workloads without a working
/// directory.
pub fn words<'a>(workloads: impl Iterator<Item = (&'a WorkloadSpec, Account)>, current: Option<&Path>) -> Vec<String> {
    let mut words: Vec<(PathBuf, Start, Vec<String>)> = vec![];
    for (spec, account) in workloads {
        let Some(folder) = spec.workdir.as_deref().or(current) else { continue };
        let Some(start) = hindrance(&account, spec, folder) else { continue };
        let who = format!("{} (uid {})", spec.name, account.uid);
        match words.iter_mut().find(|(f, s, _)| f == folder && *s == start) {
            Some((_, _, all)) => all.push(who),
            None => words.push((folder.to_owned(), start, vec![who])),
        }
    }
    words.into_iter().map(|(folder, start, all)| sentence(&folder, &start, &all)).collect()
}

fn sentence(folder: &Path, start: &Start, who: &[String]) -> String {
    let starts = if who.len() == 1 { "starts" } else { "start" };
    let (who, shown) = (who.join(", "), folder.display());
    let how = match start {
        Start::AtHome => format!("{who} {starts} at home, because its user cannot read {shown}"),
        Start::OnlyRelative(obstacle) => format!(
            "{who} {starts} in {shown}, where only relative paths work, because its user may not enter {}",
            obstacle.display()
        ),
        Start::Closed(obstacle) if obstacle == folder => {
            format!("{who} {starts} in {shown}, which its user cannot read")
        }
        Start::Closed(obstacle) => {
            format!("{who} {starts} in {shown}, which its user cannot read, because of {}", obstacle.display())
        }
    };
    format!("{how}; set `workdir` to another folder, or `user`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_words_say_where_a_program_will_start() {
        let top = tempfile::tempdir().unwrap();
        let below = top.path().canonicalize().unwrap().join("closed/below");
        std::fs::create_dir_all(&below).unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        let closed = below.parent().unwrap();
        mode(top.path(), 0o755);
        mode(closed, 0o700);
        mode(&below, 0o755);
        let file = top.path().join("mesh.yaml");
        std::fs::write(&file, "workloads:\n  - {name: a, command: [sleep]}\n").unwrap();
        let mut spec = crate::up::mesh_file::load(&file).unwrap().workloads.remove(0);
        let stranger = Account { uid: 54_321, gid: 54_321, groups: vec![] };
        let said = |spec: &WorkloadSpec, current: &Path| {
            words([(spec, stranger.clone())].into_iter(), Some(current)).join("\n")
        };
        let (shown, closed_shown) = (below.display(), closed.display());
        let fix = "; set `workdir` to another folder, or `user`";
        assert_eq!(
            said(&spec, &below),
            format!(
                "a (uid 54321) starts in {shown}, where only relative paths work, because its user may not enter {closed_shown}{fix}"
            )
        );
        assert_eq!(
            said(&spec, closed),
            format!("a (uid 54321) starts at home, because its user cannot read {closed_shown}{fix}")
        );
        spec.workdir = Some(below.clone());
        let expected =
            format!("a (uid 54321) starts in {shown}, which its user cannot read, because of {closed_shown}{fix}");
        assert_eq!(said(&spec, top.path()), expected);
    }

    #[test]
    fn a_closed_folder_on_the_way_is_found() {
        let top = tempfile::tempdir().unwrap();
        let below = top.path().join("a/b");
        std::fs::create_dir_all(&below).unwrap();
        let mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        let stranger = Account { uid: 54_321, gid: 54_321, groups: vec![] };
        mode(top.path(), 0o755);
        mode(&top.path().join("a"), 0o700);
        assert_eq!(obstacle(&stranger, &below), Some(top.path().canonicalize().unwrap().join("a")));
        mode(&top.path().join("a"), 0o711);
        mode(&below, 0o711);
        assert_eq!(obstacle(&stranger, &below), Some(below.canonicalize().unwrap()), "passable, and not readable");
        mode(&below, 0o755);
        assert_eq!(obstacle(&stranger, &below), None);
        mode(&below, 0o700);
        let owner = Account { uid: std::fs::metadata(&below).unwrap().uid(), ..stranger };
        assert_eq!(obstacle(&owner, &below), None);
    }
}
