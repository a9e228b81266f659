//! Doors for the fuzz targets in `fuzz/`, built with `--cfg fuzzing` alone.

use crate::workload_attestor::container_of;

/// Reads the input as `/proc/PID/cgroup`.
///
/// # Panics
/// When a container is found outside of the kubelet's own root, or in a user's slice.
pub fn cgroup(text: &str) {
    if let Ok(Some(container)) = container_of(text) {
        assert_eq!(container.id.len(), 64);
        let claims = |line: &str| line.contains("kubepods") && !line.contains("user.slice");
        assert!(text.lines().any(claims), "{container:?} from {text:?}");
    }
}
