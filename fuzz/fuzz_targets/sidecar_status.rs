//! A sidecar's answer to an operator's command: a status or a reason, and no text that a terminal would act on.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| countersign::fuzzing::sidecar_status(body));
