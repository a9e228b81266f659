//! `/proc/PID/cgroup`: a pod is found only under the kubelet's own root.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| countersign_agent::fuzzing::cgroup(text));
