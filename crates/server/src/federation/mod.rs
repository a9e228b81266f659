//! Federation: the trust bundles of foreign trust domains (`bundles`), where each is fetched from (`relationships`), who fetches it
//! and when (`refresh`), and the endpoint where others fetch ours (`endpoint`).
//!
//! Bundles of trust domains are never merged: each is stored, verified with and given out under its own name.

pub mod bundles;
pub mod endpoint;
pub mod metrics;
pub mod refresh;
pub mod relationship;
pub mod relationships;
mod serving_certificate;

pub use serving_certificate::CertificateError;
