//! rtnetlink connections and events.

use std::io;

use futures::{StreamExt as _, TryStreamExt as _};
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, MulticastGroup,
    packet_core::NetlinkPayload,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{NeighbourAttribute, NeighbourExtFlags, NeighbourMessage},
        route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
    },
    sys::AsyncSocket as _,
};
use tokio::sync::mpsc;
use tracing::warn;

use super::{PROTOCOL, ipv4, path_mtu};

/// Room for a burst of events while the daemon is busy; when it is full, the kernel tells so and everything is read
/// anew.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Events that wait for a busy daemon; when there are more, it is told that events were lost.
const QUEUE: usize = 4096;

/// Our own changes are told like anybody's: so long is waited for the last of them before somebody looks.
const CALM: std::time::Duration = std::time::Duration::from_millis(200);

/// Pause before a broken connection is opened again.
const RECONNECT_PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

/// A netlink request failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {}", explain(source))]
pub struct NetlinkError {
    action: String,
    source: Cause,
}

#[derive(Debug, thiserror::Error)]
#[error(transparent)]
enum Cause {
    Request(rtnetlink::Error),
    Socket(io::Error),
}

impl NetlinkError {
    /// Adds to an error what was tried: `add the route 10.0.0.0/24`.
    pub fn new(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let action = action.into();
        |error| Self { action, source: Cause::Request(error) }
    }

    /// The same for a socket that cannot be made.
    pub(super) fn socket(error: io::Error) -> Self {
        Self { action: "open a netlink connection".to_owned(), source: Cause::Socket(error) }
    }

    /// The kernel's error number, positive.
    pub fn errno(&self) -> Option<i32> {
        errno(&self.source)
    }
}

fn errno(error: &Cause) -> Option<i32> {
    match error {
        Cause::Request(rtnetlink::Error::NetlinkError(message)) => Some(message.raw_code().abs()),
        Cause::Request(_) => None,
        Cause::Socket(error) => error.raw_os_error(),
    }
}

fn explain(error: &Cause) -> String {
    match errno(error) {
        Some(libc::EPERM) => "not permitted (root, or CAP_NET_ADMIN, is needed)".to_owned(),
        Some(code) => io::Error::from_raw_os_error(code).to_string(),
        None => error.to_string(),
    }
}

/// What changed on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A link came, went or changed.
    Links,
    /// An IPv4 address came or went, or a prefix that the kernel takes for itself.
    Addresses,
    /// An IPv4 route to this prefix came, went or changed; not one of ours.
    Route(Ipv4Net),
    /// A path MTU was learnt or forgotten.
    PathMtu,
    /// An IPv4 neighbour came or changed.
    Neighbour(NeighbourMessage),
    /// An IPv4 neighbour went.
    NeighbourGone(NeighbourMessage),
    /// Events were lost: read everything anew.
    Lost,
}

/// Opens a connection for requests.
///
/// # Errors
///
/// The socket cannot be made.
pub fn connect() -> io::Result<Handle> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    Ok(handle)
}

/// Lists the IPv4 routes of a table of which what else is set in the header holds. A router may have a million others.
pub(super) async fn routes(
    table: u8,
    filter: impl FnOnce(&mut RouteHeader),
) -> Result<Vec<RouteMessage>, NetlinkError> {
    let handle = connect_filtering().map_err(NetlinkError::socket)?;
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet;
    request.header.table = table;
    filter(&mut request.header);
    let listed = handle.route().get(request).execute().try_collect().await;
    match listed.map_err(NetlinkError::new("list routes")) {
        // Nothing made the table yet.
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(Vec::new()),
        listed => listed,
    }
}

/// Opens a connection for listings that the kernel filters by the header of the request (`NETLINK_GET_STRICT_CHK`, Linux
/// 4.20): everything else in that header must be zero.
pub(super) fn connect_filtering() -> io::Result<Handle> {
    let (mut connection, handle, _) = rtnetlink::new_connection()?;
    connection.socket_mut().socket_mut().set_netlink_get_strict_chk(true)?;
    tokio::spawn(connection);
    Ok(handle)
}

/// What rtnetlink tells.
#[derive(Debug)]
pub struct Subscription {
    /// What concerns next hops and this host.
    pub events: mpsc::Receiver<Event>,
    /// An entry of the slow path changed, whoever did it; told once for all that happens in a moment.
    pub slow_path: mpsc::Receiver<()>,
}

