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

/// A warning for each folder that workloads start in and cannot read; `current` applies to workloads without a working
/// directory.
pub fn words<'a>(workloads: impl Iterator<Item = (&'a WorkloadSpec, Account)>, current: Option<&Path>) -> Vec<String> {
    let mut words: Vec<(PathBuf, PathBuf, Vec<String>)> = vec![];
    for (spec, account) in workloads {
        let Some(folder) = spec.workdir.as_deref().or(current) else { continue };
        let Some(obstacle) = obstacle(&account, folder) else { continue };
        let who = format!("{} (uid {})", spec.name, account.uid);
        match words.iter_mut().find(|(f, ..)| f == folder) {
            Some((_, _, all)) => all.push(who),
            None => words.push((folder.to_owned(), obstacle, vec![who])),
        }
    }
    words
        .into_iter()
        .map(|(folder, obstacle, all)| {
            let starts = if all.len() == 1 { "starts" } else { "start" };
            let because =
                if obstacle == folder { String::new() } else { format!(", because of {}", obstacle.display()) };
            format!(
                "{} {starts} in {}, which its user cannot read{because}; set `workdir` to another folder, or `user`",
                all.join(", "),
                folder.display()
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

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
