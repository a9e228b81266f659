//! What a chain hangs on: which authority of a bundle vouches for it, without verifying it again.

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::{AuthorityKey, TrustBundle, X509Authority, authority_key_id};

/// What is above a chain's leaf: the keys of its intermediates, and who issued the last of its certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Above {
    intermediates: Vec<AuthorityKey>,
    /// The issuer's name in DER.
    name: Vec<u8>,
    /// The issuer's ID as the certificate says it, in lower-case hex; empty if it does not.
    id: String,
}

impl Above {
    /// Reads it from a chain, the leaf first. Errors: a certificate that cannot be parsed, with the reason.
    pub(crate) fn of(chain: &[CertificateDer<'_>]) -> Result<Self, String> {
        let (mut intermediates, mut name, mut id) = (vec![], vec![], String::new());
        for (n, der) in chain.iter().enumerate() {
            let (_, cert) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
            if n > 0 {
                intermediates.push(AuthorityKey::of_public_key(cert.public_key().raw));
            }
            name = cert.issuer().as_raw().to_vec();
            id = authority_key_id(&cert).map(hex::encode).unwrap_or_default();
        }
        Ok(Self { intermediates, name, id })
    }

    /// Whether `chain`, which this was read from, is below an authority of the bundle and below none that is tainted.
    pub(crate) fn is_good(&self, chain: &[CertificateDer<'_>], bundle: &TrustBundle) -> bool {
        // An intermediate that is an authority itself ends the path.
        let is_in_chain = |a: &&X509Authority| self.intermediates.contains(&a.key());
        let mut ends = bundle.authorities.iter().filter(is_in_chain).peekable();
        if ends.peek().is_some() {
            return ends.all(|a| !a.tainted);
        }
        let named = || bundle.authorities.iter().filter(|a| a.subject() == self.name.as_slice());
        // A certificate for the same key may be tainted as well or not; peers take whichever they find first.
        let mut by_id = named().filter(|a| !self.id.is_empty() && a.id() == self.id).peekable();
        if by_id.peek().is_some() {
            return by_id.all(|a| !a.tainted);
        }
        // Identifiers are text of the issuer's choice, and a root and its successor often have one name.
        let last = chain.last();
        let mut issuers = named().filter(|a| last.is_some_and(|der| a.has_issued(der))).peekable();
        issuers.peek().is_some() && issuers.all(|a| !a.tainted)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test that cannot go on has failed
mod tests {
    use std::time::Duration;

    use spiffe::{SpiffeId, TrustDomain};
    use time::OffsetDateTime;

    use super::*;
    use crate::key::{KeyType, PrivateKey};
    use crate::profile::{
        LeafRequest, RequestedKey, SigningAuthority, issue_intermediate, issue_leaf, request, request_intermediate,
    };
    use crate::svid::X509Svid;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn td() -> TrustDomain {
        TrustDomain::new("td").unwrap()
    }

    fn now() -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap()
    }

    struct Root(PrivateKey, CertificateDer<'static>);

    impl Root {
        fn new() -> Self {
            Self::of(PrivateKey::generate(KeyType::EcP256).unwrap())
        }

        /// A certificate for this key, with the name that all have, as a company's roots often do.
        fn of(key: PrivateKey) -> Self {
            let mut params = rcgen::CertificateParams::default();
            (params.not_before, params.not_after) = (now() - HOUR, now() + HOUR);
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            let der = params.self_signed(&key.key_pair().unwrap()).unwrap().der().clone();
            Self(key, der)
        }

        fn authority(&self, tainted: bool) -> X509Authority {
            let mut authority = X509Authority::from_der(self.1.to_vec()).unwrap();
            authority.tainted = tainted;
            authority
        }

        fn signer(&self) -> SigningAuthority {
            SigningAuthority::new(self.1.clone(), vec![], &self.0).unwrap()
        }

        /// A CA below it, whose chain is its own certificate.
        fn intermediate(&self) -> SigningAuthority {
            let key = PrivateKey::generate(KeyType::EcP256).unwrap();
            let requested = RequestedKey::from_csr(&request_intermediate(&td(), &key).unwrap()).unwrap();
            let own = issue_intermediate(&td(), &requested, HOUR, now(), &self.signer()).unwrap();
            SigningAuthority::new(own.clone(), vec![own], &key).unwrap()
        }
    }

    fn svid(ca: &SigningAuthority) -> X509Svid {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let requested = RequestedKey::from_csr(&request(&key, None).unwrap()).unwrap();
        let id = SpiffeId::new("spiffe://td/w").unwrap();
        let leaf = LeafRequest { id: &id, dns_names: &[], key: &requested, ttl: HOUR };
        X509Svid::new(issue_leaf(&leaf, ca, now()).unwrap().chain, key).unwrap()
    }

    fn bundle(authorities: Vec<X509Authority>) -> TrustBundle {
        TrustBundle { authorities, ..TrustBundle::empty(td()) }
    }

    #[test]
    fn a_root_counts_for_what_is_below_it_with_and_without_intermediates() {
        let (root, other) = (Root::new(), Root::new());
        let intermediate = root.intermediate();
        for svid in [svid(&root.signer()), svid(&intermediate)] {
            let good = |authorities: Vec<X509Authority>| svid.is_below_good_authority(&bundle(authorities));
            assert!(good(vec![other.authority(true), root.authority(false)]));
            assert!(!good(vec![other.authority(false), root.authority(true)]), "tainted");
            assert!(!good(vec![other.authority(false)]) && !good(vec![]), "gone");
            // Reissued for the same key: peers take whichever they find.
            let again = Root::of(PrivateKey::from_pkcs8(root.0.as_pkcs8().to_vec()).unwrap());
            assert!(!good(vec![root.authority(false), again.authority(true)]));
        }
        // An intermediate that is an authority itself ends the path.
        let own = X509Authority::from_der(intermediate.certificate().to_vec()).unwrap();
        let svid = svid(&intermediate);
        assert!(svid.is_below_good_authority(&bundle(vec![own.clone()])));
        let mut tainted = own;
        tainted.tainted = true;
        assert!(!svid.is_below_good_authority(&bundle(vec![tainted, root.authority(false)])));
    }

    #[test]
    fn an_issuer_that_is_not_named_by_its_id_is_known_by_its_signature() {
        let (root, other) = (Root::new(), Root::new());
        let svid = svid(&root.intermediate());
        let mut above = Above::of(svid.chain()).unwrap();
        for id in ["", "00"] {
            above.id = id.into();
            assert!(above.is_good(svid.chain(), &bundle(vec![other.authority(true), root.authority(false)])));
            assert!(!above.is_good(svid.chain(), &bundle(vec![other.authority(false), root.authority(true)])));
            assert!(!above.is_good(svid.chain(), &bundle(vec![other.authority(false)])));
        }
    }
}
