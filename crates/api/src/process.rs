//! What `/proc` says of a process. Reading is no proof of whose data it was: the caller makes sure, before and after, that
//! the process is still the one that is meant.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::files::read_bounded;

/// Largest file of a process that is read, in bytes.
const MAX_PROC_BYTES: u64 = 256 * 1024;
/// Clock ticks a second in `/proc` (`USER_HZ`): 100 on every platform that Rust runs Linux programs on.
const TICKS_PER_SECOND: u64 = 100;

/// What a process can change about itself, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Supplementary groups.
    pub groups: BTreeSet<u32>,
    /// Its cgroups, as `/proc/PID/cgroup` lists them.
    pub cgroup: String,
    /// What it runs; `None` where we may not look (ptrace(2), "access mode checking").
    pub exe: Option<Executable>,
}

/// The program that a process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executable {
    /// Its path as the process sees it, with ` (deleted)` behind it once the file is gone.
    pub path: PathBuf,
    /// Device and inode of the file: the same file under whatever name.
    pub file: (u64, u64),
}

impl Snapshot {
    /// Reads it. Fails where the process is gone or not visible.
    pub fn read(pid: i32) -> io::Result<Self> {
        let text = |file| {
            let content = read_bounded(Path::new(&format!("/proc/{pid}/{file}")), MAX_PROC_BYTES)?;
            Ok::<_, io::Error>(String::from_utf8_lossy(&content).into_owned())
        };
        let (status, cgroup) = (text("status")?, text("cgroup")?);
        let groups = field(&status, "Groups:").unwrap_or_default();
        let groups = groups.split_whitespace().filter_map(|g| g.parse().ok()).collect();
        Ok(Self { groups, cgroup, exe: Executable::of(pid) })
    }
}

impl Executable {
    fn of(pid: i32) -> Option<Self> {
        let link = format!("/proc/{pid}/exe");
        let path = std::fs::read_link(&link).ok()?;
        // Followed in the kernel to the file itself, whatever stands at its path now.
        let file = std::fs::metadata(&link).ok()?;
        Some(Self { path, file: (file.dev(), file.ino()) })
    }
}

/// When a process started, in clock ticks since boot (proc(5), field 22 of `stat`).
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may itself hold spaces and parentheses: fields are counted from its end.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The effective user of a process. The owner of `/proc/PID` will not do: it is root for a process that is not dumpable.
pub(crate) fn effective_uid(pid: i32) -> Option<u32> {
    let status = read_bounded(Path::new(&format!("/proc/{pid}/status")), MAX_PROC_BYTES).ok()?;
    field(&String::from_utf8_lossy(&status), "Uid:")?.split_whitespace().nth(1)?.parse().ok()
}

/// Now, on the clock of [`start_time`].
pub(crate) fn ticks_since_boot() -> Option<u64> {
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    // `SECONDS.HUNDREDTHS IDLE`
    let (seconds, hundredths) = uptime.split_whitespace().next()?.split_once('.')?;
    let ticks = hundredths.parse::<u64>().ok()? * TICKS_PER_SECOND / 100;
    seconds.parse::<u64>().ok()?.checked_mul(TICKS_PER_SECOND)?.checked_add(ticks)
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name))
}
