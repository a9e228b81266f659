//! Entry points for the fuzz targets in `fuzz/`, built with `--cfg fuzzing` only.

use crate::workload_attestor::container_of;

/// Parses the input as `/proc/PID/cgroup`.
///
/// # Panics
/// If a container is found outside of the kubelet's root, or in a user's slice.
pub fn cgroup(text: &str) {
    if let Ok(Some(container)) = container_of(text) {
        assert_eq!(container.id.len(), 64);
        let path = |line: &str| line.splitn(3, ':').nth(2).unwrap_or_default().to_owned();
        // Seen from the agent's own cgroup namespace, a path goes up to what it shares with the agent's, and need not name it.
        let is_kubelets = |path: &str| path.contains("kubepods") || path.starts_with("/../../");
        let claims = |path: String| is_kubelets(&path) && !path.contains("user.slice");
        assert!(text.lines().map(path).any(claims), "{container:?} from {text:?}");
    }
}
