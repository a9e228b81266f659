//! How much memory this process may use: the lowest limit of its control groups, or the memory of the machine.

use std::path::{Path, PathBuf};

/// The limit in bytes; `None` if the kernel does not say.
pub fn limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    let groups = limit_files(&groups).into_iter().filter_map(|path| value(&std::fs::read_to_string(path).ok()?));
    groups.chain(machine).min()
}

/// Files that may hold a limit: those of the process's control group and its ancestors, v1 or v2 (cgroups(7)).
fn limit_files(groups: &str) -> Vec<PathBuf> {
    let mut files = vec![];
    for line in groups.lines() {
        // `hierarchy:controllers:path`; version 2 is hierarchy 0 without controllers.
        let mut fields = line.splitn(3, ':');
        let (Some(hierarchy), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (root, name) = match controllers {
            "" if hierarchy == "0" => ("/sys/fs/cgroup", "memory.max"),
            named if named.split(',').any(|c| c == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        // In a container without its own cgroup namespace, the path is the host's and only the root exists.
        let path = path.trim_start_matches('/');
        files.extend(Path::new(path).ancestors().map(|above| Path::new(root).join(above).join(name)));
    }
    files
}

/// A limit in bytes; `None` for no limit, which is `max` in version 2 and a number near 2^63 in version 1.
fn value(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|bytes| *bytes < 1 << 62)
}

/// `MemTotal` of /proc/meminfo, in bytes.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_read_from_the_group_up() {
        let shown = |groups: &str| limit_files(groups).iter().map(|p| p.display().to_string()).collect::<Vec<_>>();
        assert_eq!(
            shown("0::/kubepods/pod1\n"),
            [
                "/sys/fs/cgroup/kubepods/pod1/memory.max",
                "/sys/fs/cgroup/kubepods/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        assert_eq!(
            shown("4:cpu,memory:/a\n3:freezer:/b\n"),
            ["/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert_eq!(value("268435456\n"), Some(268_435_456));
        assert_eq!((value("max\n"), value("9223372036854771712\n")), (None, None));
        assert_eq!(total("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16_384 * 1024));
        assert!(limit().is_some_and(|bytes| bytes > 1 << 20));
    }
}
