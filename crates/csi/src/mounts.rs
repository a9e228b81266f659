//! The mounts of the agent's folder in pods' volumes. All state is the kernel's table of mounts: a driver that starts finds there
//! what an earlier one made.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, fstat, mkdirat};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::kernel;
use crate::target::{MOUNT, Target};

/// Most mounts that are removed from one folder: there should be one, and the loop must end.
const MAX_LAYERS: usize = 64;
/// Most bytes that are read of what the kernel says about a descriptor.
const MAX_ABOUT: u64 = 4_096;

/// Why a volume is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The agent's folder is away. Holds its path.
    #[error("the agent's folder {dir} cannot be opened: {source}; does the agent run on this node?", dir = .dir.display())]
    Agent {
        /// Path of the folder.
        dir: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The kubelet has not made the volume's folder.
    #[error("there is no folder {0} below the kubelet's pods")]
    NoVolume(Target),
    /// More mounts than can be ours.
    #[error("more than {MAX_LAYERS} mounts are on {0}")]
    Layers(Target),
    /// A system call failed.
    #[error("cannot {doing} {target}: {source}{hint}", hint = hint(.source))]
    Kernel {
        /// What was tried.
        doing: &'static str,
        /// The volume.
        target: Target,
        /// Error of the operating system.
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSYS) => "; the driver needs Linux 5.12",
        Some(Errno::EPERM) => "; the driver needs root with CAP_SYS_ADMIN (a privileged container)",
        _ => "",
    }
}

/// The volumes of one node.
#[derive(Debug, Clone)]
pub struct Mounts {
    /// The kubelet's folder of pods.
    pub pods: PathBuf,
    /// The agent's folder.
    pub agent: PathBuf,
}

impl Mounts {
    /// Whether the agent's folder is there.
    pub fn agent_is_there(&self) -> bool {
        folder_at(&self.agent).is_ok()
    }

    /// Mounts the agent's folder on a volume's, read-only. Changes nothing if it is mounted already; anything else that is mounted
    /// there, such as a folder of the agent that was replaced since, is removed first.
    pub fn publish(&self, target: &Target) -> Result<(), MountError> {
        let failed = |doing| move |source| MountError::Kernel { doing, target: target.clone(), source };
        let agent = folder_at(&self.agent).map_err(|source| MountError::Agent { dir: self.agent.clone(), source })?;
        let volume = self.open(target).map_err(failed("open the folder of"))?;
        let volume = volume.ok_or_else(|| MountError::NoVolume(target.clone()))?;
        match mkdirat(&volume, MOUNT, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(failed("make the folder of")(error.into())),
        }
        for _ in 0..MAX_LAYERS {
            let folder = below(&volume, Path::new(MOUNT)).map_err(failed("open the mount of"))?;
            if !is_mounted(&volume, &folder).map_err(failed("look at"))? {
                return mount(&agent, &folder).map_err(failed("mount the agent's folder on"));
            }
            if is_ours(&agent, &folder).map_err(failed("look at"))? {
                return Ok(());
            }
            drop(folder);
            detach(&volume).map_err(failed("unmount what is on"))?;
        }
        Err(MountError::Layers(target.clone()))
    }

    /// Unmounts a volume and removes the folder that it was mounted on. It need not be there.
    pub fn unpublish(&self, target: &Target) -> Result<(), MountError> {
        let failed = |doing| move |source| MountError::Kernel { doing, target: target.clone(), source };
        let Some(volume) = self.open(target).map_err(failed("open the folder of"))? else { return Ok(()) };
        for _ in 0..MAX_LAYERS {
            let folder = match below(&volume, Path::new(MOUNT)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                opened => opened.map_err(failed("open the mount of"))?,
            };
            if !is_mounted(&volume, &folder).map_err(failed("look at"))? {
                // Removed empty or not at all: what somebody else put there is not ours to delete.
                return match unlinkat(&volume, MOUNT, UnlinkatFlags::RemoveDir) {
                    Ok(()) | Err(Errno::ENOENT) => Ok(()),
                    Err(error) => Err(failed("remove the folder of")(error.into())),
                };
            }
            drop(folder);
            detach(&volume).map_err(failed("unmount"))?;
        }
        Err(MountError::Layers(target.clone()))
    }

    /// Opens a volume's folder; `None` if there is none.
    fn open(&self, target: &Target) -> io::Result<Option<OwnedFd>> {
        match below(&folder_at(&self.pods)?, &target.as_path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some),
        }
    }
}

const FOLDER: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

/// Opens a folder of our configuration.
fn folder_at(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, FOLDER, Mode::empty())?)
}

/// Opens a folder below another one, through no link of any kind.
fn below(folder: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    let beneath = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    Ok(openat2(folder, path, OpenHow::new().flags(FOLDER).resolve(beneath))?)
}

/// Whether something is mounted on a folder: then it is on another mount than the folder that it is in.
fn is_mounted(parent: &OwnedFd, folder: &OwnedFd) -> io::Result<bool> {
    Ok(mount_id(parent)? != mount_id(folder)?)
}

/// The kernel's number of the mount that a descriptor is on (`proc_pid_fdinfo(5)`).
fn mount_id(folder: &OwnedFd) -> io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", folder.as_raw_fd());
    let about = countersign_api::files::read_bounded(Path::new(&path), MAX_ABOUT)?;
    let about = String::from_utf8_lossy(&about);
    let id = about.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{path} has no mnt_id")))
}

/// Whether a mounted folder is the agent's, restricted as ours are.
fn is_ours(agent: &OwnedFd, folder: &OwnedFd) -> io::Result<bool> {
    let restricted = FsFlags::ST_RDONLY | FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC;
    let (theirs, ours) = (fstat(folder)?, fstat(agent)?);
    let same = (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino);
    Ok(same && fstatvfs(folder)?.flags().contains(restricted))
}

fn mount(agent: &OwnedFd, folder: &OwnedFd) -> io::Result<()> {
    let mount = kernel::detached_copy(agent)?;
    kernel::restrict(&mount)?;
    kernel::attach(&mount, folder)
}

/// Removes the uppermost mount of a volume. Lazily: whoever still has it open keeps no pod from ending.
fn detach(volume: &OwnedFd) -> io::Result<()> {
    // umount2(2) takes a path. This one begins at the descriptor, and its last part is followed nowhere.
    let path = format!("/proc/self/fd/{}/{MOUNT}", volume.as_raw_fd());
    Ok(umount2(Path::new(&path), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?)
}

#[cfg(test)]
mod tests;
