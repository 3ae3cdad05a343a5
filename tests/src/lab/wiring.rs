//! Wires and tables of a host, by rtnetlink from inside its namespace.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};
use gateway_common::wire::Mac;
use ipnet::Ipv4Net;
use netlink_packet_route::{
    AddressFamily,
    link::{BridgeStpState, InfoData, InfoVeth},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{RouteProtocol, RouteScope},
};
use nix::net::if_::if_nametoindex;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan, RouteMessageBuilder,
    new_connection,
};

use super::netns::Namespace;

/// One end of a veth pair.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// Namespace it lies in.
    pub namespace: &'a Namespace,
    /// Interface name.
    pub name: &'a str,
    /// MAC address; the kernel's choice if `None`.
    pub mac: Option<Mac>,
    /// Largest IP packet.
    pub mtu: u32,
}

/// A VXLAN device as flannel makes it.
#[derive(Clone, Copy, Debug)]
pub struct Vxlan<'a> {
    /// Name of the device.
    pub name: &'a str,
    /// Network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Underlay interface.
    pub underlay: &'a str,
    /// Underlay address, the outer source.
    pub local: Ipv4Addr,
    /// The VTEP's MAC address.
    pub mac: Mac,
    /// Largest inner IP packet.
    pub mtu: u32,
}

/// How a packet gets to the destination of a route.
#[derive(Clone, Copy, Debug)]
pub enum Via<'a> {
    /// The destination is on the interface's link.
    Link(&'a str),
    /// Through a router that an address of this host makes reachable.
    Router(Ipv4Addr),
    /// Through a router taken to be on the interface's link although no address says so, as flannel's routes are.
    Onlink(&'a str, Ipv4Addr),
}

/// Joins two namespaces by a veth pair; both ends are up.
pub fn veth(a: End<'_>, b: End<'_>) -> Result<()> {
    let mut peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(b.name)
        .mtu(b.mtu)
        .setns_by_fd(b.namespace.file().as_raw_fd());
    if let Some(mac) = b.mac {
        peer = peer.address(mac.octets.to_vec());
    }
    let mut link =
        LinkVeth::new(a.name, b.name).mtu(a.mtu).set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())));
    if let Some(mac) = a.mac {
        link = link.address(mac.octets.to_vec());
    }
    netlink(a.namespace, &format!("veth {} to {} {}", a.name, b.namespace.name(), b.name), async |handle| {
        Ok(handle.link().add(link.build()).execute().await?)
    })?;
    up(a.namespace, a.name)?;
    up(b.namespace, b.name)
}

/// Makes a bridge that is up, without spanning tree and multicast snooping.
pub fn bridge(namespace: &Namespace, name: &str, mtu: u32) -> Result<()> {
    netlink(namespace, &format!("bridge {name}"), async |handle| {
        let bridge =
            LinkBridge::new(name).mtu(mtu).stp_state(BridgeStpState::Disabled).mcast_snooping(false).build();
        Ok(handle.link().add(bridge).execute().await?)
    })
}

/// Makes `port` a port of `bridge`.
pub fn enslave(namespace: &Namespace, port: &str, bridge: &str) -> Result<()> {
    netlink(namespace, &format!("port {port} of {bridge}"), async |handle| {
        let message = LinkUnspec::new_with_index(index(port)?).controller(index(bridge)?).build();
        Ok(handle.link().set(message).execute().await?)
    })
}

/// Makes a VXLAN device that is up: no learning, no multicast group, checksums and TTL by the kernel's defaults.
pub fn vxlan(namespace: &Namespace, device: Vxlan<'_>) -> Result<()> {
    netlink(namespace, &format!("vxlan {}", device.name), async |handle| {
        let link = LinkVxlan::new(device.name, device.vni)
            .dev(index(device.underlay)?)
            .local(device.local)
            .port(device.port)
            .learning(false)
            .address(device.mac.octets.to_vec())
            .mtu(device.mtu)
            .up()
            .build();
        Ok(handle.link().add(link).execute().await?)
    })
}

/// Sets the interface up.
pub fn up(namespace: &Namespace, name: &str) -> Result<()> {
    netlink(namespace, &format!("{name} up"), async |handle| {
        Ok(handle.link().set(LinkUnspec::new_with_index(index(name)?).up().build()).execute().await?)
    })
}

/// Deletes the interface, and the other end if it is one of a veth pair.
pub fn delete(namespace: &Namespace, name: &str) -> Result<()> {
    netlink(namespace, &format!("delete {name}"), async |handle| {
        Ok(handle.link().del(index(name)?).execute().await?)
    })
}

/// Gives the interface an address.
pub fn address(namespace: &Namespace, name: &str, address: Ipv4Net) -> Result<()> {
    netlink(namespace, &format!("address {address} on {name}"), async |handle| {
        let request = handle.address().add(index(name)?, IpAddr::V4(address.addr()), address.prefix_len());
        Ok(request.execute().await?)
    })
}

