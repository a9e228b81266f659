//! One handshake with ourselves before the sidecar is ready: the crypto library gathers entropy and builds tables on
//! first use, and no caller should wait for that.

use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection};

use crate::identity::Identity;

/// Does a handshake in memory. A failure is only logged here; it would affect every connection too.
pub fn warm_up(identity: &Identity) {
    if let Err(error) = handshake(identity) {
        tracing::error!(%error, "cannot shake hands with ourselves; is our own SVID signed by our own bundle?");
    }
}

fn handshake(identity: &Identity) -> Result<(), Box<dyn std::error::Error>> {
    let own = [identity.svid().id().to_string()].into();
    let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let mut client = ClientConnection::new(identity.client(&own)?, name)?;
    let mut server = ServerConnection::new(Arc::clone(&identity.server()))?;
    while client.is_handshaking() || server.is_handshaking() {
        let mut wire = vec![];
        while client.wants_write() {
            client.write_tls(&mut wire)?;
        }
        let mut read = &wire[..];
        while !read.is_empty() {
            server.read_tls(&mut read)?;
            server.process_new_packets()?;
        }
        let mut wire = vec![];
        while server.wants_write() {
            server.write_tls(&mut wire)?;
        }
        let mut read = &wire[..];
        while !read.is_empty() {
            client.read_tls(&mut read)?;
            client.process_new_packets()?;
        }
    }
    Ok(())
}
