//! Requests of an Envoy for secrets: whatever they ask for, little of it is kept.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| countersign_agent::fuzzing::secrets(data));
