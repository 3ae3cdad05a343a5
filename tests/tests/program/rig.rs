//! A network namespace whose FIB the program asks: interfaces, routes and neighbours, and the same as a model.

use std::{collections::BTreeMap, fs, net::IpAddr, panic, thread};

use gateway_common::{
    engine::Fib,
    model::FibEntry,
    wire::{Ipv4, Mac},
};
use netlink_packet_route::route::{RouteScope, RouteType};
use nix::{
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder, new_connection};

use crate::packet::Address;

/// An interface of the gateway host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Port {
    pub(crate) name: &'static str,
    pub(crate) index: u32,
    /// Index of the other end.
    pub(crate) peer: u32,
    pub(crate) mac: Mac,
    pub(crate) mtu: u16,
}

/// The interfaces, each one end of a veth pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    /// The interface of the program under test; takes jumbo frames.
    pub(crate) own: Port,
    /// Another interface that the gateway drives.
    pub(crate) second: Port,
    /// Stands for a VLAN device of `second`.
    pub(crate) vlan: Port,
    /// Not driven by the gateway.
    pub(crate) foreign: Port,
    /// Driven, but not external.
    pub(crate) inside: Port,
    /// Stands for the kernel's tunnel device.
    pub(crate) tunnel: Port,
    /// Does not forward.
    pub(crate) still: Port,
}

const fn mac(last: u8) -> Mac {
    Mac::new([0x52, 0x54, 0, 0, 0, last])
}

/// Clients and other destinations; see [`destinations`] for how they are reached.
pub(crate) const CLIENT: Address = [10, 244, 30, 15];
pub(crate) const CLIENT_MAC: Mac = mac(0xc1);
pub(crate) const CLIENT_SAME_PORT: Address = [10, 244, 30, 16];
pub(crate) const CLIENT_SAME_PORT_MAC: Mac = mac(0xc2);
pub(crate) const CLIENT_IN_VLAN: Address = [10, 244, 30, 17];
pub(crate) const CLIENT_IN_VLAN_MAC: Mac = mac(0xc3);
pub(crate) const UNRESOLVED: Address = [10, 244, 30, 18];
pub(crate) const BEHIND_FOREIGN: Address = [10, 244, 30, 19];
pub(crate) const BEHIND_TUNNEL: Address = [10, 244, 30, 20];
pub(crate) const BEHIND_INSIDE: Address = [10, 244, 30, 21];
pub(crate) const BLACKHOLE: Address = [10, 244, 30, 22];
pub(crate) const UNREACHABLE: Address = [10, 244, 30, 23];
pub(crate) const PROHIBITED: Address = [10, 244, 30, 24];
/// Behind a router, which is `CLIENT`.
pub(crate) const FAR_AWAY: Address = [198, 51, 100, 7];
/// The gateway's own, on `own`.
pub(crate) const GATEWAY: Address = [10, 244, 30, 1];
/// Underlay address, on `own`: the VTEP of overlays 0, 1 and 3.
pub(crate) const UNDERLAY: Address = [172, 16, 2, 200];
/// Another address of the host that is no VTEP.
pub(crate) const UNDERLAY_OTHER: Address = [172, 16, 2, 201];
/// The VTEP of overlay 2.
pub(crate) const UNDERLAY_SECOND: Address = [172, 16, 2, 202];

enum Way {
    /// On the interface's link; with a permanent neighbour or without.
    Link(Port, Option<Mac>),
    /// By a router on the interface's link.
    Router(Port, Address, Mac),
    Refused(RouteType),
    Own(Port),
}

fn destinations(ports: &Ports) -> Vec<(Address, Way)> {
    vec![
        (CLIENT, Way::Link(ports.second, Some(CLIENT_MAC))),
        (CLIENT_SAME_PORT, Way::Link(ports.own, Some(CLIENT_SAME_PORT_MAC))),
        (CLIENT_IN_VLAN, Way::Link(ports.vlan, Some(CLIENT_IN_VLAN_MAC))),
        (UNRESOLVED, Way::Link(ports.second, None)),
        (BEHIND_FOREIGN, Way::Link(ports.foreign, Some(mac(0xc4)))),
        (BEHIND_TUNNEL, Way::Link(ports.tunnel, Some(mac(0xc5)))),
        (BEHIND_INSIDE, Way::Link(ports.inside, Some(mac(0xc6)))),
        (BLACKHOLE, Way::Refused(RouteType::BlackHole)),
        (UNREACHABLE, Way::Refused(RouteType::Unreachable)),
        (PROHIBITED, Way::Refused(RouteType::Prohibit)),
        (FAR_AWAY, Way::Router(ports.second, CLIENT, CLIENT_MAC)),
        (GATEWAY, Way::Own(ports.own)),
        (UNDERLAY, Way::Own(ports.own)),
        (UNDERLAY_OTHER, Way::Own(ports.own)),
        (UNDERLAY_SECOND, Way::Own(ports.own)),
    ]
}

