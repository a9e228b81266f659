//! A virtual switch in its own network namespace, with other namespaces connected to it: the network of a mesh on one
//! machine.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use futures::TryStreamExt;
use rtnetlink::{AddressMessageBuilder, Handle, LinkBridge, LinkUnspec, LinkVeth};

use crate::netns::NetNs;

const BRIDGE: &str = "switch";
/// Name of the network interface inside a connected namespace.
pub const INTERFACE: &str = "eth0";

/// The namespace that holds the switch.
pub struct Bridge(NetNs);

/// Addresses of a connected namespace.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// IPv4 address and prefix length.
    pub v4: (Ipv4Addr, u8),
    /// IPv6 address and prefix length; `None` for no IPv6.
    pub v6: Option<(Ipv6Addr, u8)>,
}

impl Bridge {
    /// Creates the namespace and its switch. Removes the namespace again on failure.
    pub fn create(name: &str) -> io::Result<Self> {
        let ns = NetNs::create(name)?;
        let built = ns.run(|| {
            with_netlink(async |netlink| {
                netlink.link().add(LinkBridge::new(BRIDGE).up().build()).execute().await.map_err(io::Error::other)
            })
        });
        if let Err(error) = built {
            // The first error says more; what stays is removed by whoever tidies up.
            let _ = ns.remove();
            return Err(error);
        }
        Ok(Self(ns))
    }

    /// The bridge with this name, whether or not it exists.
    pub fn named(name: &str) -> Self {
        Self(NetNs::named(name))
    }

    /// The namespace of the switch.
    pub fn netns(&self) -> &NetNs {
        &self.0
    }

    /// Creates a namespace and connects it. `port` names the switch's end of the link, at most 15 bytes.
    pub fn plug(&self, name: &str, port: &str, addresses: Addresses) -> io::Result<NetNs> {
        let ns = NetNs::create(name)?;
        let plugged = self.cable(&ns, port).and_then(|()| ns.run(move || configure(addresses)));
        if let Err(error) = plugged {
            // The first error says more; what stays is removed by whoever tidies up.
            let _ = ns.remove();
            return Err(error);
        }
        Ok(ns)
    }

    fn cable(&self, ns: &NetNs, port: &str) -> io::Result<()> {
        let (target, port) = (ns.open()?, port.to_owned());
        self.0.run(move || {
            with_netlink(async |netlink| {
                let other = format!("{port}~");
                netlink.link().add(LinkVeth::new(&port, &other).build()).execute().await.map_err(io::Error::other)?;
                let bridge = index(&netlink, BRIDGE).await?;
                let (near, far) = (index(&netlink, &port).await?, index(&netlink, &other).await?);
                let set = |message| netlink.link().set(message).execute();
                set(LinkUnspec::new_with_index(near).controller(bridge).up().build())
                    .await
                    .map_err(io::Error::other)?;
                let moved = LinkUnspec::new_with_index(far).name(INTERFACE).setns_by_fd(target.as_raw_fd()).build();
                set(moved).await.map_err(io::Error::other)
            })
        })
    }

    /// Disconnects and removes a namespace. It need not exist.
    pub fn unplug(&self, ns: &NetNs, port: &str) -> io::Result<()> {
        let port = port.to_owned();
        if self.0.path().exists() {
            // The link's other end may outlive the name of its namespace, as long as a process runs there.
            let _ = self.0.run(move || {
                with_netlink(async |netlink| {
                    let near = index(&netlink, &port).await?;
                    netlink.link().del(near).execute().await.map_err(io::Error::other)
                })
            });
        }
        ns.remove()
    }
}

/// Assigns addresses to this namespace's interface, and enables it and the loopback.
fn configure(addresses: Addresses) -> io::Result<()> {
    // Without a wait for duplicates: the bridge gives each address once. Where it cannot be set, an address comes a second later.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/eth0/accept_dad", "0");
    with_netlink(async |netlink| {
        let eth0 = index(&netlink, INTERFACE).await?;
        for name in ["lo", INTERFACE] {
            let link = index(&netlink, name).await?;
            netlink
                .link()
                .set(LinkUnspec::new_with_index(link).up().build())
                .execute()
                .await
                .map_err(io::Error::other)?;
        }
        let (address, prefix) = addresses.v4;
        let v4 = AddressMessageBuilder::<Ipv4Addr>::new().index(eth0).address(address, prefix).build();
        let mut add = netlink.address().add(eth0, address.into(), prefix);
        *add.message_mut() = v4;
        add.execute().await.map_err(io::Error::other)?;
        if let Some((address, prefix)) = addresses.v6 {
            netlink.address().add(eth0, address.into(), prefix).execute().await.map_err(io::Error::other)?;
        }
        Ok(())
    })
}

async fn index(netlink: &Handle, name: &str) -> io::Result<u32> {
    let mut links = netlink.link().get().match_name(name).execute();
    let link = links.try_next().await.map_err(io::Error::other)?;
    link.map(|l| l.header.index).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no link `{name}`")))
}

/// Runs `work` with a netlink connection to this thread's namespace.
fn with_netlink<T>(work: impl AsyncFnOnce(Handle) -> io::Result<T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = tokio::spawn(connection);
        let result = work(handle).await;
        connection.abort();
        result
    })
}
