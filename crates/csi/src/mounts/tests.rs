//! Each test has a mount namespace of its own.

use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};

use nix::mount::{MsFlags, mount};

use super::*;
use crate::testing::{VOLUME, elsewhere, mounted, on_a_node};

/// The socket in a folder, by a path that is short enough for a socket's.
fn through(folder: &std::fs::File) -> PathBuf {
    format!("/proc/self/fd/{}/agent.sock", folder.as_raw_fd()).into()
}

#[test]
fn a_published_folder_is_read_only_follows_the_agent_and_is_gone_afterwards() {
    on_a_node(|node| {
        let (mounts, target) = (node.mounts(), node.target());
        let bind = || {
            let folder = std::fs::File::open(node.agent()).unwrap();
            UnixListener::bind(through(&folder)).unwrap()
        };
        let connect = || {
            let folder = std::fs::File::open(node.mount()).unwrap();
            UnixStream::connect(through(&folder)).unwrap()
        };
        let first = bind();
        for _ in 0..2 {
            mounts.publish(&target).unwrap();
            let [options] = mounted(&node.mount()).try_into().unwrap();
            for option in ["ro", "nosuid", "nodev", "noexec"] {
                assert!(options.split(',').any(|o| o == option), "{option} is missing in {options}");
            }
        }
        let there = node.mount().join("agent.sock");
        connect();
        for refused in [std::fs::write(node.mount().join("x"), "x"), std::fs::remove_file(&there)] {
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        }
        // The agent starts again: another socket in the same folder.
        drop(first);
        std::fs::remove_file(node.agent().join("agent.sock")).unwrap();
        let _second = bind();
        connect();
        for _ in 0..2 {
            mounts.unpublish(&target).unwrap();
            assert!(mounted(&node.mount()).is_empty() && !node.mount().exists());
        }
        assert!(node.volume().exists() && node.agent().join("agent.sock").exists());
    });
}

#[test]
fn a_drivers_end_leaves_its_mounts_and_the_next_one_removes_them() {
    on_a_node(|node| {
        let (mounts, target) = (node.mounts(), node.target());
        elsewhere(|| mounts.publish(&target).unwrap());
        let [options] = mounted(&node.mount()).try_into().unwrap();
        assert!(options.starts_with("ro,nosuid,nodev,noexec"), "restricted for the node too: {options}");
        elsewhere(|| {
            mounts.publish(&target).unwrap();
            assert_eq!(mounted(&node.mount()).len(), 1, "it is there already");
            mounts.unpublish(&target).unwrap();
        });
        assert!(mounted(&node.mount()).is_empty() && !node.mount().exists());
    });
}

#[test]
fn an_open_file_keeps_no_volume_and_what_else_is_mounted_there_is_replaced() {
    on_a_node(|node| {
        let (mounts, target, none) = (node.mounts(), node.target(), None::<&str>);
        std::fs::create_dir(node.mount()).unwrap();
        // Writable, as a driver would leave it that mounts first and restricts afterwards; and a stranger on top.
        mount(Some(&node.agent()), &node.mount(), none, MsFlags::MS_BIND, none).unwrap();
        mount(none, &node.mount(), none, MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("tmpfs"), &node.mount(), Some("tmpfs"), MsFlags::empty(), none).unwrap();
        mounts.publish(&target).unwrap();
        let [options] = mounted(&node.mount()).try_into().unwrap();
        assert!(options.starts_with("ro,"), "{options}");
        // A new folder of the agent takes the place of the old one.
        std::fs::remove_dir(node.agent()).unwrap();
        std::fs::create_dir(node.agent()).unwrap();
        mounts.publish(&target).unwrap();
        assert_eq!(mounted(&node.mount()).len(), 1);
        std::fs::write(node.agent().join("new"), "").unwrap();
        let held = std::fs::File::open(node.mount().join("new")).unwrap();
        mounts.unpublish(&target).unwrap();
        assert!(!node.mount().exists());
        drop(held);
    });
}

#[test]
fn no_link_leads_out_of_the_kubelets_folder() {
    on_a_node(|node| {
        let (mounts, target) = (node.mounts(), node.target());
        let outside = node.kubelet().join("outside");
        std::fs::create_dir_all(outside.join("mount")).unwrap();
        std::fs::write(outside.join("mount/kept"), "").unwrap();
        // The last folder is a link.
        symlink(outside.join("mount"), node.mount()).unwrap();
        for done in [mounts.publish(&target), mounts.unpublish(&target)] {
            assert!(matches!(done, Err(MountError::Kernel { .. })), "{done:?}");
        }
        // One in the middle is.
        std::fs::remove_file(node.mount()).unwrap();
        std::fs::remove_dir(node.volume()).unwrap();
        symlink(&outside, node.volume()).unwrap();
        for done in [mounts.publish(&target), mounts.unpublish(&target)] {
            assert!(matches!(done, Err(MountError::Kernel { .. })), "{done:?}");
        }
        assert!(mounted(&outside.join("mount")).is_empty() && outside.join("mount/kept").exists());
    });
}

#[test]
fn nothing_of_somebody_else_is_deleted_and_errors_say_what_is_missing() {
    on_a_node(|node| {
        let (mounts, target) = (node.mounts(), node.target());
        std::fs::create_dir(node.mount()).unwrap();
        std::fs::write(node.mount().join("kept"), "").unwrap();
        let why = mounts.unpublish(&target).unwrap_err().to_string();
        assert!(why.starts_with(&format!("cannot remove the folder of {VOLUME}: ")), "{why}");
        assert!(node.mount().join("kept").exists());
        std::fs::remove_dir_all(node.volume()).unwrap();
        assert!(matches!(mounts.publish(&target), Err(MountError::NoVolume(_))));
        mounts.unpublish(&target).unwrap();
        std::fs::remove_dir(node.agent()).unwrap();
        let why = mounts.publish(&target).unwrap_err().to_string();
        assert!(why.contains("does the agent run on this node?") && !mounts.agent_is_there(), "{why}");
    });
}