/// Adds a route; one to the same destination is replaced.
pub fn route(namespace: &Namespace, destination: Ipv4Net, via: Via<'_>) -> Result<()> {
    netlink(namespace, &format!("route {destination} {via:?}"), async |handle| {
        Ok(handle.route().add(route_message(destination, via)?.build()).replace().execute().await?)
    })
}

/// Deletes the route that [`route`] added.
pub fn delete_route(namespace: &Namespace, destination: Ipv4Net, via: Via<'_>) -> Result<()> {
    netlink(namespace, &format!("delete route {destination} {via:?}"), async |handle| {
        Ok(handle.route().del(route_message(destination, via)?.build()).execute().await?)
    })
}

/// Adds or changes a permanent neighbour: `ip neigh replace ADDRESS lladdr MAC dev NAME nud permanent`.
pub fn neighbour(namespace: &Namespace, name: &str, address: Ipv4Addr, mac: Mac) -> Result<()> {
    netlink(namespace, &format!("neighbour {address} on {name}"), async |handle| {
        let request = handle.neighbours().add(index(name)?, IpAddr::V4(address));
        let request = request.state(NeighbourState::Permanent).link_layer_address(&mac.octets);
        Ok(request.replace().execute().await?)
    })
}

/// Deletes a neighbour.
pub fn delete_neighbour(namespace: &Namespace, name: &str, address: Ipv4Addr) -> Result<()> {
    netlink(namespace, &format!("delete neighbour {address} on {name}"), async |handle| {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index(name)?;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(address)));
        Ok(handle.neighbours().del(message).execute().await?)
    })
}

/// Adds or changes a permanent forwarding entry of a VXLAN device:
/// `bridge fdb replace MAC dev NAME dst ENDPOINT self permanent`.
pub fn fdb(namespace: &Namespace, name: &str, mac: Mac, endpoint: Ipv4Addr) -> Result<()> {
    netlink(namespace, &format!("FDB {mac:?} on {name}"), async |handle| {
        let request = handle.neighbours().add_bridge(index(name)?, &mac.octets);
        let request = request.destination(IpAddr::V4(endpoint));
        let request = request.state(NeighbourState::Permanent).flags(NeighbourFlags::Own);
        Ok(request.replace().execute().await?)
    })
}

/// Deletes the entry that [`fdb`] added.
pub fn delete_fdb(namespace: &Namespace, name: &str, mac: Mac, endpoint: Ipv4Addr) -> Result<()> {
    netlink(namespace, &format!("delete FDB {mac:?} on {name}"), async |handle| {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index(name)?;
        message.header.flags = NeighbourFlags::Own;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets.to_vec()));
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(endpoint)));
        Ok(handle.neighbours().del(message).execute().await?)
    })
}

/// Sets `net.<key>`; `/` parts the key, as interface names may contain dots.
pub fn sysctl(namespace: &Namespace, key: &str, value: &str) -> Result<()> {
    namespace.enter(|| {
        let path = sysctl_path(key);
        fs::write(&path, value)
            .with_context(|| format!("cannot set {} to {value} in {}", path.display(), namespace.name()))
    })
}

/// Whether the kernel has `net.<key>`.
pub fn has_sysctl(namespace: &Namespace, key: &str) -> Result<bool> {
    namespace.enter(|| Ok(sysctl_path(key).exists()))
}

fn sysctl_path(key: &str) -> PathBuf {
    Path::new("/proc/sys/net").join(key)
}

fn route_message(destination: Ipv4Net, via: Via<'_>) -> Result<RouteMessageBuilder<Ipv4Addr>> {
    let message = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(destination.addr(), destination.prefix_len())
        // What `ip route add` and flanneld leave there.
        .protocol(RouteProtocol::Boot);
    Ok(match via {
        Via::Link(name) => message.output_interface(index(name)?).scope(RouteScope::Link),
        Via::Router(router) => message.gateway(router),
        Via::Onlink(name, router) => message.output_interface(index(name)?).gateway(router).onlink(),
    })
}

fn index(name: &str) -> Result<u32> {
    if_nametoindex(name).map_err(|errno| anyhow!("interface {name}: {errno}"))
}

/// Runs one netlink conversation inside the namespace; `what` names it in errors.
pub(super) fn netlink<T: Send>(
    namespace: &Namespace,
    what: &str,
    talk: impl AsyncFnOnce(Handle) -> Result<T> + Send,
) -> Result<T> {
    namespace
        .enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let (connection, handle, _) = new_connection()?;
                tokio::spawn(connection);
                talk(handle).await
            })
        })
        .with_context(|| format!("{}: {what}", namespace.name()))
}