/// Subscribes to links, IPv4 addresses, routes and neighbours. The stream never ends: a broken or overrun connection
/// is opened again and reported as [`Event::Lost`].
///
/// # Errors
///
/// The first socket cannot be made.
pub fn subscribe() -> io::Result<Subscription> {
    let (sender, events) = mpsc::channel(QUEUE);
    let (touched, mut touches) = mpsc::channel(1);
    let (calm, slow_path) = mpsc::channel(1);
    let first = open()?;
    tokio::spawn(path_mtu::watch(sender.clone()));
    tokio::spawn(async move {
        while touches.recv().await.is_some() {
            tokio::time::sleep(CALM).await;
            let _ = touches.try_recv();
            if calm.send(()).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        let mut messages = Some(first);
        while !sender.is_closed() {
            if let Some(mut stream) = messages.take() {
                pass_on(&mut stream, &sender, &touched).await;
                warn!("the netlink connection broke; opening it again");
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
            match open() {
                Ok(stream) => messages = Some(stream),
                Err(error) => warn!(%error, "cannot open a netlink connection"),
            }
            if messages.is_some() && sender.send(Event::Lost).await.is_err() {
                return;
            }
        }
    });
    Ok(Subscription { events, slow_path })
}

/// Passes events on until the stream or the receiver ends. A receiver that is too busy loses events, and is told.
async fn pass_on(messages: &mut Messages, sender: &mpsc::Sender<Event>, touched: &mpsc::Sender<()>) {
    let mut lost = false;
    loop {
        let message = tokio::select! {
            permit = sender.reserve(), if lost => {
                let Ok(permit) = permit else { return };
                permit.send(Event::Lost);
                lost = false;
                continue;
            }
            message = messages.next() => message,
        };
        let Some((message, _)) = message else { return };
        if is_of_the_slow_path(&message.payload) {
            // One that waits already stands for this one too.
            let _ = touched.try_send(());
        }
        let Some(event) = event(message.payload) else { continue };
        match sender.try_send(event) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => lost = true,
            Err(mpsc::error::TrySendError::Closed(_)) => return,
        }
    }
}

type Messages = futures::channel::mpsc::UnboundedReceiver<(
    rtnetlink::packet_core::NetlinkMessage<RouteNetlinkMessage>,
    rtnetlink::sys::SocketAddr,
)>;

fn open() -> io::Result<Messages> {
    let groups =
        [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv4Route, MulticastGroup::Neigh];
    let (mut connection, _, messages) = rtnetlink::new_multicast_connection(&groups)?;
    // A smaller buffer only means that events are lost, and noticed, sooner.
    let _ = connection.socket_mut().socket_mut().set_rx_buf_sz(RECEIVE_BUFFER);
    tokio::spawn(connection);
    Ok(messages)
}

fn event(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<Event> {
    let message = match payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(Event::Lost),
        _ => return None,
    };
    match message {
        RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => Some(Event::Links),
        RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Some(Event::Addresses),
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)
            if route.header.kind == RouteType::Local =>
        {
            Some(Event::Addresses)
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            (!is_ours(&route)).then(|| Event::Route(destination(&route)))
        }
        RouteNetlinkMessage::NewNeighbour(neighbour) if is_ipv4(&neighbour) => {
            Some(Event::Neighbour(neighbour))
        }
        RouteNetlinkMessage::DelNeighbour(neighbour) if is_ipv4(&neighbour) => {
            Some(Event::NeighbourGone(neighbour))
        }
        _ => None,
    }
}

/// Whether a message is about what the gateway keeps on its tunnel devices: routes and neighbours by their protocol (but
/// not the neighbours of the underlay, which are managed), and forwarding entries of VXLAN devices.
fn is_of_the_slow_path(payload: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
    let NetlinkPayload::InnerMessage(message) = payload else { return false };
    match message {
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => is_ours(route),
        RouteNetlinkMessage::NewNeighbour(entry) | RouteNetlinkMessage::DelNeighbour(entry) => {
            let has = |wanted: fn(&NeighbourAttribute) -> bool| entry.attributes.iter().any(wanted);
            match entry.header.family {
                AddressFamily::Inet => {
                    has(|attribute| *attribute == NeighbourAttribute::Protocol(PROTOCOL))
                        && !has(|attribute| {
                            matches!(attribute, NeighbourAttribute::ExtFlags(flags)
                                if flags.contains(NeighbourExtFlags::Managed))
                        })
                }
                AddressFamily::Bridge => {
                    has(|attribute| matches!(attribute, NeighbourAttribute::Destination(_)))
                }
                _ => false,
            }
        }
        _ => false,
    }
}

fn is_ours(route: &RouteMessage) -> bool {
    route.header.protocol == PROTOCOL
}

/// The prefix that a route is to; what cannot be told is any.
pub(super) fn destination(route: &RouteMessage) -> Ipv4Net {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ipv4(address),
        _ => None,
    });
    let length = route.header.destination_prefix_length;
    address.and_then(|address| Ipv4Net::new(address, length).ok()).unwrap_or_default()
}

fn is_ipv4(neighbour: &NeighbourMessage) -> bool {
    neighbour.header.family == AddressFamily::Inet
}
