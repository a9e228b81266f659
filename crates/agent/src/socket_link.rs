//! A second name of the agent's socket, for programs that look for it under another one, such as SPIRE's.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use countersign_identity::shown::shown;

/// Longest name of a file, in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;

/// Name of a file in the folder of the agent's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkName(String);

impl FromStr for LinkName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if text.is_empty() || text.len() > MAX_NAME || text.starts_with('.') || !text.bytes().all(form) {
            return Err(format!("`{}` is no name of a file: letters, digits, `-`, `_` and `.`", shown(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

/// A symbolic link to the socket, removed when dropped.
pub struct SocketLink(PathBuf);

impl SocketLink {
    /// Makes the link beside the socket. It names the file alone, so that it holds wherever the folder is mounted. A link of an
    /// earlier run is replaced. Errors: something else has this name, the socket itself included.
    pub fn make(socket: &Path, name: &LinkName) -> io::Result<Self> {
        let link = socket.with_file_name(&name.0);
        let file = socket.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        if std::fs::symlink_metadata(&link).is_ok_and(|there| there.is_symlink()) {
            std::fs::remove_file(&link)?;
        }
        symlink(file, &link)?;
        Ok(Self(link))
    }
}

impl Drop for SocketLink {
    fn drop(&mut self) {
        // A link that stays is replaced by the next run.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_stands_beside_its_socket_and_takes_nobodys_place() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, name) = (dir.path().join("agent.sock"), "spire-agent.sock".parse::<LinkName>().unwrap());
        std::fs::write(&socket, "").unwrap();
        let at = dir.path().join("spire-agent.sock");
        symlink("left-over", &at).unwrap();
        let link = SocketLink::make(&socket, &name).unwrap();
        assert_eq!(std::fs::read_link(&at).unwrap(), Path::new("agent.sock"));
        drop(link);
        assert!(std::fs::symlink_metadata(&at).is_err());
        std::fs::write(&at, "kept").unwrap();
        assert!(SocketLink::make(&socket, &name).is_err());
        assert_eq!(std::fs::read(&at).unwrap(), b"kept");
        assert!(SocketLink::make(&socket, &"agent.sock".parse().unwrap()).is_err(), "the socket itself");
        for bad in ["", ".", "..", "a/b", ".hidden", "a\nb", &"x".repeat(256)] {
            assert!(bad.parse::<LinkName>().is_err(), "{bad}");
        }
    }
}
