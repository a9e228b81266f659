//! YAML as a tree in which every key and value has its line, so that each error can name its place.
//!
//! `tree` parses, `read` takes values by key, `de` connects serde for settings that are plain structs.

mod de;
mod read;
mod tree;

pub use de::from_node;
pub use read::{Fields, Reader};
pub use tree::{Node, Value, parse};
