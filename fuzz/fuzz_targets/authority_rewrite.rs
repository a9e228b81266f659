//! The filter that mends gRPC's `:authority` on Unix sockets: it neither adds nor drops a byte, however the input is cut.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| countersign_api::fuzzing::authority_rewrite(data));
