//! Entry points for the fuzz targets in `fuzz/`, built with `--cfg fuzzing` only.

use countersign_watch::cgroup::container_of;

/// Hears the input as requests of an Envoy, by either protocol.
///
/// # Panics
/// If more is kept of them than a stream may have.
pub fn secrets(data: &[u8]) {
    crate::endpoints::secrets::hear(data);
}

/// Parses the input as `/proc/PID/cgroup`.
///
/// # Panics
/// If a container is found outside of the kubelet's root, or in a user's slice.
pub fn cgroup(text: &str) {
    let Ok(Some(container)) = container_of(text) else { return };
    assert_eq!(container.id.len(), 64);
    let path = |line: &str| line.splitn(3, ':').nth(2).unwrap_or_default().to_owned();
    // Seen from the agent's own cgroup namespace, a path goes up to what it shares with the agent's, and need not name it.
    let is_kubelets = |path: &str| path.contains("kubepods") || path.starts_with("/../../");
    // Below its own cgroup a container may create any, a `user.slice` too.
    let in_a_users =
        |path: &str| path.split('/').take_while(|part| !part.contains(&container.id)).any(|part| part == "user.slice");
    let claims = |path: String| path.contains(&container.id) && is_kubelets(&path) && !in_a_users(&path);
    assert!(text.lines().map(path).any(claims), "{container:?} from {text:?}");
}
