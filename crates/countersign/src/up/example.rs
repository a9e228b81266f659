//! The built-in example: a shop, and the same shop with lifetimes so short that a minute shows all rotations.

use std::collections::BTreeMap;
use std::time::Duration;

use countersign_identity::policy::{Mode, Policy};
use countersign_identity::trust_domain::{parse_trust_domain, service_account_id};

use super::mesh_file::{MeshSpec, WorkloadSpec};
use crate::launch::OWN_PROGRAM;
use crate::settings::Ttl;
use crate::shop::PORT;

/// Services of the shop, and the services that may call each; an empty list means all of the mesh.
const SERVICES: [(&str, &[&str]); 4] =
    [("productpage", &[]), ("details", &[]), ("reviews", &[]), ("ratings", &["reviews"])];

/// The shop in strict mode.
pub fn shop() -> MeshSpec {
    // The name is a valid constant.
    let trust_domain = parse_trust_domain("shop.local").unwrap_or_else(|_| unreachable!("a valid constant"));
    let id =
        |name: &str| service_account_id(&trust_domain, "default", name).map(|id| id.to_string()).unwrap_or_default();
    let workloads = SERVICES.iter().map(|(name, callers)| WorkloadSpec {
        name: (*name).into(),
        namespace: "default".into(),
        service_account: (*name).into(),
        user: None,
        command: vec![OWN_PROGRAM.into(), "shop".into(), (*name).into()],
        ports: [PORT].into(),
        workdir: None,
        restart: Default::default(),
        env: BTreeMap::new(),
        policy: Policy {
            mode: Mode::Strict,
            allow: (!callers.is_empty()).then(|| callers.iter().map(|c| id(c)).collect()),
            ..Policy::default()
        },
        exclude_outbound_ports: [].into(),
        exclude_inbound_ports: [].into(),
        exclude_outbound_cidrs: [].into(),
        exclude_inbound_cidrs: [].into(),
        proxy_protocol: [].into(),
        allow_udp_ports: [].into(),
        allow_other_cidrs: [].into(),
    });
    MeshSpec {
        name: "shop".into(),
        workloads: workloads.collect(),
        mode: Mode::Strict,
        ca_ttl: Ttl(Duration::from_secs(86_400)),
        svid_ttl: Ttl(Duration::from_secs(3_600)),
        ca_key_type: "ec-p256".into(),
        upstream: None,
        trust_domain,
    }
}

/// The shop as `--verify` runs it.
pub fn verification() -> MeshSpec {
    MeshSpec {
        name: "verify".into(),
        ca_ttl: Ttl(Duration::from_secs(40)),
        svid_ttl: Ttl(Duration::from_secs(20)),
        ..shop()
    }
}
