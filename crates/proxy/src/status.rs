//! The status service for `countersign status`, on a Unix socket of mode 0600.

use std::sync::Arc;

use async_trait::async_trait;
use countersign_api::push::status_server::Status as StatusService;
use countersign_api::push::{GetStatusRequest, GetStatusResponse, Identity as WireIdentity, PlaintextPeer};
use tonic::{Request, Response, Status};

use crate::sidecar::Sidecar;
use crate::telemetry::{Carried, Direction};

/// The gRPC service over one sidecar's state.
pub struct StatusEndpoint(pub Arc<Sidecar>);

#[async_trait]
impl StatusService for StatusEndpoint {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let sidecar = &self.0;
        let t = &sidecar.telemetry;
        let identity = sidecar.current.peek();
        let workload = identity.as_ref().and_then(|i| sidecar.local.workload(i));
        let count = |direction, modes: &[Carried]| {
            modes.iter().map(|m| t.connection_count(direction, *m)).sum::<u64>().to_string()
        };
        let mut facts = vec![
            ("open connections", sidecar.connections.count().borrow().to_string()),
            ("connections in, mtls", count(Direction::Inbound, &[Carried::Mtls])),
            ("connections in, plain", count(Direction::Inbound, &[Carried::Plain])),
            ("connections in, refused", count(Direction::Inbound, &[Carried::Refused])),
            ("connections out, mtls", count(Direction::Outbound, &[Carried::Mtls])),
            ("connections out, plain", count(Direction::Outbound, &[Carried::Plain])),
            ("connections out, refused", count(Direction::Outbound, &[Carried::Refused])),
            ("identity rotations", t.rotations.get().to_string()),
            ("directory addresses followed", sidecar.directory.len().to_string()),
            ("ready", sidecar.missing().map_or_else(|| "yes".to_owned(), |why| format!("no: {why}"))),
        ];
        for (name, direction) in [("in", Direction::Inbound), ("out", Direction::Outbound)] {
            let bytes = t.bytes(direction);
            let total = bytes.sent.get() + bytes.received.get();
            facts.push((if name == "in" { "bytes in" } else { "bytes out" }, total.to_string()));
        }
        if let Some(w) = workload {
            facts.push(("workload", w.name.clone()));
            facts.push(("mode", w.policy.mode.to_string()));
        }
        let identities = identity.iter().map(|i| WireIdentity {
            entry_id: String::new(),
            spiffe_id: i.svid().id().to_string(),
            serial: i.svid().facts().serial.clone(),
            expires_at: i.svid().facts().not_after.unix_timestamp(),
            authority_id: i.svid().facts().authority_id.clone(),
        });
        let plaintext = sidecar.plaintext.shown();
        let peers = plaintext.peers.into_iter().map(|row| PlaintextPeer {
            peer: row.key.peer.to_string(),
            port: row.key.port.into(),
            direction: row.key.direction.as_str().to_owned(),
            mode: row.key.mode.as_str().to_owned(),
            first_seen: row.first_seen,
            last_seen: row.last_seen,
            open: row.open,
            total: row.total,
        });
        Ok(Response::new(GetStatusResponse {
            role: "proxy".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            trust_domain: identity.as_ref().map(|i| i.svid().id().trust_domain_name().to_owned()).unwrap_or_default(),
            started_at: sidecar.started_at.unix_timestamp(),
            facts: facts.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
            refused: t.refused_counts().into_iter().collect(),
            identities: identities.collect(),
            plaintext_peers: peers.collect(),
            plaintext_peers_forgotten: plaintext.forgotten,
        }))
    }
}
