//! The preamble between sidecars and its answer: what is read is written again as it was, and nothing unprintable of a
//! peer is kept.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| countersign_proxy::fuzzing::preamble(data));
