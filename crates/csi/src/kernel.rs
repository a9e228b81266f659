//! The system calls of mounts that no safe interface offers (Linux 5.2, and 5.12 for the restriction). They take descriptors,
//! so that no path can change between what was looked at and what is mounted on; and the mount is restricted before it is
//! anywhere, because a restriction that came later would not reach the copies in the other mount namespaces.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

/// The path of a descriptor itself (`AT_EMPTY_PATH`).
const ITSELF: &CStr = c"";
/// `AT_EMPTY_PATH` as these calls take it.
const EMPTY_PATH: libc::c_uint = 0x1000;

/// A mount of this folder that is nowhere yet. It goes when the descriptor is closed before [`attach`].
#[allow(unsafe_code)]
pub fn detached_copy(folder: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | EMPTY_PATH;
    // SAFETY: open_tree(2) reads the path, which is a constant, and returns a new descriptor.
    let made = unsafe { libc::syscall(libc::SYS_open_tree, folder.as_raw_fd(), ITSELF.as_ptr(), flags) };
    let made = RawFd::try_from(Errno::result(made)?).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// Makes a detached mount read-only, without devices, programs, and set-user-ID. What is mounted on it later does not reach the
/// folder that it is a copy of.
#[allow(unsafe_code)]
pub fn restrict(mount: &OwnedFd) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    let size = size_of::<libc::mount_attr>();
    // SAFETY: mount_setattr(2) reads the path, a constant, and `size` bytes of the structure, which is that long.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            ITSELF.as_ptr(),
            EMPTY_PATH,
            &raw const attributes,
            size,
        )
    };
    Ok(Errno::result(done).map(drop)?)
}

/// Puts a detached mount on a folder.
#[allow(unsafe_code)]
pub fn attach(mount: &OwnedFd, folder: &OwnedFd) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: move_mount(2) reads the paths, which are constants.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            ITSELF.as_ptr(),
            folder.as_raw_fd(),
            ITSELF.as_ptr(),
            flags,
        )
    };
    Ok(Errno::result(done).map(drop)?)
}
