//! Path MTUs that the kernel learnt from ICMP (RFC 1191): exceptions of its routes, of which no netlink event tells.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use futures::TryStreamExt as _;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        route::{RouteAttribute, RouteFlags, RouteMessage, RouteMetric},
    },
};
use tokio::{sync::mpsc::Sender, time::sleep};

use super::{
    ipv4,
    netlink::{Event, NetlinkError, connect_filtering},
};

/// How often the exceptions are read. Until then packets are sent that the path does not take, as a host does that
/// has not heard of it.
const INTERVAL: Duration = Duration::from_secs(2);

/// Destination and MTU in bytes of every exception.
type Exceptions = BTreeSet<(Ipv4Addr, u32)>;

/// Sends [`Event::PathMtu`] when an exception came, went or changed, for as long as somebody listens.
pub(super) async fn watch(events: Sender<Event>) {
    let mut connection: Option<Handle> = None;
    let mut known = Exceptions::new();
    while !events.is_closed() {
        let handle = match connection.take() {
            Some(handle) => handle,
            None => match connect_filtering() {
                Ok(handle) => handle,
                Err(error) => {
                    tracing::warn!(%error, "cannot open a netlink connection");
                    sleep(INTERVAL).await;
                    continue;
                }
            },
        };
        match read(&handle).await {
            Ok(now) => {
                connection = Some(handle);
                if now != known && events.send(Event::PathMtu).await.is_err() {
                    return;
                }
                known = now;
            }
            Err(error) => tracing::debug!(%error, "no path MTUs"),
        }
        sleep(INTERVAL).await;
    }
}

async fn read(handle: &Handle) -> Result<Exceptions, NetlinkError> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet;
    request.header.flags = RouteFlags::Cloned;
    let answers = handle.route().get(request).execute();
    answers
        .try_filter_map(async |route| Ok(exception(&route)))
        .try_collect()
        .await
        .map_err(NetlinkError::new("list path MTUs"))
}

fn exception(route: &RouteMessage) -> Option<(Ipv4Addr, u32)> {
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ipv4(address),
        _ => None,
    })?;
    let mtu = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => metrics.iter().find_map(|metric| match metric {
            RouteMetric::Mtu(mtu) => Some(*mtu),
            _ => None,
        }),
        _ => None,
    })?;
    Some((destination, mtu))
}
