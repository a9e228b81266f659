//! The stories: what a user does with the whole program, on real, unmodified parts. One file a story.
//!
//! Most need root (network namespaces); without it they say so and are passed over, but never in CI.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on has failed

mod backup;
mod bad_input;
mod cni;
mod docs;
mod envoy;
mod faults;
mod federation;
mod fidelity;
mod first_minutes;
mod machine;
mod metrics;
mod nested;
mod operator;
mod pki;
mod programs;
mod refusals;
mod rotation;
mod seams;
mod sidecar;
mod strangers;
mod support;
mod upstream;
mod workload_api;
