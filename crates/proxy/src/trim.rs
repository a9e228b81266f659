//! Returns the memory of code that no longer runs: code of the start, and code of connections once no new ones come.
//! The binary holds every role, and each page that was touched stays mapped; what is needed again comes from the page
//! cache.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::connections::Connections;

/// Time without a new connection that counts as quiet.
const QUIET: Duration = Duration::from_secs(15);

/// Returns the code that connections have run, once per quiet period, until `end`.
pub async fn when_quiet(connections: Arc<Connections>, end: CancellationToken) {
    let (mut seen, mut busy) = (0, true);
    loop {
        tokio::select! {
            () = tokio::time::sleep(QUIET) => {}
            () = end.cancelled() => return,
        }
        let now = connections.admitted();
        if now != seen {
            (seen, busy) = (now, true);
        } else if std::mem::take(&mut busy) {
            give_back_code();
        }
    }
}

/// Unmaps the executable's code pages from this process; the kernel reads them again when they run.
pub fn give_back_code() {
    let Ok(exe) = std::fs::read_link("/proc/self/exe") else { return };
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for (start, length) in code_of(&maps, &exe.to_string_lossy()) {
        unmap(start, length);
    }
}

/// Start and length of each code mapping of a file (proc(5): `start-end perms offset dev inode path`). Only pages that
/// cannot have been modified: relocated pages are not executable.
fn code_of(maps: &str, exe: &str) -> Vec<(NonZeroUsize, usize)> {
    let read = |line: &str| {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
        let is_code = fields.next()? == "r-xp";
        let path = fields.nth(3)?;
        (is_code && path == exe).then_some((NonZeroUsize::new(start)?, end.checked_sub(start)?))
    };
    maps.lines().filter_map(read).collect()
}

#[allow(unsafe_code)]
fn unmap(start: NonZeroUsize, length: usize) {
    let address = NonNull::<c_void>::without_provenance(start);
    // SAFETY: the range is a private mapping of the executable without write permission, as the kernel has just listed it.
    // MADV_DONTNEED drops its pages; the next access reads the same bytes from the same file.
    if let Err(error) = unsafe { nix::sys::mman::madvise(address, length, nix::sys::mman::MmapAdvise::MADV_DONTNEED) } {
        tracing::debug!(%error, "the pages of the start's code stay");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unwritten_code_of_the_executable_is_given_back() {
        let maps = "\
5000-6000 r--p 00000000 fe:00 7 /bin/x
6000-9000 r-xp 00001000 fe:00 7 /bin/x
9000-a000 r--p 00004000 fe:00 7 /bin/x
a000-b000 rw-p 00005000 fe:00 7 /bin/x
b000-c000 r-xp 00000000 fe:00 8 /lib/y
c000-d000 r-xp 00000000 00:00 0 [vdso]
d000-e000 rw-p 00000000 00:00 0
";
        assert_eq!(code_of(maps, "/bin/x"), [(NonZeroUsize::new(0x6000).unwrap(), 0x3000)]);
    }

    #[test]
    fn the_process_goes_on_without_its_pages() {
        give_back_code();
        let own = std::fs::read_to_string("/proc/self/maps").unwrap();
        let exe = std::fs::read_link("/proc/self/exe").unwrap();
        assert!(!code_of(&own, &exe.to_string_lossy()).is_empty(), "there was something to give back");
    }
}
