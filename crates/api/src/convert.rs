//! Conversions between wire messages and domain types. Wire to domain parses and may fail; domain to wire cannot.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use countersign_identity::directory::{Answer, Endpoint, Hints, Place, Readiness, Service, ServicePort, Workload};
use countersign_identity::entry::EntryError;
use countersign_identity::policy::{Egress, Mode, Policy};
use countersign_identity::selector::{SelectorError, SelectorSet};
use countersign_identity::shown::shown;
use countersign_identity::trust_domain::{IdError, parse_id, parse_trust_domain, parse_workload_id};
use countersign_identity::{
    AdditionalAttributes, Entry, EntryId, JwtAuthority, Selector, SpiffeId, TrustBundle, TrustDomain, X509Authority,
};
use time::OffsetDateTime;
use x509_parser::num_bigint::BigUint;

use crate::push;
use crate::spire::types;

/// Why a wire message was rejected. The text names the field.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// A required field is absent. Holds its name.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field has an invalid value.
    #[error("{field}: {why}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Why the value is invalid.
        why: String,
    },
    /// The entry ID breaks a rule.
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// Not a valid selector.
    #[error(transparent)]
    Selector(#[from] SelectorError),
    /// Not a valid SPIFFE ID or trust domain.
    #[error(transparent)]
    Id(#[from] IdError),
}

fn field(field: &'static str) -> impl Fn(String) -> ParseError {
    move |why| ParseError::Field { field, why }
}

/// Parses a SPIFFE ID with a path. `name` is the field's name for errors.
pub fn id_from_wire(name: &'static str, id: Option<types::Spiffeid>) -> Result<SpiffeId, ParseError> {
    let id = id.ok_or(ParseError::Missing(name))?;
    let slash = if id.path.is_empty() || id.path.starts_with('/') { "" } else { "/" };
    parse_workload_id(&format!("spiffe://{}{slash}{}", id.trust_domain, id.path))
        .map_err(|e| field(name)(e.to_string()))
}

/// Encodes a SPIFFE ID.
pub fn id_to_wire(id: &SpiffeId) -> types::Spiffeid {
    types::Spiffeid { trust_domain: id.trust_domain_name().to_owned(), path: id.path().to_owned() }
}

/// Parses a set of selectors.
pub fn selectors_from_wire(selectors: Vec<types::Selector>) -> Result<SelectorSet, ParseError> {
    selectors.into_iter().map(|s| Ok(Selector::new(s.r#type, s.value)?)).collect()
}

/// Encodes selectors, in their order.
pub fn selectors_to_wire<'a>(selectors: impl IntoIterator<Item = &'a Selector>) -> Vec<types::Selector> {
    selectors
        .into_iter()
        .map(|s| types::Selector { r#type: s.kind().to_owned(), value: s.value().to_owned() })
        .collect()
}

fn ttl(name: &'static str, seconds: i32) -> Result<Option<Duration>, ParseError> {
    match u64::try_from(seconds) {
        Ok(0) => Ok(None),
        Ok(s) => Ok(Some(Duration::from_secs(s))),
        Err(_) => Err(field(name)(EntryError::Ttl(seconds.into()).to_string())),
    }
}

fn ttl_to_wire(ttl: Option<Duration>) -> i32 {
    ttl.map_or(0, |t| i32::try_from(t.as_secs()).unwrap_or(i32::MAX))
}

/// Parses seconds since 1970; 0 gives `None`.
pub fn time_from_wire(name: &'static str, seconds: i64) -> Result<Option<OffsetDateTime>, ParseError> {
    if seconds == 0 {
        return Ok(None);
    }
    OffsetDateTime::from_unix_timestamp(seconds).map(Some).map_err(|e| field(name)(e.to_string()))
}

/// Parses an entry. `fresh_id` generates the entry ID if the message has none. [`Entry::check`] is left to the caller.
pub fn entry_from_wire(e: types::Entry, fresh_id: impl FnOnce() -> EntryId) -> Result<Entry, ParseError> {
    let federates_with = e.federates_with.iter().map(|td| trust_domain_from_wire(td)).collect::<Result<_, _>>()?;
    Ok(Entry {
        id: if e.id.is_empty() { fresh_id() } else { e.id.parse()? },
        spiffe_id: id_from_wire("spiffe_id", e.spiffe_id)?,
        parent_id: id_from_wire("parent_id", e.parent_id)?,
        selectors: selectors_from_wire(e.selectors)?,
        x509_svid_ttl: ttl("x509_svid_ttl", e.x509_svid_ttl)?,
        jwt_svid_ttl: ttl("jwt_svid_ttl", e.jwt_svid_ttl)?,
        federates_with,
        admin: e.admin,
        downstream: e.downstream,
        dns_names: e.dns_names,
        expires_at: time_from_wire("expires_at", e.expires_at)?,
        hint: e.hint,
        store_svid: e.store_svid,
        additional: additional_from_wire(e.additional_attributes),
        revision: e.revision_number,
        created_at: time_from_wire("created_at", e.created_at)?.unwrap_or(OffsetDateTime::UNIX_EPOCH),
    })
}

/// Encodes an entry.
pub fn entry_to_wire(e: &Entry) -> types::Entry {
    types::Entry {
        id: e.id.to_string(),
        spiffe_id: Some(id_to_wire(&e.spiffe_id)),
        parent_id: Some(id_to_wire(&e.parent_id)),
        selectors: selectors_to_wire(&e.selectors),
        x509_svid_ttl: ttl_to_wire(e.x509_svid_ttl),
        jwt_svid_ttl: ttl_to_wire(e.jwt_svid_ttl),
        federates_with: e.federates_with.iter().map(ToString::to_string).collect(),
        admin: e.admin,
        downstream: e.downstream,
        expires_at: e.expires_at.map_or(0, OffsetDateTime::unix_timestamp),
        dns_names: e.dns_names.clone(),
        revision_number: e.revision,
        store_svid: e.store_svid,
        hint: e.hint.clone(),
        created_at: e.created_at.unix_timestamp(),
        additional_attributes: additional_to_wire(e.additional),
    }
}

fn additional_from_wire(wire: Option<types::entry::AdditionalAttributes>) -> AdditionalAttributes {
    wire.map_or_else(AdditionalAttributes::default, |a| AdditionalAttributes {
        disable_x509_svid_prefetch: a.disable_x509_svid_prefetch,
        jwt_svid_include_jti: a.jwt_svid_include_jti,
    })
}

/// None where none is set.
fn additional_to_wire(a: AdditionalAttributes) -> Option<types::entry::AdditionalAttributes> {
    (a != AdditionalAttributes::default()).then_some(types::entry::AdditionalAttributes {
        disable_x509_svid_prefetch: a.disable_x509_svid_prefetch,
        jwt_svid_include_jti: a.jwt_svid_include_jti,
    })
}

/// Parses a JWT authority.
pub fn jwt_authority_from_wire(key: types::JwtKey) -> Result<JwtAuthority, ParseError> {
    let read = JwtAuthority::new(&key.key_id, &key.public_key);
    let mut authority = read.map_err(|e| field("jwt_authorities")(e.to_string()))?;
    authority.expires_at = time_from_wire("jwt_authorities: expires_at", key.expires_at)?;
    authority.tainted = key.tainted;
    Ok(authority)
}

/// Encodes a JWT authority.
pub fn jwt_authority_to_wire(a: &JwtAuthority) -> types::JwtKey {
    types::JwtKey {
        public_key: a.der().to_vec(),
        key_id: a.key_id().to_owned(),
        expires_at: a.expires_at.map_or(0, OffsetDateTime::unix_timestamp),
        tainted: a.tainted,
    }
}

/// Parses a bundle. Fails if one of its authorities is neither a valid CA certificate nor a valid key, or two keys have one ID.
pub fn bundle_from_wire(b: types::Bundle) -> Result<TrustBundle, ParseError> {
    let (bundle, left_out) = bundle_without_unknown_keys(b)?;
    left_out.into_iter().next().map_or(Ok(bundle), Err)
}

/// Parses a bundle and leaves out the JWT keys that cannot be read, or that have another one's ID; why, for each. A reader ignores kinds
/// of keys that it does not know (SPIFFE Trust Domain and Bundle 4.2), and one bad key costs nobody the others.
pub fn bundle_without_unknown_keys(b: types::Bundle) -> Result<(TrustBundle, Vec<ParseError>), ParseError> {
    let authorities = b.x509_authorities.into_iter().map(|c| {
        let mut authority = X509Authority::from_der(c.asn1).map_err(|e| field("x509_authorities")(e.to_string()))?;
        authority.tainted = c.tainted;
        Ok(authority)
    });
    let authorities = authorities.collect::<Result<_, ParseError>>()?;
    let (mut jwt_authorities, mut left_out) = (Vec::<JwtAuthority>::new(), vec![]);
    let mut ids = std::collections::HashSet::new();
    for key in b.jwt_authorities {
        match jwt_authority_from_wire(key) {
            Ok(authority) if ids.insert(authority.key_id().to_owned()) => jwt_authorities.push(authority),
            Ok(twice) => {
                let why = format!("two keys have the ID `{}`", shown(twice.key_id()));
                left_out.push(field("jwt_authorities")(why));
            }
            Err(error) => left_out.push(error),
        }
    }
    let bundle = TrustBundle {
        trust_domain: parse_trust_domain(&b.trust_domain)?,
        authorities,
        jwt_authorities,
        sequence: b.sequence_number,
        refresh_hint: Duration::from_secs(b.refresh_hint.try_into().unwrap_or(0)),
    };
    Ok((bundle, left_out))
}

/// Encodes a bundle.
pub fn bundle_to_wire(b: &TrustBundle) -> types::Bundle {
    let certificate = |a: &X509Authority| types::X509Certificate { asn1: a.der().to_vec(), tainted: a.tainted };
    types::Bundle {
        trust_domain: b.trust_domain.to_string(),
        x509_authorities: b.authorities.iter().map(certificate).collect(),
        jwt_authorities: b.jwt_authorities.iter().map(jwt_authority_to_wire).collect(),
        refresh_hint: b.refresh_hint.as_secs().try_into().unwrap_or(i64::MAX),
        sequence_number: b.sequence,
    }
}

/// Parses an IP address of 4 or 16 bytes; IPv4-mapped addresses become IPv4.
pub fn address_from_wire(bytes: &[u8]) -> Result<IpAddr, ParseError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    let v6 = <[u8; 16]>::try_from(bytes)
        .map_err(|_| field("address")(format!("{} bytes, expected 4 or 16", bytes.len())))?;
    Ok(IpAddr::from(v6).to_canonical())
}

/// Encodes an IP address in 4 or 16 bytes.
pub fn address_to_wire(address: IpAddr) -> Vec<u8> {
    match address.to_canonical() {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn mode_from_wire(mode: i32) -> Result<Mode, ParseError> {
    match push::Mode::try_from(mode) {
        Ok(push::Mode::Off) => Ok(Mode::Off),
        Ok(push::Mode::Permissive) => Ok(Mode::Permissive),
        Ok(push::Mode::Strict) => Ok(Mode::Strict),
        _ => Err(field("mode")(format!("{mode} is no mode"))),
    }
}

fn mode_to_wire(mode: Mode) -> i32 {
    match mode {
        Mode::Off => push::Mode::Off.into(),
        Mode::Permissive => push::Mode::Permissive.into(),
        Mode::Strict => push::Mode::Strict.into(),
    }
}

fn port(name: &'static str, port: u32) -> Result<u16, ParseError> {
    u16::try_from(port).ok().filter(|p| *p != 0).ok_or_else(|| field(name)(format!("{port} is no port")))
}

fn port_modes_from_wire(name: &'static str, all: &[push::PortMode]) -> Result<BTreeMap<u16, Mode>, ParseError> {
    all.iter().map(|m| Ok((port(name, m.port)?, mode_from_wire(m.mode)?))).collect()
}

fn port_modes_to_wire(all: &BTreeMap<u16, Mode>) -> Vec<push::PortMode> {
    all.iter().map(|(port, mode)| push::PortMode { port: (*port).into(), mode: mode_to_wire(*mode) }).collect()
}

fn egress_from_wire(every_port: &[String], one_port: &[push::EgressPort]) -> Result<Vec<Egress>, ParseError> {
    let net = |text: &str| text.parse().map_err(|_| field("egress")(format!("`{}` is no CIDR", shown(text))));
    let whole = every_port.iter().map(|text| Ok(Egress { net: net(text)?, port: None }));
    let single =
        one_port.iter().map(|e| Ok(Egress { net: net(&e.network)?, port: Some(port("egress_ports", e.port)?) }));
    whole.chain(single).collect()
}

/// Parses a workload of the directory.
pub fn workload_from_wire(w: push::Workload) -> Result<Workload, ParseError> {
    let p = w.policy.ok_or(ParseError::Missing("policy"))?;
    let ids = |ids: Vec<String>| ids.iter().map(|id| Ok(parse_id(id)?.to_string())).collect::<Result<_, ParseError>>();
    let policy = Policy {
        mode: mode_from_wire(p.mode)?,
        port_modes: port_modes_from_wire("port_modes", &p.port_modes)?,
        port_exceptions: port_modes_from_wire("port_exceptions", &p.port_exceptions)?,
        allow: (p.has_allow || !p.allow.is_empty()).then(|| ids(p.allow)).transpose()?,
        port_allow: p
            .port_allow
            .into_iter()
            .map(|a| Ok((port("port_allow", a.port)?, ids(a.allow)?)))
            .collect::<Result<_, ParseError>>()?,
        egress: egress_from_wire(&p.egress, &p.egress_ports)?,
    };
    Ok(Workload {
        uid: w.uid,
        name: w.name,
        addresses: w.addresses.iter().map(|a| address_from_wire(a)).collect::<Result<_, _>>()?,
        spiffe_ids: ids(w.spiffe_ids)?,
        mesh_port: port("mesh_port", w.mesh_port)?,
        policy,
        place: Place { node: w.node, zone: w.zone },
    })
}

/// Encodes a workload of the directory.
pub fn workload_to_wire(w: &Workload) -> push::Workload {
    let p = &w.policy;
    push::Workload {
        uid: w.uid.clone(),
        name: w.name.clone(),
        addresses: w.addresses.iter().map(|a| address_to_wire(*a)).collect(),
        spiffe_ids: w.spiffe_ids.iter().cloned().collect(),
        mesh_port: w.mesh_port.into(),
        node: w.place.node.clone(),
        zone: w.place.zone.clone(),
        policy: Some(push::Policy {
            mode: mode_to_wire(p.mode),
            port_modes: port_modes_to_wire(&p.port_modes),
            port_exceptions: port_modes_to_wire(&p.port_exceptions),
            allow: p.allow.iter().flatten().cloned().collect(),
            has_allow: p.allow.is_some(),
            port_allow: p
                .port_allow
                .iter()
                .map(|(port, a)| push::PortAllow { port: (*port).into(), allow: a.iter().cloned().collect() })
                .collect(),
            // What holds for one port must not be in the field that older readers apply to every port.
            egress: p.egress.iter().filter(|e| e.port.is_none()).map(|e| e.net.to_string()).collect(),
            egress_ports: p
                .egress
                .iter()
                .filter_map(|e| Some(push::EgressPort { network: e.net.to_string(), port: e.port?.into() }))
                .collect(),
        }),
    }
}

/// Parses an answer of the directory, with the address that it is about.
pub fn answer_from_wire(a: push::Answer) -> Result<(IpAddr, Answer), ParseError> {
    let address = address_from_wire(&a.address)?;
    let answer = match (a.workload, a.service) {
        (Some(w), _) => Answer::Meshed(workload_from_wire(w)?.into()),
        (None, Some(s)) => Answer::Service(service_from_wire(s)?.into()),
        (None, None) => Answer::NotMeshed,
    };
    Ok((address, answer))
}

/// Encodes an answer of the directory.
pub fn answer_to_wire(address: IpAddr, answer: &Answer) -> push::Answer {
    let (workload, service) = match answer {
        Answer::Meshed(w) => (Some(workload_to_wire(w)), None),
        Answer::Service(s) => (None, Some(service_to_wire(s))),
        Answer::NotMeshed => (None, None),
    };
    push::Answer { address: address_to_wire(address), workload, service }
}

/// Parses a service of the directory.
pub fn service_from_wire(s: push::Service) -> Result<Service, ParseError> {
    let endpoint = |e: push::Endpoint| {
        let readiness = match (e.ready, e.draining) {
            (true, _) => Readiness::Ready,
            (false, true) => Readiness::Draining,
            (false, false) => Readiness::NotReady,
        };
        Ok::<_, ParseError>(Endpoint {
            address: SocketAddr::new(address_from_wire(&e.address)?, port("endpoint", e.port)?),
            meshed: e.meshed,
            readiness,
            node: e.node,
            hints: Hints { nodes: e.for_nodes, zones: e.for_zones },
        })
    };
    let one_port = |p: push::ServicePort| {
        let made = ServicePort {
            endpoints: p.endpoints.into_iter().map(endpoint).collect::<Result<_, ParseError>>()?,
            affinity: (p.affinity_seconds > 0).then(|| Duration::from_secs(p.affinity_seconds.into())),
            local: p.local,
        };
        Ok::<_, ParseError>((port("ports", p.port)?, made))
    };
    Ok(Service {
        uid: s.uid,
        name: s.name,
        addresses: s.addresses.iter().map(|a| address_from_wire(a)).collect::<Result<_, _>>()?,
        claimed: !s.claimed_ports.is_empty(),
        ports: s.ports.into_iter().chain(s.claimed_ports).map(one_port).collect::<Result<_, _>>()?,
    })
}

/// Encodes a service of the directory.
pub fn service_to_wire(s: &Service) -> push::Service {
    let endpoint = |e: &Endpoint| push::Endpoint {
        address: address_to_wire(e.address.ip()),
        port: e.address.port().into(),
        meshed: e.meshed,
        ready: e.readiness == Readiness::Ready,
        draining: e.readiness == Readiness::Draining,
        node: e.node.clone(),
        for_nodes: e.hints.nodes.clone(),
        for_zones: e.hints.zones.clone(),
    };
    let ports = s.ports.iter().map(|(port, behind)| push::ServicePort {
        port: (*port).into(),
        endpoints: behind.endpoints.iter().map(endpoint).collect(),
        affinity_seconds: behind.affinity.map_or(0, |a| u32::try_from(a.as_secs()).unwrap_or(u32::MAX)),
        local: behind.local,
    });
    let (claimed_ports, ports) = if s.claimed { (ports.collect(), vec![]) } else { (vec![], ports.collect()) };
    push::Service {
        uid: s.uid.clone(),
        name: s.name.clone(),
        addresses: s.addresses.iter().copied().map(address_to_wire).collect(),
        ports,
        claimed_ports,
    }
}

/// Encodes a serial number in hex as SPIRE's API has it, in decimal. Empty for what is none.
pub fn serial_to_wire(hex: &str) -> String {
    radix(hex, 16, 10)
}

/// A serial number in lower-case hex, as certificates and logs have it. Empty for what is none.
pub fn serial_from_wire(decimal: &str) -> String {
    radix(decimal, 10, 16)
}

fn radix(number: &str, from: u32, to: u32) -> String {
    BigUint::parse_bytes(number.as_bytes(), from).map_or_else(String::new, |number| number.to_str_radix(to))
}

/// Parses a trust domain name, with or without `spiffe://`.
pub fn trust_domain_from_wire(text: &str) -> Result<TrustDomain, ParseError> {
    Ok(parse_trust_domain(text.strip_prefix("spiffe://").unwrap_or(text))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jwt_keys_of_a_bundle_come_back_and_what_cannot_be_read_is_named() {
        let public = |id: &str| {
            let key = countersign_identity::PrivateKey::generate(countersign_identity::KeyType::EcP256).unwrap();
            JwtAuthority::new(id, &key.public_der().unwrap()).unwrap()
        };
        let mut ending = public("a");
        ending.expires_at = Some(OffsetDateTime::from_unix_timestamp(1_900_000_000).unwrap());
        ending.tainted = true;
        let td = parse_trust_domain("td").unwrap();
        let bundle = TrustBundle { jwt_authorities: vec![ending, public("b")], ..TrustBundle::empty(td) };
        let wire = bundle_to_wire(&bundle);
        assert_eq!(bundle_from_wire(wire.clone()).unwrap(), bundle);
        let mut strange = wire.clone();
        strange.jwt_authorities[0].public_key = vec![1, 2, 3];
        assert!(bundle_from_wire(strange.clone()).is_err(), "what somebody sets has to be right");
        let (read, left_out) = bundle_without_unknown_keys(strange).unwrap();
        assert_eq!(left_out.len(), 1);
        assert_eq!(read.jwt_authorities, [bundle.jwt_authorities[1].clone()]);
        let mut twice = wire;
        twice.jwt_authorities[1].key_id = "a".into();
        assert!(bundle_from_wire(twice.clone()).unwrap_err().to_string().contains("two keys have the ID `a`"));
        let (read, left_out) = bundle_without_unknown_keys(twice).unwrap();
        assert_eq!(left_out.len(), 1);
        assert_eq!(read.jwt_authorities, [bundle.jwt_authorities[0].clone()]);
    }

    #[test]
    fn a_workload_comes_back_from_the_wire_as_it_went() {
        let w = Workload {
            uid: "u1".into(),
            name: "web".into(),
            addresses: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            spiffe_ids: ["spiffe://td/a".to_owned()].into(),
            mesh_port: 15008,
            place: Place { node: "n1".into(), zone: "z1".into() },
            policy: Policy {
                mode: Mode::Strict,
                port_modes: [(80, Mode::Off)].into(),
                port_exceptions: [(9443, Mode::Permissive)].into(),
                allow: Some(["spiffe://td/b".to_owned()].into()),
                port_allow: [(81, ["spiffe://td/c".to_owned()].into())].into(),
                egress: vec![
                    Egress { net: "192.0.2.0/24".parse().unwrap(), port: None },
                    Egress { net: "192.0.2.7/32".parse().unwrap(), port: Some(6443) },
                ],
            },
        };
        let wire = workload_to_wire(&w);
        assert_eq!(wire.policy.as_ref().unwrap().egress, ["192.0.2.0/24"], "an older reader lets out less, not more");
        assert_eq!(workload_from_wire(wire).unwrap(), w);
        let wire = workload_to_wire(&w).policy.unwrap();
        assert!(wire.port_modes.iter().all(|m| m.port == 80), "an older reader stays strict: {wire:?}");
        let mut portless = workload_to_wire(&w);
        portless.policy.as_mut().unwrap().egress_ports[0].port = 0;
        assert_eq!(workload_from_wire(portless).unwrap_err().to_string(), "egress_ports: 0 is no port");
        // The wire format distinguishes no list from an empty list, too.
        for allow in [None, Some(std::collections::BTreeSet::new())] {
            let policy = Policy { allow, port_allow: [(81, [].into())].into(), ..w.policy.clone() };
            let w = Workload { policy, ..w.clone() };
            assert_eq!(workload_from_wire(workload_to_wire(&w)).unwrap(), w);
        }
    }

    #[test]
    fn a_service_comes_back_from_the_wire_as_it_went() {
        let endpoint = |address: &str, meshed, readiness| Endpoint {
            address: address.parse().unwrap(),
            meshed,
            readiness,
            node: "n1".into(),
            hints: Hints { nodes: vec!["n1".into()], zones: vec!["z1".into(), "z2".into()] },
        };
        let endpoints = vec![
            endpoint("10.0.0.1:8080", true, Readiness::NotReady),
            endpoint("[fd00::1]:8080", false, Readiness::Ready),
            endpoint("10.0.0.2:8080", false, Readiness::Draining),
        ];
        let http = ServicePort { endpoints, affinity: Some(Duration::from_secs(10_800)), local: true };
        let s = Service {
            uid: "s1".into(),
            name: "shop/web".into(),
            addresses: vec!["10.91.0.7".parse().unwrap()],
            ports: [(80, http), (443, ServicePort::default())].into(),
            claimed: false,
        };
        assert_eq!(service_from_wire(service_to_wire(&s)).unwrap(), s);
        let claimed = Service { claimed: true, ..s.clone() };
        assert_eq!(service_from_wire(service_to_wire(&claimed)).unwrap(), claimed);
        assert!(service_to_wire(&claimed).ports.is_empty(), "a reader that knows no claims finds nobody there");
        // Whatever the endpoint is besides, a reader that knows `ready` alone sees who takes connections.
        let ready: Vec<bool> = service_to_wire(&s).ports[0].endpoints.iter().map(|e| e.ready).collect();
        assert_eq!(ready, [false, true, false]);
        let mut wrong = service_to_wire(&s);
        wrong.ports[0].endpoints[0].port = 0;
        assert_eq!(service_from_wire(wrong).unwrap_err().to_string(), "endpoint: 0 is no port");
    }

    #[test]
    fn half_a_workload_is_refused_and_the_field_is_named() {
        let good = push::Workload {
            mesh_port: 1,
            policy: Some(push::Policy { mode: 3, ..Default::default() }),
            ..Default::default()
        };
        assert!(workload_from_wire(good.clone()).is_ok());
        let why = |w: push::Workload| workload_from_wire(w).unwrap_err().to_string();
        assert_eq!(why(push::Workload { policy: None, ..good.clone() }), "policy is missing");
        assert_eq!(why(push::Workload { policy: Some(push::Policy::default()), ..good.clone() }), "mode: 0 is no mode");
        assert_eq!(why(push::Workload { mesh_port: 70_000, ..good.clone() }), "mesh_port: 70000 is no port");
        assert_eq!(why(push::Workload { addresses: vec![vec![1]], ..good }), "address: 1 bytes, expected 4 or 16");
    }
}
