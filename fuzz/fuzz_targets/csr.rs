//! Certificate signing requests, PEM bundles, authorities and keys: an answer, never a panic.
#![no_main]

use countersign_identity::bundle::certificates_from_pem;
use countersign_identity::profile::RequestedKey;
use countersign_identity::{PrivateKey, X509Authority};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = RequestedKey::from_csr(data);
    let _ = certificates_from_pem(data);
    let _ = X509Authority::from_der(data);
    let _ = PrivateKey::from_pkcs8(data.to_vec());
});
