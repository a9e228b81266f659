//! Mesh files: a mesh or one line that names the place, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| countersign::fuzzing::mesh_file(text));
