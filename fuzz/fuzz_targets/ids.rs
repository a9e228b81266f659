//! SPIFFE IDs and trust domains: what is accepted renders to itself and keeps to the SPIFFE ID standard's characters.
#![no_main]

use countersign_identity::trust_domain::{parse_id, parse_trust_domain, parse_workload_id};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match parse_id(text) {
        Ok(id) => {
            assert_eq!(id.to_string(), text);
            let legal = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
            assert!(id.path().chars().all(legal), "{id}");
            assert!(!id.path().split('/').skip(1).any(|s| s.is_empty() || s == "." || s == ".."), "{id}");
            assert_eq!(parse_workload_id(text).is_ok(), !id.path().is_empty());
        }
        Err(error) => {
            assert!(parse_workload_id(text).is_err());
            assert!(!error.to_string().chars().any(char::is_control), "an error repeats raw bytes: {error:?}");
        }
    }
    if let Ok(td) = parse_trust_domain(text) {
        assert!(parse_id(&format!("spiffe://{}", td.as_str())).is_ok());
    }
});
