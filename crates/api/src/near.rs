//! Whose probes a listener must answer whoever else connects: the node's own addresses.
//!
//! The kubelet asks from the node: over loopback where the role shares its network, and else from the node's address, or from
//! that of the bridge, which is the pod's way out.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tracing::warn;

/// Names the node's address; the chart and the injector set it (`status.hostIP`).
const NODE: &str = "HOST_IP";
/// The kernel's table of IPv4 routes (proc(5)).
const ROUTES: &str = "/proc/net/route";
/// The kernel's table of IPv6 routes.
const ROUTES_6: &str = "/proc/net/ipv6_route";

/// The addresses of this process's node, as far as they are known.
#[derive(Debug, Clone, Default)]
pub struct Near(Vec<IpAddr>);

impl Near {
    /// By the environment and the routes of the moment.
    pub fn of_this_process() -> Self {
        let node = std::env::var(NODE).ok().and_then(|text| {
            let address = text.parse().ok();
            if address.is_none() {
                warn!(variable = NODE, "no IP address; the node's probes are told from strangers by loopback alone");
            }
            address
        });
        // Where there is no such table, there is no such network.
        let table = |path| std::fs::read_to_string(path).unwrap_or_default();
        let four = gateways(&table(ROUTES)).map(IpAddr::V4).collect::<Vec<_>>();
        let six = gateways_6(&table(ROUTES_6)).map(IpAddr::V6).collect::<Vec<_>>();
        Self(node.into_iter().chain(four).chain(six).collect())
    }

    /// Whether a connection from `peer` to our address `local` comes from this node.
    pub fn holds(&self, peer: IpAddr, local: IpAddr) -> bool {
        let (peer, local) = (peer.to_canonical(), local.to_canonical());
        peer.is_loopback() || peer == local || self.0.contains(&peer)
    }
}

/// The gateways of the default routes: numbers in hexadecimal, each in the order of the machine's bytes.
fn gateways(routes: &str) -> impl Iterator<Item = Ipv4Addr> {
    routes.lines().skip(1).filter_map(|line| {
        let mut columns = line.split_ascii_whitespace().skip(1);
        let (destination, gateway) = (columns.next()?, columns.next()?);
        let gateway = u32::from_str_radix(gateway, 16).ok().filter(|g| *g != 0)?;
        (destination == "00000000").then(|| Ipv4Addr::from(gateway.to_ne_bytes()))
    })
}

/// The gateways of the default routes: destination, length of its prefix, source, length, next hop; in hexadecimal.
fn gateways_6(routes: &str) -> impl Iterator<Item = Ipv6Addr> {
    routes.lines().filter_map(|line| {
        let mut columns = line.split_ascii_whitespace();
        let (destination, length, gateway) = (columns.next()?, columns.next()?, columns.nth(2)?);
        let gateway = u128::from_str_radix(gateway, 16).ok().filter(|g| *g != 0)?;
        (length == "00" && u128::from_str_radix(destination, 16) == Ok(0)).then(|| Ipv6Addr::from(gateway))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_is_loopback_our_own_address_its_name_and_the_way_out() {
        let head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n";
        let routes = format!("{head}eth0\t00000000\t{:08X}\t0003\n", u32::from_ne_bytes([10, 244, 1, 1]))
            + "eth0\t0001F40A\t00000000\t0001\neth0\t0002F40A\t0101F40A\t0003\nbroken\n";
        let found: Vec<_> = gateways(&routes).collect();
        assert_eq!(found, [Ipv4Addr::new(10, 244, 1, 1)]);
        let near = Near(vec!["192.0.2.7".parse().unwrap(), found[0].into()]);
        let own = "10.244.1.9".parse().unwrap();
        for peer in ["127.0.0.1", "::1", "10.244.1.9", "::ffff:10.244.1.9", "192.0.2.7", "10.244.1.1"] {
            assert!(near.holds(peer.parse().unwrap(), own), "{peer}");
        }
        assert!(!near.holds("10.244.1.8".parse().unwrap(), own));
        let zero = "0".repeat(32);
        let gateway = "fd000000000000000000000000000001";
        let routes = format!("{zero} 00 {zero} 00 {gateway} 00000400 00000001 00000000 00000003 eth0\n")
            + &format!("fd{} 40 {zero} 00 {zero} 00000100 00000001 00000000 00000001 eth0\n", "0".repeat(30))
            + &format!("{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\nbroken\n");
        assert_eq!(gateways_6(&routes).collect::<Vec<_>>(), ["fd00::1".parse::<Ipv6Addr>().unwrap()]);
    }
}
