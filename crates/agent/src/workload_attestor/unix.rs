//! `unix:uid`, `gid`, `user`, `group`, `supplementary_gid`, `supplementary_group`, and `path`, `sha256` if enabled.

use std::fs::File;
use std::io::Read;

use async_trait::async_trait;
use countersign_identity::Selector;
use countersign_identity::selector::SelectorSet;

use super::executable::Hashes;
use super::{AttestorError, Proof, Purpose, WorkloadAttestor};
use crate::peer::Process;

/// Largest `/etc/passwd` or `/etc/group` that is read, in bytes.
const MAX_NAMES_BYTES: u64 = 4 * 1024 * 1024;

/// Attests by what the kernel knows about a process.
pub struct Unix {
    /// Hashes of executables, whose path and hash are attested then; `None` to attest neither.
    executables: Option<Hashes>,
}

#[async_trait]
impl WorkloadAttestor for Unix {
    async fn attest(&self, process: &Process, _: &dyn Purpose) -> Result<Proof, AttestorError> {
        Ok(Proof { selectors: self.selectors(process).await, in_part: false })
    }
}

impl Unix {
    /// `discover_path`: whether the executable's path and hash are attested too; `hash_limit`: the largest executable that is
    /// hashed, in bytes.
    pub fn new(discover_path: bool, hash_limit: u64) -> Self {
        Self { executables: discover_path.then(|| Hashes::new(hash_limit)) }
    }

    async fn selectors(&self, process: &Process) -> SelectorSet {
        let mut found = SelectorSet::new();
        let mut add = |key: &str, value: String| found.extend(Selector::new("unix", format!("{key}:{value}")));
        add("uid", process.uid.to_string());
        add("gid", process.gid.to_string());
        process.groups.iter().for_each(|g| add("supplementary_gid", g.to_string()));
        // This machine's names do not apply to a process in a container.
        if !process.foreign {
            // The files are read directly: with a name service, the network or a plug-in could decide who gets an
            // identity.
            let (users, groups) = (names("/etc/passwd"), names("/etc/group"));
            name_of(&users, process.uid).into_iter().for_each(|name| add("user", name));
            name_of(&groups, process.gid).into_iter().for_each(|name| add("group", name));
            let more = process.groups.iter().filter_map(|g| name_of(&groups, *g));
            more.for_each(|name| add("supplementary_group", name));
        }
        if let (Some(exe), Some(executables)) = (&process.exe, &self.executables) {
            exe.path.to_str().into_iter().for_each(|path| add("path", path.to_owned()));
            let hash = executables.of(process.uid, process.pid, exe.file).await;
            hash.into_iter().for_each(|hash| add("sha256", hash));
        }
        found
    }
}

fn names(path: &str) -> String {
    let mut text = String::new();
    // An image from scratch has no such file, and no names then: a caller gets the selectors of its numbers alone.
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
    use countersign_api::process::{Executable, Snapshot};

    fn process() -> Process {
        Process {
            pid: std::process::id().try_into().unwrap(),
            uid: 0,
            gid: 0,
            groups: [0, 4_000_000].into(),
            exe: Snapshot::read(std::process::id().try_into().unwrap()).unwrap().exe,
            cgroup: String::new(),
            foreign: false,
        }
    }

    async fn found(attestor: &Unix, process: &Process) -> Vec<String> {
        attestor.selectors(process).await.iter().map(ToString::to_string).collect()
    }

    #[tokio::test]
    async fn a_process_has_every_selector_of_the_table() {
        let attestor = Unix::new(true, u64::MAX);
        let here = found(&attestor, &process()).await;
        for expected in [
            "unix:uid:0",
            "unix:gid:0",
            "unix:user:root",
            "unix:group:root",
            "unix:supplementary_gid:0",
            "unix:supplementary_gid:4000000",
            "unix:supplementary_group:root",
        ] {
            assert!(here.contains(&expected.to_owned()), "{expected} is missing in {here:?}");
        }
        let exe = process().exe.unwrap().path;
        assert!(here.contains(&format!("unix:path:{}", exe.display())));
        let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &std::fs::read(&exe).unwrap());
        assert!(here.contains(&format!("unix:sha256:{}", hex::encode(hash))));
        let plain = Unix::new(false, u64::MAX);
        assert!(
            !found(&plain, &process()).await.iter().any(|s| s.starts_with("unix:path") || s.starts_with("unix:sha256"))
        );
        let limited = Unix::new(true, 1);
        assert!(!found(&limited, &process()).await.iter().any(|s| s.starts_with("unix:sha256")), "too large to hash");
    }

    #[tokio::test]
    async fn a_program_that_is_not_the_one_that_connected_is_not_hashed() {
        let attestor = Unix::new(true, u64::MAX);
        let other = Executable { path: "/usr/bin/trusted".into(), file: (0, 0) };
        let there = found(&attestor, &Process { exe: Some(other), ..process() }).await;
        assert!(!there.iter().any(|s| s.starts_with("unix:sha256")), "{there:?}");
    }

    #[tokio::test]
    async fn a_process_of_a_container_has_numbers_and_no_names() {
        let attestor = Unix::new(false, 0);
        let there = found(&attestor, &Process { foreign: true, ..process() }).await;
        assert_eq!(there, ["unix:gid:0", "unix:supplementary_gid:0", "unix:supplementary_gid:4000000", "unix:uid:0"]);
    }

    #[test]
    fn names_are_found_by_id_alone() {
        let table = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/:\nbroken\n";
        assert_eq!(name_of(table, 33).as_deref(), Some("web"));
        assert_eq!(name_of(table, 5), None);
    }
}
