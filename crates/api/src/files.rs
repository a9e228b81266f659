//! Bounded reads of files, and atomic writes of secrets: no crash leaves half a file, and no other user can read it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;

/// Largest file with certificates or a key, in bytes.
pub const MAX_PEM_BYTES: u64 = 1024 * 1024;

/// What to do where the last part of a path is a symbolic link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Open what it leads to.
    Follow,
    /// Fail: whoever may write to the folder could lead root anywhere.
    Reject,
}

/// Opens a regular file for reading; see [`open_regular_as`].
pub fn open_regular(path: &Path) -> io::Result<File> {
    open_regular_as(path, OpenOptions::new().read(true), Links::Follow)
}

/// Opens a regular file. Devices, pipes and folders are rejected: what they hold may never end, or never come.
///
/// # Errors
/// It cannot be opened so, is no regular file, or is a link although links are rejected.
pub fn open_regular_as(path: &Path, options: &mut OpenOptions, links: Links) -> io::Result<File> {
    let no_follow = if links == Links::Reject { OFlag::O_NOFOLLOW } else { OFlag::empty() };
    // Without O_NONBLOCK the open itself waits for a pipe's writer. It changes nothing for regular files.
    let file = options.custom_flags((OFlag::O_NONBLOCK | no_follow).bits()).open(path)?;
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
    Ok(file)
}

/// Reads a regular file of at most `most` bytes; see [`open_regular`].
pub fn read_bounded(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(path)?;
    // Room for all of it: what grows leaves copies behind, and it may hold a key.
    let length = file.metadata()?.len().min(most);
    let mut content = Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 1);
    file.take(most + 1).read_to_end(&mut content)?;
    if content.len() as u64 > most {
        return Err(io::Error::other(format!("it is longer than {most} bytes")));
    }
    Ok(content)
}

/// Reads a file with certificates or a key, [`MAX_PEM_BYTES`] at most.
pub fn read_pem(path: &Path) -> io::Result<Vec<u8>> {
    read_bounded(path, MAX_PEM_BYTES)
}

/// Writes a file of mode 0600 atomically: a fresh file beside it, synced, renamed over it, the folder synced.
pub fn write_secret(path: &Path, content: &[u8]) -> io::Result<()> {
    write_atomically(path, content, 0o600)
}

/// Writes a file with this mode atomically, see [`write_secret`].
pub fn write_atomically(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    replace(path, Path::new(&temporary), mode, |file| file.write_all(content))
}

/// Replaces a file atomically by what `write` writes, with this mode less the umask. `temporary` is a path in the same
/// folder; a file there, left by a crash, is removed.
pub fn replace(
    path: &Path,
    temporary: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let dir = path.parent().ok_or_else(|| io::Error::other("the path has no folder"))?;
    let _ = std::fs::remove_file(temporary);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(temporary)?;
        write(&mut file)?;
        file.sync_all()?;
        std::fs::rename(temporary, path)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(temporary);
        return written;
    }
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_or_too_long_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("fits"), vec![b'x'; 1 << 20]).unwrap();
        std::fs::write(at("long"), vec![b'x'; (1 << 20) + 1]).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read_pem(&at("fits")).unwrap().len(), 1 << 20);
        let why = |path: &Path| read_pem(path).unwrap_err().to_string();
        assert_eq!(why(&at("long")), "it is longer than 1048576 bytes");
        assert_eq!(why(&at("pipe")), "it is a pipe; expected a file");
        assert_eq!(why(Path::new("/dev/zero")), "it is a device; expected a file");
        assert_eq!(why(dir.path()), "it is a folder; expected a file");
    }
}
