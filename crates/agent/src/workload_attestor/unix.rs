//! `unix:uid`, `gid`, `user`, `group`, `supplementary_gid`, `supplementary_group`, and `path`, `sha256` where enabled.

use std::fs::File;
use std::io::Read;

use countersign_identity::Selector;
use countersign_identity::selector::SelectorSet;

use super::WorkloadAttestor;
use crate::peer::Process;

/// Largest `/etc/passwd` or `/etc/group` that is read, in bytes.
const MAX_NAMES_BYTES: u64 = 4 * 1024 * 1024;

/// Attests by what the kernel knows of a process.
pub struct Unix {
    /// Whether the executable's path and hash are attested too.
    pub discover_path: bool,
    /// Largest executable that is hashed, in bytes.
    pub hash_limit: u64,
}

impl WorkloadAttestor for Unix {
    fn attest(&self, process: &Process) -> SelectorSet {
        let mut found = SelectorSet::new();
        let mut add = |key: &str, value: String| found.extend(Selector::new("unix", format!("{key}:{value}")));
        add("uid", process.uid.to_string());
        add("gid", process.gid.to_string());
        // The databases are read as they are: no name service is asked, so no network and no plug-in decides an identity.
        let (users, groups) = (names("/etc/passwd"), names("/etc/group"));
        let name_of = |table: &str, id: u32| name_of(table, id);
        name_of(&users, process.uid).into_iter().for_each(|name| add("user", name));
        name_of(&groups, process.gid).into_iter().for_each(|name| add("group", name));
        for group in &process.groups {
            add("supplementary_gid", group.to_string());
            name_of(&groups, *group).into_iter().for_each(|name| add("supplementary_group", name));
        }
        if self.discover_path {
            if let Some(exe) = process.exe.as_ref().and_then(|p| p.to_str()) {
                add("path", exe.to_owned());
            }
            if let Some(hash) = self.hash(process.pid) {
                add("sha256", hash);
            }
        }
        found
    }
}

impl Unix {
    /// SHA-256 of the executable itself, reached through `/proc` so that a replaced file cannot stand in for it.
    fn hash(&self, pid: i32) -> Option<String> {
        let mut file = File::open(format!("/proc/{pid}/exe")).ok()?;
        if file.metadata().ok()?.len() > self.hash_limit {
            return None;
        }
        let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match file.read(&mut buffer).ok()? {
                0 => return Some(hex::encode(context.finish())),
                n => context.update(&buffer[..n]),
            }
        }
    }
}

fn names(path: &str) -> String {
    let mut text = String::new();
    let _ = File::open(path).and_then(|f| f.take(MAX_NAMES_BYTES).read_to_string(&mut text));
    text
}

/// The name of an ID in the format that passwd(5) and group(5) share: `name:password:id:…`.
fn name_of(table: &str, id: u32) -> Option<String> {
    table.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_every_selector_of_the_table() {
        let process = Process {
            pid: std::process::id().try_into().unwrap(),
            uid: 0,
            gid: 0,
            groups: [0, 4_000_000].into(),
            exe: std::env::current_exe().ok(),
        };
        let attestor = Unix { discover_path: true, hash_limit: u64::MAX };
        let found: Vec<String> = attestor.attest(&process).iter().map(ToString::to_string).collect();
        for expected in [
            "unix:uid:0",
            "unix:gid:0",
            "unix:user:root",
            "unix:group:root",
            "unix:supplementary_gid:0",
            "unix:supplementary_gid:4000000",
            "unix:supplementary_group:root",
        ] {
            assert!(found.contains(&expected.to_owned()), "{expected} is missing in {found:?}");
        }
        let exe = process.exe.unwrap();
        assert!(found.contains(&format!("unix:path:{}", exe.display())));
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &std::fs::read(&exe).unwrap());
        assert!(found.contains(&format!("unix:sha256:{}", hex::encode(hash))));
        let plain = Unix { discover_path: false, hash_limit: u64::MAX };
        assert!(
            !plain
                .attest(&Process {
                    exe: Some(exe.clone()),
                    ..Process { pid: 1, uid: 0, gid: 0, groups: [].into(), exe: None }
                })
                .iter()
                .any(|s| s.value().starts_with("path"))
        );
        let limited = Unix { discover_path: true, hash_limit: 1 };
        let own =
            Process { pid: std::process::id().try_into().unwrap(), uid: 0, gid: 0, groups: [].into(), exe: Some(exe) };
        assert!(!limited.attest(&own).iter().any(|s| s.value().starts_with("sha256")), "too large to hash");
    }

    #[test]
    fn names_are_found_by_id_alone() {
        let table = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/:\nbroken\n";
        assert_eq!(name_of(table, 33).as_deref(), Some("web"));
        assert_eq!(name_of(table, 5), None);
    }
}