/// Runs `work` in a thread with a network namespace of its own, which ends with it.
pub(crate) fn inside<T: Send>(work: impl FnOnce(Ports) -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("cannot make a network namespace; are you root?");
            work(build())
        });
        thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
    })
}

/// The FIB of [`inside`] as the model of the host engine has it.
pub(crate) fn model(ports: &Ports) -> BTreeMap<Ipv4, FibEntry> {
    let entry = |way: Way| match way {
        Way::Link(port, Some(next_hop)) | Way::Router(port, _, next_hop) => FibEntry {
            answer: Fib::Forward { ifindex: port.index, source: port.mac, next_hop, mtu: port.mtu },
            mtu: port.mtu,
        },
        Way::Link(port, None) => FibEntry { answer: Fib::NoNeighbour, mtu: port.mtu },
        Way::Refused(_) => FibEntry { answer: Fib::Refused, mtu: u16::MAX },
        Way::Own(_) => FibEntry { answer: Fib::NotForwarded, mtu: u16::MAX },
    };
    destinations(ports).into_iter().map(|(address, way)| (Ipv4::new(address), entry(way))).collect()
}

fn build() -> Ports {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (connection, handle, _) = new_connection().unwrap();
        tokio::spawn(connection);
        let ports = Ports {
            own: port(&handle, "own", mac(0x01), 9000).await,
            second: port(&handle, "second", mac(0x02), 1500).await,
            vlan: port(&handle, "vlan", mac(0x03), 1500).await,
            foreign: port(&handle, "foreign", mac(0x04), 1500).await,
            inside: port(&handle, "inside", mac(0x05), 1500).await,
            tunnel: port(&handle, "tunnel", mac(0x06), 1450).await,
            still: port(&handle, "still", mac(0x07), 1500).await,
        };
        // An interface routes only after it got its first address.
        for (last, port) in
            (1..).zip([ports.second, ports.vlan, ports.foreign, ports.inside, ports.tunnel, ports.still])
        {
            address(&handle, port, [192, 0, 2, last]).await;
            fs::write(format!("/proc/sys/net/ipv4/conf/{}/forwarding", port.name), "1").unwrap();
        }
        fs::write("/proc/sys/net/ipv4/conf/own/forwarding", "1").unwrap();
        fs::write("/proc/sys/net/ipv4/conf/still/forwarding", "0").unwrap();
        for (destination, way) in destinations(&ports) {
            reach(&handle, destination, way).await;
        }
        ports
    })
}

async fn port(handle: &Handle, name: &'static str, mac: Mac, mtu: u16) -> Port {
    let peer = format!("{name}-peer");
    let link = LinkVeth::new(name, &peer).address(mac.octets.to_vec()).mtu(mtu.into()).up();
    handle.link().add(link.build()).execute().await.unwrap();
    let peer_index = if_nametoindex(peer.as_str()).unwrap();
    handle
        .link()
        .set(LinkUnspec::new_with_index(peer_index).mtu(mtu.into()).up().build())
        .execute()
        .await
        .unwrap();
    Port { name, index: if_nametoindex(name).unwrap(), peer: peer_index, mac, mtu }
}

async fn address(handle: &Handle, port: Port, address: Address) {
    handle.address().add(port.index, IpAddr::from(address), 32).execute().await.unwrap();
}

async fn neighbour(handle: &Handle, port: Port, address: Address, mac: Mac) {
    let request = handle.neighbours().add(port.index, IpAddr::from(address));
    request.link_layer_address(&mac.octets).replace().execute().await.unwrap();
}

async fn reach(handle: &Handle, destination: Address, way: Way) {
    let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(destination.into(), 32);
    let route = match way {
        Way::Own(port) => return address(handle, port, destination).await,
        Way::Link(port, next_hop) => {
            if let Some(mac) = next_hop {
                neighbour(handle, port, destination, mac).await;
            }
            route.output_interface(port.index).scope(RouteScope::Link)
        }
        Way::Router(port, router, mac) => {
            neighbour(handle, port, router, mac).await;
            route.output_interface(port.index).gateway(router.into()).onlink()
        }
        Way::Refused(kind) => route.kind(kind),
    };
    handle.route().add(route.build()).execute().await.unwrap();
}
