//! PROXY protocol version 2 for the app: the caller's address and identity before the connection's bytes
//! (<https://www.haproxy.org/download/2.9/doc/proxy-protocol.txt>, section 2.2).

use std::net::{IpAddr, SocketAddr};

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// TLV type of the caller's SPIFFE ID, as text. Types 0xE0 to 0xEF are reserved for applications (section 2.2.7).
pub const TYPE_SPIFFE_ID: u8 = 0xE0;

/// The header in bytes. `spiffe_id` is the caller's verified identity; `None` for a plaintext caller.
pub fn header(source: SocketAddr, destination: SocketAddr, spiffe_id: Option<&str>) -> Vec<u8> {
    let mut body = Vec::with_capacity(64);
    let family = match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            body.extend(source.octets());
            body.extend(destination.octets());
            TCP_OVER_IPV4
        }
        // Both addresses have the same family on the wire; if they ever differ, IPv4 is mapped into IPv6.
        (source, destination) => {
            body.extend(as_v6(source));
            body.extend(as_v6(destination));
            TCP_OVER_IPV6
        }
    };
    body.extend(source.port().to_be_bytes());
    body.extend(destination.port().to_be_bytes());
    // An ID has at most 2,048 bytes (SPIFFE-ID 2.3).
    if let Some((id, length)) = spiffe_id.and_then(|id| Some((id, u16::try_from(id.len()).ok()?))) {
        body.push(TYPE_SPIFFE_ID);
        body.extend(length.to_be_bytes());
        body.extend(id.as_bytes());
    }
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    [&SIGNATURE[..], &[PROXY, family], &length.to_be_bytes(), &body].concat()
}

fn as_v6(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_what_the_specification_draws() {
        let (a, b) = ("10.0.0.1:4660".parse().unwrap(), "10.0.0.2:80".parse().unwrap());
        let bytes = header(a, b, Some("spiffe://td/a"));
        assert_eq!(bytes[..12], [0x0D, 0x0A, 0x0D, 0x0A, 0x00, 0x0D, 0x0A, 0x51, 0x55, 0x49, 0x54, 0x0A]);
        assert_eq!(bytes[12..16], [0x21, 0x11, 0, 12 + 3 + 13]);
        assert_eq!(bytes[16..28], [10, 0, 0, 1, 10, 0, 0, 2, 0x12, 0x34, 0, 80]);
        assert_eq!(bytes[28..31], [0xE0, 0, 13]);
        assert_eq!(&bytes[31..], b"spiffe://td/a");
        let (a, b) = ("[fd00::1]:1".parse().unwrap(), "[fd00::2]:2".parse().unwrap());
        let bytes = header(a, b, None);
        assert_eq!((bytes[13], bytes[14..16].to_vec(), bytes.len()), (0x21, vec![0, 36], 16 + 36));
    }
}
