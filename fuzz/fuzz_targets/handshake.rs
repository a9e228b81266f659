//! The called sidecar's TLS engine, from the first byte of a ClientHello up to the verifier, fed in the pieces that the
//! input says.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| countersign_proxy::fuzzing::handshake(data));
