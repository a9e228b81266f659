//! What is said of a relationship on the command line.

use std::path::PathBuf;

use anyhow::Result;
use countersign_api::convert::bundle_to_wire;
use countersign_api::spire::types::federation_relationship::BundleEndpointProfile;
use countersign_api::spire::types::{
    Bundle, FederationRelationship, FederationRelationshipMask, HttpsWebProfile, HttpsspiffeProfile,
};
use countersign_identity::TrustDomain;

use crate::operator::bundle::{Form, read_bundle};
use crate::operator::trust_domain;
use crate::settings::Mistake;

/// Fields that create and update share. The names are SPIRE's.
#[derive(Debug, clap::Args)]
pub struct Fields {
    /// URL of the trust domain's bundle endpoint; https only.
    #[arg(long, value_name = "URL")]
    bundle_endpoint_url: Option<String>,
    /// How the endpoint proves who it is. `https_spiffe`: by an SVID, as servers of SPIRE and Countersign do; needs
    /// --endpoint-spiffe-id, and the bundle that vouches for it. `https_web`: by a certificate that this machine's certificate
    /// authorities vouch for, as a web server does [default: `https_spiffe` if --endpoint-spiffe-id is given].
    #[arg(long, value_name = "PROFILE", value_parser = ["https_spiffe", "https_web"])]
    bundle_endpoint_profile: Option<String>,
    /// SPIFFE ID of the endpoint, such as `spiffe://partner.example/spire/server`; no other is accepted.
    #[arg(long, value_name = "ID")]
    endpoint_spiffe_id: Option<String>,
    /// File with the trust domain's bundle as it is now; `-` reads standard input. With `https_spiffe` the first fetch is
    /// verified by it, so get it by a way that you trust.
    #[arg(long, value_name = "FILE")]
    trust_domain_bundle_path: Option<PathBuf>,
    /// Format of that file. spiffe: a SPIFFE bundle (JSON Web Key set), as `countersign bundle show --format spiffe` prints. pem: X.509
    /// authorities.
    #[arg(long, value_name = "FORMAT", default_value = "pem", requires = "trust_domain_bundle_path")]
    trust_domain_bundle_format: Form,
}

impl Fields {
    /// A relationship said in full.
    pub fn whole(self, name: &str) -> Result<FederationRelationship> {
        let td = trust_domain("--trust-domain", name)?;
        let Some(url) = self.bundle_endpoint_url.clone() else {
            let why = format!("is missing: where does `{td}` serve its bundle, as in https://{td}:8443?");
            return Err(Mistake::flag("--bundle-endpoint-url", &why).into());
        };
        let Some(profile) = self.profile(&td)? else {
            let why = format!(
                "is missing: https_spiffe with --endpoint-spiffe-id spiffe://{td}/spire/server for a server of SPIRE or \
                 Countersign, https_web for a web server"
            );
            return Err(Mistake::flag("--bundle-endpoint-profile", &why).into());
        };
        Ok(FederationRelationship {
            trust_domain: td.to_string(),
            bundle_endpoint_url: url,
            bundle_endpoint_profile: Some(profile),
            trust_domain_bundle: self.bundle(td)?,
        })
    }

    /// The fields that are given, and which they are.
    pub fn changes(self, name: &str) -> Result<(FederationRelationship, FederationRelationshipMask)> {
        let td = trust_domain("--trust-domain", name)?;
        let relationship = FederationRelationship {
            trust_domain: td.to_string(),
            bundle_endpoint_url: self.bundle_endpoint_url.clone().unwrap_or_default(),
            bundle_endpoint_profile: self.profile(&td)?,
            trust_domain_bundle: self.bundle(td)?,
        };
        let mask = FederationRelationshipMask {
            bundle_endpoint_url: self.bundle_endpoint_url.is_some(),
            bundle_endpoint_profile: relationship.bundle_endpoint_profile.is_some(),
            trust_domain_bundle: relationship.trust_domain_bundle.is_some(),
        };
        if mask == FederationRelationshipMask::default() {
            let why = "nothing to change is given: name a --bundle-endpoint-url, a --bundle-endpoint-profile, an \
                       --endpoint-spiffe-id or a --trust-domain-bundle-path";
            return Err(Mistake(why.into()).into());
        }
        Ok((relationship, mask))
    }

    fn profile(&self, td: &TrustDomain) -> Result<Option<BundleEndpointProfile>, Mistake> {
        match (self.bundle_endpoint_profile.as_deref(), &self.endpoint_spiffe_id) {
            (None, None) => Ok(None),
            (Some("https_web"), None) => Ok(Some(BundleEndpointProfile::HttpsWeb(HttpsWebProfile {}))),
            (Some("https_web"), Some(_)) => {
                Err(Mistake::flag("--endpoint-spiffe-id", "has no effect with https_web: leave one of them out"))
            }
            (_, None) => {
                let why =
                    format!("is missing, as in spiffe://{td}/spire/server: https_spiffe accepts one identity only");
                Err(Mistake::flag("--endpoint-spiffe-id", &why))
            }
            (_, Some(id)) => {
                let id = countersign_identity::trust_domain::parse_workload_id(id)
                    .map_err(|e| Mistake::flag("--endpoint-spiffe-id", &e.to_string()))?;
                let spiffe = HttpsspiffeProfile { endpoint_spiffe_id: id.to_string() };
                Ok(Some(BundleEndpointProfile::HttpsSpiffe(spiffe)))
            }
        }
    }

    fn bundle(&self, td: TrustDomain) -> Result<Option<Bundle>, Mistake> {
        let Some(path) = &self.trust_domain_bundle_path else { return Ok(None) };
        let flags = ("--trust-domain-bundle-path", "--trust-domain-bundle-format");
        read_bundle(flags, td, path, self.trust_domain_bundle_format).map(|bundle| Some(bundle_to_wire(&bundle)))
    }
}
