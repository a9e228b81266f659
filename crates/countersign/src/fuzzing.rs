//! Entry points for the fuzz targets in `fuzz/`, built with `--cfg fuzzing` only.

use std::path::Path;

use crate::kubernetes;
use crate::roles::agent::AgentSettings;
use crate::roles::proxy::ProxySettings;
use crate::roles::server::ServerSettings;
use crate::settings::yaml::{from_node, parse};
use crate::up;

/// Parses the input as a mesh file.
///
/// # Panics
/// If an error message has more than one line, or names no place.
pub fn mesh_file(text: &str) {
    let Ok(Some(tree)) = parse(text) else { return };
    if let Err(mistake) = up::read_mesh(Path::new("mesh.yaml"), &tree) {
        let said = mistake.to_string();
        assert!(said.starts_with("mesh.yaml:") && !said.contains('\n'), "{said:?}");
    }
}

/// Parses the input as settings of server, agent and sidecar.
pub fn settings(text: &str) {
    let Ok(Some(tree)) = parse(text) else { return };
    let _ = from_node::<ServerSettings>(&tree);
    let _ = from_node::<AgentSettings>(&tree);
    let _ = from_node::<ProxySettings>(&tree);
}

/// Reads the input as the answer of a sidecar, which may be anybody's.
///
/// # Panics
/// When a text in it could write over what an operator sees.
pub fn sidecar_status(body: &[u8]) {
    for text in kubernetes::sidecar_texts(body) {
        assert!(!text.contains(|c: char| c.is_control()), "{text:?}");
    }
}
