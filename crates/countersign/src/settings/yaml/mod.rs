//! YAML as a tree in which every value and key knows its line, so that each mistake can name its place.
//!
//! `tree` parses, `read` takes values out by key, `de` feeds serde, for settings that are plain structs.

mod de;
mod read;
mod tree;

pub use de::from_node;
pub use read::{Fields, Reader};
pub use tree::{Node, Value, parse};
