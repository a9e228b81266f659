//! What `/proc` says about a process. Reading does not prove whose data it was: the caller has to check before and
//! after that the process is still the same.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::files::read_bounded;

/// Largest file in `/proc/PID` that is read, in bytes.
const MAX_PROC_BYTES: u64 = 256 * 1024;
/// Clock ticks per second in `/proc` (`USER_HZ`): 100 on every platform that Rust supports for Linux.
const TICKS_PER_SECOND: u64 = 100;

/// Attributes that a process can change about itself, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Supplementary group IDs.
    pub groups: BTreeSet<u32>,
    /// Content of `/proc/PID/cgroup`.
    pub cgroup: String,
    /// The program that it runs; `None` if we may not read it (ptrace(2), "access mode checking").
    pub exe: Option<Executable>,
}

/// The program that a process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executable {
    /// Path as the process sees it, followed by ` (deleted)` once the file is gone.
    pub path: PathBuf,
    /// Device and inode of the file: identify it under any name.
    pub file: (u64, u64),
}

impl Snapshot {
    /// Reads the attributes. Fails if the process has ended or is not visible.
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
        // The kernel follows this link to the file itself, whatever is at its path now.
        let file = std::fs::metadata(&link).ok()?;
        Some(Self { path, file: (file.dev(), file.ino()) })
    }
}

/// Start time of a process in clock ticks since boot (proc(5), field 22 of `stat`); `None` if it is not visible.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may itself contain spaces and parentheses, so fields are counted from its end.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The effective user ID of a process. The owner of `/proc/PID` is not enough: it is root for a process that is not
/// dumpable.
pub(crate) fn effective_uid(pid: i32) -> Option<u32> {
    let status = read_bounded(Path::new(&format!("/proc/{pid}/status")), MAX_PROC_BYTES).ok()?;
    field(&String::from_utf8_lossy(&status), "Uid:")?.split_whitespace().nth(1)?.parse().ok()
}

/// The current time on the clock of [`start_time`].
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
