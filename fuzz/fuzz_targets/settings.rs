//! Settings files of server, agent and sidecar.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| countersign::fuzzing::settings(text));
