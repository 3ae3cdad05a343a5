//! This host's network, by rtnetlink.
//!
//! - [`netlink`]: connections, and the stream of events with resynchronisation.
//! - [`host`]: links and addresses as they are.
//! - `local`: what else the kernel takes for itself.
//! - [`underlay`]: next hops towards tunnel endpoints, resolved ahead of traffic and followed.
//! - `path_mtu`: what the kernel learns of smaller paths.
//! - [`device`]: the kernel's tunnel device, the slow path.
//! - [`firewall`]: keeps the slow path from undoing what the fast path protects.
//! - [`sysctl`]: what forwarding needs of the kernel's settings.

pub mod device;
pub mod firewall;
pub mod host;
mod local;
pub mod netlink;
mod path_mtu;
pub mod sysctl;
pub mod underlay;

use std::net::Ipv4Addr;

use rtnetlink::packet_route::route::{RouteAddress, RouteProtocol};

/// Mark of routes and neighbours that this gateway made (`rtm_protocol`; `ip route` shows it as `proto 103`). Free
/// in iproute2's list of protocols.
pub const PROTOCOL: RouteProtocol = RouteProtocol::Other(103);

fn ipv4(address: &RouteAddress) -> Option<Ipv4Addr> {
    match address {
        RouteAddress::Inet(address) => Some(*address),
        _ => None,
    }
}
