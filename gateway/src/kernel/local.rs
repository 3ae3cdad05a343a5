//! What the kernel takes for itself by routes of type local, besides the addresses of its devices: single addresses and
//! whole prefixes, as anycast services and transparent proxies have them (`ip route add local 198.51.100.0/24 dev lo`).

use std::collections::BTreeSet;

use ipnet::Ipv4Net;
use rtnetlink::packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteType};

use super::netlink::{NetlinkError, destination, routes};

/// Prefixes and the devices that they are of. The loopback network is left out: nothing comes from the wire for it.
pub(super) async fn read() -> Result<BTreeSet<(Ipv4Net, u32)>, NetlinkError> {
    let local = |header: &mut RouteHeader| header.kind = RouteType::Local;
    let found = routes(libc::RT_TABLE_LOCAL, local).await?;
    Ok(found.iter().map(prefix).filter(|(net, _)| !net.addr().is_loopback()).collect())
}

fn prefix(route: &RouteMessage) -> (Ipv4Net, u32) {
    let device = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    (destination(route), device.unwrap_or_default())
}
