//! What the CNI plugin and its component read: the runtime's configuration and arguments, the node's configurations, requests.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| countersign_cni::fuzzing::plugin(data));
