//! The network namespaces of one mesh. Names alone do not tell whose a namespace is: `cs-a-b` is the switch of mesh `a-b` as
//! well as workload `b` of mesh `a`. So each mesh lists its own in a file that outlives a crash, and no name is in two lists.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use countersign_redirect::netns::NetNs;

use super::run_directory::{RUN_DIR, wait_for_lock};

/// Every network namespace of ours begins so.
const PREFIX: &str = "cs-";
/// The file that is locked while names are claimed; no mesh has an empty name.
const LOCK: &str = ".lock";
/// How the file of a mesh's namespaces ends; names of meshes hold no dot.
const LIST: &str = ".namespaces";

/// The namespaces that belong to a mesh; clones are the same.
#[derive(Debug, Clone)]
pub struct Namespaces {
    folder: PathBuf,
    mesh: String,
}

impl Namespaces {
    /// Those of the mesh of this name on this machine.
    pub fn of(mesh: &str) -> Self {
        Self { folder: RUN_DIR.into(), mesh: mesh.to_owned() }
    }

    /// Name of the namespace with the mesh's switch.
    pub fn bridge(&self) -> String {
        format!("{PREFIX}{}", self.mesh)
    }

    /// Name of a workload's namespace.
    pub fn workload(&self, name: &str) -> String {
        format!("{PREFIX}{}-{name}", self.mesh)
    }

    /// Makes a name this mesh's own, before its namespace is made. Claiming it again is fine.
    ///
    /// # Errors
    /// The name belongs to another mesh, or a namespace of this name is there already.
    pub fn claim(&self, name: &str) -> Result<()> {
        let claimed = self.locked(|| {
            let claimed = (|| {
                if let Some(mesh) = self.other_owner(name)? {
                    return Err(anyhow!(
                        "its network namespace would be {name}, which belongs to the mesh `{mesh}` on this machine; use another name"
                    ));
                }
                if is_there(&NetNs::named(name)) {
                    return Err(anyhow!(
                        "a network namespace {name} is there already; use another name, or remove it with `ip netns delete {name}`"
                    ));
                }
                let mut all = self.listed();
                if !all.iter().any(|n| n == name) {
                    all.push(name.to_owned());
                    self.write(&all)?;
                }
                Ok(())
            })();
            Ok(claimed)
        });
        claimed.with_context(|| format!("cannot list the network namespaces in {}", self.folder.display()))?
    }

    /// Gives a name up whose namespace is gone.
    pub fn release(&self, name: &str) {
        self.keep(|n| n != name);
    }

    /// Gives a name up whose namespace could not be made. It was not there when it was claimed: what is there now is
    /// somebody else's, or a part of what could not be made and not be removed either.
    pub fn not_made(&self, name: &str, error: &io::Error) {
        if error.kind() == io::ErrorKind::AlreadyExists || !NetNs::named(name).path().exists() {
            self.release(name);
        }
    }

    /// Gives up every name whose namespace is gone.
    pub fn release_gone(&self) {
        self.keep(|n| NetNs::named(n).path().exists());
    }

    /// The names that belong to this mesh, whether or not their namespaces are there.
    pub fn listed(&self) -> Vec<String> {
        read(&self.list_of(&self.mesh))
    }

