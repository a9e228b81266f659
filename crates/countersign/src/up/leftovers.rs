//! What a program leaves behind when its main process ends: children that go on, and keep its ports from the next start.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use countersign_redirect::netns::NetNs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::Instant;

use super::run_directory::{GONE, every_process};
use super::users::uids_of;

/// How long what is left may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);
/// Interval before the second look at what is left; it doubles, because each look reads about every process.
const FIRST_LOOK: Duration = Duration::from_millis(20);
/// Longest interval between two looks.
const LAST_LOOK: Duration = Duration::from_millis(320);

/// How to tell a workload's processes from all others.
#[derive(Clone)]
pub struct Belonging {
    /// Its network namespace, in which its sidecar runs too.
    pub netns: NetNs,
    /// User ID of its program.
    pub uid: u32,
    /// Whether nobody else on the machine has this user.
    pub own_user: bool,
}

/// The mount namespace that a program was started in, which is its alone and that of its children. It stays while this is
/// held: its number is given to no other.
pub struct Mounts(File);

impl Mounts {
    /// That of a process; `None` if it has ended or shares ours.
    pub fn of(pid: u32) -> Option<Self> {
        let file = File::open(format!("/proc/{pid}/ns/mnt")).ok()?;
        (identity_of(&file)? != identity(Path::new("/proc/self/ns/mnt"))?).then_some(Self(file))
    }
}

/// Device and inode: what a namespace is known by (namespaces(7)).
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn identity_of(file: &File) -> Option<(u64, u64)> {
    file.metadata().ok().map(|m| (m.dev(), m.ino()))
}

impl Belonging {
    /// Ends what a program has left, and returns how many processes that were: SIGTERM, then SIGKILL.
    pub async fn end(&self, mounts: Option<&Mounts>) -> usize {
        let mut told = vec![];
        let began = Instant::now();
        let mut interval = FIRST_LOOK;
        loop {
            let left = self.left(mounts);
            if left.is_empty() || began.elapsed() > GRACE + GONE {
                return told.len();
            }
            for pid in left {
                let is_new = !told.contains(&pid);
                if is_new {
                    told.push(pid);
                }
                let late = began.elapsed() > GRACE;
                if is_new || late {
                    // It may have ended in this very moment.
                    let signal = if late { Signal::SIGKILL } else { Signal::SIGTERM };
                    let _ = kill(Pid::from_raw(pid), signal);
                }
            }
            tokio::time::sleep(interval).await;
            interval = (interval * 2).min(LAST_LOOK);
        }
    }

    /// The processes that are left. The sidecar is none of them: it has another user, and our mounts. Neither is what an
    /// operator runs in the namespace as root.
    fn left(&self, mounts: Option<&Mounts>) -> Vec<i32> {
        let (mounts, netns) = (mounts.and_then(|m| identity_of(&m.0)), identity(self.netns.path()));
        let is_left = |pid: &i32| {
            let uids = uids_of(*pid);
            // Empty for one that has ended and was not waited for.
            if uids.is_empty() || u32::try_from(*pid) == Ok(std::process::id()) {
                return false;
            }
            let of = |kind: &str| identity(Path::new(&format!("/proc/{pid}/ns/{kind}")));
            let has_user = uids.contains(&self.uid);
            let inside = netns.is_some() && of("net") == netns;
            // Root is everybody's: a program of root's has left only what has its mounts.
            (has_user && self.own_user)
                || inside && (has_user && self.uid != 0 || mounts.is_some() && of("mnt") == mounts)
        };
        every_process().into_iter().filter(is_left).collect()
    }
}
