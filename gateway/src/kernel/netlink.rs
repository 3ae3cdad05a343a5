//! rtnetlink connections and events.

use std::io;

use futures::StreamExt as _;
use rtnetlink::{
    Handle, MulticastGroup,
    packet_core::NetlinkPayload,
    packet_route::{AddressFamily, RouteNetlinkMessage, neighbour::NeighbourMessage, route::RouteMessage},
};
use tokio::sync::mpsc;
use tracing::warn;

use super::{PROTOCOL, path_mtu};

/// Room for a burst of events while the daemon is busy; when it is full, the kernel tells so and everything is read
/// anew.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Events that wait for a busy daemon; when there are more, it is told that events were lost.
const QUEUE: usize = 4096;

/// Pause before a broken connection is opened again.
const RECONNECT_PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

/// A netlink request failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {}", explain(source))]
pub struct NetlinkError {
    action: String,
    source: rtnetlink::Error,
}

impl NetlinkError {
    /// Adds to an error what was tried: `add the route 10.0.0.0/24`.
    pub fn new(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let action = action.into();
        |source| Self { action, source }
    }

    /// The kernel's error number, positive.
    pub fn errno(&self) -> Option<i32> {
        errno(&self.source)
    }
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(message.raw_code().abs()),
        _ => None,
    }
}

fn explain(error: &rtnetlink::Error) -> String {
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
    /// An IPv4 address came or went.
    Addresses,
    /// An IPv4 route came, went or changed, or its path MTU did; not one of ours.
    Routes,
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

/// Subscribes to links, IPv4 addresses, routes and neighbours. The stream never ends: a broken or overrun connection
/// is opened again and reported as [`Event::Lost`].
///
/// # Errors
///
/// The first socket cannot be made.
pub fn subscribe() -> io::Result<mpsc::Receiver<Event>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let first = open()?;
    tokio::spawn(path_mtu::watch(sender.clone()));
    tokio::spawn(async move {
        let mut messages = Some(first);
        while !sender.is_closed() {
            if let Some(mut stream) = messages.take() {
                pass_on(&mut stream, &sender).await;
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
    Ok(receiver)
}

/// Passes events on until the stream or the receiver ends. A receiver that is too busy loses events, and is told.
async fn pass_on(messages: &mut Messages, sender: &mpsc::Sender<Event>) {
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
    use rtnetlink::sys::AsyncSocket as _;

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
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            (!is_ours(&route)).then_some(Event::Routes)
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

fn is_ours(route: &RouteMessage) -> bool {
    route.header.protocol == PROTOCOL
}

fn is_ipv4(neighbour: &NeighbourMessage) -> bool {
    neighbour.header.family == AddressFamily::Inet
}