    fn keep(&self, wanted: impl Fn(&str) -> bool) {
        let kept = self.locked(|| {
            let kept: Vec<String> = self.listed().into_iter().filter(|n| wanted(n)).collect();
            self.write(&kept)
        });
        match kept {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(mesh = self.mesh, %error, "cannot write the list of network namespaces");
            }
            _ => {}
        }
    }

    /// The other mesh that a name belongs to.
    fn other_owner(&self, name: &str) -> io::Result<Option<String>> {
        for entry in std::fs::read_dir(&self.folder)? {
            let file = entry?.file_name();
            let Some(mesh) = file.to_str().and_then(|f| f.strip_suffix(LIST)) else { continue };
            if mesh != self.mesh && read(&self.list_of(mesh)).iter().any(|n| n == name) {
                return Ok(Some(mesh.to_owned()));
            }
        }
        Ok(None)
    }

    /// Two meshes that start at once must not both find a name free. The lock is a file that only root can open: everybody
    /// could lock the folder, and keep it.
    fn locked<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let path = self.folder.join(LOCK);
        let lock = wait_for_lock(&path)?;
        let done = work();
        // It counts by being held, not by its file, which would keep the folder from being removed.
        let _ = std::fs::remove_file(&path);
        drop(lock);
        done
    }

    fn write(&self, names: &[String]) -> io::Result<()> {
        let list = self.list_of(&self.mesh);
        if names.is_empty() {
            return match std::fs::remove_file(&list) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                _ => Ok(()),
            };
        }
        // Whole or not at all, whenever `up` is killed.
        let fresh = list.with_extension("namespaces~");
        std::fs::write(&fresh, names.join("\n") + "\n")?;
        std::fs::rename(&fresh, &list)
    }

    fn list_of(&self, mesh: &str) -> PathBuf {
        self.folder.join(format!("{mesh}{LIST}"))
    }
}

fn read(list: &Path) -> Vec<String> {
    std::fs::read_to_string(list).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// Whether a namespace is mounted at its name; a mere file there is taken over by whoever makes one.
fn is_there(ns: &NetNs) -> bool {
    let device = |path: &Path| std::fs::metadata(path).ok().map(|m| m.dev());
    let at = device(ns.path());
    at.is_some() && at != ns.path().parent().and_then(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(folder: &tempfile::TempDir, mesh: &str) -> Namespaces {
        Namespaces { folder: folder.path().to_owned(), mesh: mesh.to_owned() }
    }

    /// A name that no namespace of this machine has.
    fn mesh(end: &str) -> String {
        format!("u-{}{end}", std::process::id())
    }

    #[test]
    fn a_mesh_has_the_namespaces_that_it_claimed_and_none_whose_name_only_begins_alike() {
        let folder = tempfile::tempdir().unwrap();
        let (shop, other) = (of(&folder, &mesh("")), of(&folder, &mesh("-eu")));
        shop.claim(&shop.bridge()).unwrap();
        shop.claim(&shop.workload("web")).unwrap();
        other.claim(&other.bridge()).unwrap();
        other.claim(&other.workload("web")).unwrap();
        assert_eq!(shop.listed(), [shop.bridge(), shop.workload("web")]);
        assert_eq!(other.listed(), [other.bridge(), other.workload("web")]);
        shop.claim(&shop.bridge()).unwrap();
        shop.release_gone();
        assert!(shop.listed().is_empty() && other.listed().len() == 2);
        other.release(&other.bridge());
        other.release(&other.workload("web"));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "the folder can go");
    }

    #[test]
    fn a_stranger_who_locks_the_folder_keeps_no_mesh_from_its_names() {
        use nix::fcntl::{Flock, FlockArg};
        let folder = tempfile::tempdir().unwrap();
        let shop = of(&folder, &mesh("-held"));
        let _held = Flock::lock(std::fs::File::open(folder.path()).unwrap(), FlockArg::LockExclusive).unwrap();
        shop.claim(&shop.bridge()).unwrap();
        shop.release(&shop.bridge());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_name_that_is_two_meshes_alike_belongs_to_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let (short, long) = (of(&folder, &mesh("")), of(&folder, &mesh("-b")));
        short.claim(&short.workload("b")).unwrap();
        let refused = long.claim(&long.bridge()).unwrap_err().to_string();
        assert!(refused.contains(&format!("belongs to the mesh `{}`", short.mesh)), "{refused}");
        assert!(long.listed().is_empty());
        long.claim(&long.workload("c")).unwrap();
        assert!(short.claim(&short.workload("b-c")).is_err());
        short.release(&short.workload("b"));
        long.claim(&long.bridge()).unwrap();
    }
}
