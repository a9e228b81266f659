//! The kernel's answers about nf_tables.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| countersign_redirect::nftables::fuzzing::answers(data));
