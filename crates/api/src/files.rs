//! Bounded reads of files, and atomic writes of secrets: no crash leaves half a file, and no other user can read it.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Reads a regular file of at most `most` bytes. Devices, pipes and folders are rejected, because reading them may
/// never end or may block.
pub fn read_bounded(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut content = vec![];
    // Without O_NONBLOCK, open(2) would wait for a pipe's writer. It has no effect on regular files.
    let file = OpenOptions::new().read(true).custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits()).open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() {
        let what = match () {
            () if kind.is_dir() => "a folder",
            () if kind.is_fifo() => "a pipe",
            () if kind.is_char_device() || kind.is_block_device() => "a device",
            () => "not a regular file",
        };
        return Err(io::Error::other(format!("it is {what}; expected a file")));
    }
    file.take(most + 1).read_to_end(&mut content)?;
    if content.len() as u64 > most {
        return Err(io::Error::other(format!("it is longer than {most} bytes")));
    }
    Ok(content)
}

/// Writes a file of mode 0600 atomically: a new file in the same folder, synced, renamed over the old one, the folder
/// synced.
pub fn write_secret(path: &Path, content: &[u8]) -> io::Result<()> {
    write_atomically(path, content, 0o600)
}

/// Writes a file with this mode atomically, see [`write_secret`].
pub fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::other("the path has no folder"))?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = Path::new(&temporary);
    let _ = std::fs::remove_file(temporary);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(temporary, path)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(temporary);
        return written;
    }
    std::fs::File::open(dir)?.sync_all()
}
