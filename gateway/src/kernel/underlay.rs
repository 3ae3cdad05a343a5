//! Next hops towards tunnel endpoints, known before the first packet and followed while they change.
//!
//! For each endpoint the kernel's routing decision names device, gateway and path MTU; the neighbour table has the
//! gateway's (or the endpoint's) MAC address. The neighbours are marked as *managed* (`NTF_EXT_MANAGED`, Linux 5.16):
//! the kernel then resolves them without traffic and keeps them fresh.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use futures::TryStreamExt as _;
use gateway_common::{abi::Roles, wire::Mac};
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
            NeighbourState,
        },
        route::{RouteAttribute, RouteMessage, RouteMetric, RouteType},
    },
};

use super::{
    PROTOCOL,
    host::{Host, Link},
    ipv4,
    netlink::NetlinkError,
};
use crate::config::Config;

/// How an endpoint is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHop {
    /// Everything is known.
    Ready(ReadyHop),
    /// The kernel has not told yet. Says nothing against what was known before.
    Pending {
        /// What is waited for, for people.
        reason: String,
        /// What is known of the way already.
        way: Option<Way>,
    },
    /// The endpoint cannot be reached: why, for people.
    Unresolved(String),
}

impl NextHop {
    /// Why packets cannot be sent there, for people; `None` if they can.
    pub fn obstacle(&self) -> Option<&str> {
        match self {
            Self::Ready(_) => None,
            Self::Pending { reason, .. } | Self::Unresolved(reason) => Some(reason),
        }
    }
}

/// How frames leave towards an endpoint, whoever takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Device to send by; for VLAN devices the one below.
    pub ifindex: u32,
    /// VLAN id to tag with.
    pub vlan: Option<u16>,
    /// Our MAC address there.
    pub source: Mac,
    /// Largest IP packet of the path, bytes.
    pub mtu: u32,
}

/// A resolved next hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadyHop {
    /// Device to send by; for VLAN devices the one below.
    pub ifindex: u32,
    /// VLAN id to tag with.
    pub vlan: Option<u16>,
    /// Our MAC address there.
    pub source: Mac,
    /// MAC address of the gateway, or of the endpoint itself.
    pub destination: Mac,
    /// Largest IP packet of the path, bytes.
    pub mtu: u32,
    /// The endpoint is reached without a gateway.
    pub on_link: bool,
}

/// A tunnel: our address and the node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path {
    /// Outer source.
    pub local: Ipv4Addr,
    /// Outer destination.
    pub endpoint: Ipv4Addr,
}

/// The kernel's routing decision.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Route {
    Unicast {
        ifindex: u32,
        gateway: Option<Ipv4Addr>,
        mtu: Option<u32>,
    },
    /// The kernel could not be asked.
    Unknown(String),
    Unusable(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Neighbour {
    /// Address, if the entry may be used for sending.
    mac: Option<Mac>,
    managed: bool,
    permanent: bool,
    /// The kernel tried and got no answer.
    failed: bool,
}

type NeighbourKey = (u32, Ipv4Addr);

/// Next hops of all tunnels.
#[derive(Debug)]
pub struct Underlay {
    handle: Handle,
    routes: BTreeMap<Path, Route>,
    neighbours: BTreeMap<NeighbourKey, Neighbour>,
    /// Neighbours that were asked for; kept so that each is asked for once for as long as it lives.
    requested: BTreeSet<NeighbourKey>,
}

impl Underlay {
    /// Knows nothing yet.
    pub fn new(handle: Handle) -> Self {
        Self { handle, routes: BTreeMap::new(), neighbours: BTreeMap::new(), requested: BTreeSet::new() }
    }

    /// Reads the neighbour table anew, and asks for all routes again.
    ///
    /// # Errors
    ///
    /// The neighbour table cannot be read.
    pub async fn resync(&mut self) -> Result<(), NetlinkError> {
        self.neighbours = list(&self.handle).await?.iter().filter_map(neighbour).collect();
        self.requested.retain(|key| self.neighbours.contains_key(key));
        self.reroute().await;
        Ok(())
    }

    /// Asks the kernel for the route of every tunnel again.
    pub async fn reroute(&mut self) {
        let paths: Vec<Path> = self.routes.keys().copied().collect();
        for path in paths {
            let route = route(&self.handle, path).await;
            self.routes.insert(path, route);
        }
        self.resolve().await;
    }

    /// Whether the way to an endpoint may change with a route to this prefix. A router's other routes come and go by the
    /// thousand.
    pub fn concerns(&self, prefix: Ipv4Net) -> bool {
        self.routes.keys().any(|path| prefix.contains(&path.endpoint))
    }

    /// Follows these tunnels and forgets others.
    pub async fn track(&mut self, paths: &BTreeSet<Path>) {
        self.routes.retain(|path, _| paths.contains(path));
        for path in paths {
            if !self.routes.contains_key(path) {
                let route = route(&self.handle, *path).await;
                self.routes.insert(*path, route);
            }
        }
        self.resolve().await;
    }

    /// Notes a neighbour event. Tells whether a next hop may have changed by it.
    pub fn neighbour_event(&mut self, message: &NeighbourMessage, gone: bool) -> bool {
        let Some((key, state)) = neighbour(message) else { return false };
        let before = if gone {
            self.requested.remove(&key);
            self.neighbours.remove(&key)
        } else {
            self.neighbours.insert(key, state)
        };
        let visible = |state: Option<Neighbour>| state.map(|state| (state.mac, state.failed));
        let after = (!gone).then_some(state);
        visible(before) != visible(after) && self.needed().contains(&key)
    }

    /// Neighbours that the tunnels go through.
    fn needed(&self) -> BTreeSet<NeighbourKey> {
        self.routes
            .iter()
            .filter_map(|(path, route)| match route {
                Route::Unicast { ifindex, gateway, .. } => Some((*ifindex, gateway.unwrap_or(path.endpoint))),
                Route::Unknown(_) | Route::Unusable(_) => None,
            })
            .collect()
    }

    /// Makes needed neighbours managed, and lets go those that are needed no more.
    pub async fn resolve(&mut self) {
        let needed = self.needed();
        let released: Vec<_> = self.requested.difference(&needed).copied().collect();
        for key in released {
            self.requested.remove(&key);
            // A neighbour that went meanwhile needs no release.
            let _ = manage(&self.handle, key, false).await;
        }
        for key in needed {
            let known = self.neighbours.get(&key);
            // Marking a permanent entry as managed would take its permanence (`__neigh_update`).
            if known.is_some_and(|state| state.permanent || state.managed) || self.requested.contains(&key) {
                continue;
            }
            match manage(&self.handle, key, true).await {
                Ok(()) => {
                    self.requested.insert(key);
                }
                Err(error) => tracing::debug!(%error, "no managed neighbour"),
            }
        }
    }

    /// The next hop of a tunnel.
    pub fn next_hop(&self, path: Path, host: &Host, config: &Config) -> NextHop {
        self.ready(path, host, config).unwrap_or_else(NextHop::Unresolved)
    }

    /// Ready or pending, or why neither.
    fn ready(&self, path: Path, host: &Host, config: &Config) -> Result<NextHop, String> {
        let (ifindex, gateway, metric) = match self.routes.get(&path) {
            Some(Route::Unicast { ifindex, gateway, mtu }) => (*ifindex, *gateway, *mtu),
            Some(Route::Unknown(reason)) => {
                return Ok(NextHop::Pending { reason: reason.clone(), way: None });
            }
            Some(Route::Unusable(reason)) => return Err(reason.clone()),
            None => return Ok(NextHop::Pending { reason: "not looked up yet".to_owned(), way: None }),
        };
        let link = host
            .links
            .get(&ifindex)
            .ok_or_else(|| format!("the route leads to device {ifindex}, which is gone"))?;
        let (port, vlan) =
            host.port(link).ok_or_else(|| format!("the device below {} is gone", link.name))?;
        if !link.up || !port.up {
            return Err(format!("interface {} is down", link.name));
        }
        if !host.roles(config, link).has(Roles::UNDERLAY) {
            return Err(format!(
                "the route leads to interface {}, which has no underlay role in the configuration",
                link.name
            ));
        }
        let source = link.mac.ok_or_else(|| format!("interface {} has no Ethernet address", link.name))?;
        let mtu = metric.map_or(link.mtu, |metric| metric.min(link.mtu));
        let next = gateway.unwrap_or(path.endpoint);
        let what = if gateway.is_some() { "gateway" } else { "node" };
        let destination = match self.neighbours.get(&(ifindex, next)) {
            Some(Neighbour { mac: Some(mac), .. }) => *mac,
            Some(Neighbour { failed: true, .. }) => {
                return Err(format!("{what} {next} does not answer ARP on {}", link.name));
            }
            _ => {
                let reason = format!("waiting for {what} {next} to answer ARP on {}", link.name);
                let way = Way { ifindex: port.index, vlan, source, mtu };
                return Ok(NextHop::Pending { reason, way: Some(way) });
            }
        };
        Ok(NextHop::Ready(ReadyHop {
            ifindex: port.index,
            vlan,
            source,
            destination,
            mtu,
            on_link: gateway.is_none(),
        }))
    }
}

async fn route(handle: &Handle, path: Path) -> Route {
    let request = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(path.endpoint, 32)
        .source_prefix(path.local, 32)
        .build();
    let answer = handle.route().get(request).execute().try_next().await;
    match answer.map_err(NetlinkError::new("look up the route")) {
        Ok(Some(message)) => decision(path, &message),
        Ok(None) => Route::Unusable(format!("no route to {}", path.endpoint)),
        Err(error) => match error.errno() {
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => {
                Route::Unusable(format!("no route to {}", path.endpoint))
            }
            Some(libc::EINVAL) => Route::Unusable(format!(
                "{} is no address of this host, or its interface is down",
                path.local
            )),
            _ => Route::Unknown(error.to_string()),
        },
    }
}

fn decision(path: Path, message: &RouteMessage) -> Route {
    match message.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Route::Unusable(format!("{} is an address of this host", path.endpoint)),
        other => return Route::Unusable(format!("the route to {} is of type {other:?}", path.endpoint)),
    }
    let (mut ifindex, mut gateway, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(address) => gateway = ipv4(address),
            RouteAttribute::Via(_) => {
                return Route::Unusable(format!(
                    "the route to {} goes via IPv6, which is not supported",
                    path.endpoint
                ));
            }
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    match ifindex {
        Some(ifindex) => Route::Unicast { ifindex, gateway, mtu },
        None => Route::Unusable(format!("the route to {} names no device", path.endpoint)),
    }
}

fn neighbour(message: &NeighbourMessage) -> Option<(NeighbourKey, Neighbour)> {
    let mut address = None;
    let mut mac = None;
    let mut managed = false;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(destination)) => {
                address = Some(*destination);
            }
            NeighbourAttribute::LinkLayerAddress(octets) => {
                mac = octets.as_slice().try_into().ok().map(Mac::new);
            }
            NeighbourAttribute::ExtFlags(flags) => managed = flags.contains(NeighbourExtFlags::Managed),
            _ => {}
        }
    }
    let state = message.header.state;
    let usable = matches!(
        state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp
    );
    let entry = Neighbour {
        mac: mac.filter(|mac| usable && mac.is_station()),
        managed,
        permanent: matches!(state, NeighbourState::Permanent | NeighbourState::Noarp),
        failed: state == NeighbourState::Failed,
    };
    Some(((message.header.ifindex, address?), entry))
}

/// Lets go the managed neighbours that a gateway left on its interfaces, and on VLAN devices over them.
///
/// # Errors
///
/// The neighbour table cannot be read.
pub async fn release(handle: &Handle, host: &Host, names: &BTreeSet<String>) -> Result<(), NetlinkError> {
    let named = |link: &&Link| host.port(link).is_some_and(|(port, _)| names.contains(&port.name));
    let interfaces: BTreeSet<u32> = host.links.values().filter(named).map(|link| link.index).collect();
    for message in list(handle).await? {
        let ours = message.attributes.contains(&NeighbourAttribute::Protocol(PROTOCOL));
        if let Some((key, Neighbour { managed: true, .. })) = neighbour(&message)
            && ours
            && interfaces.contains(&key.0)
        {
            manage(handle, key, false).await?;
        }
    }
    Ok(())
}

async fn list(handle: &Handle) -> Result<Vec<NeighbourMessage>, NetlinkError> {
    let request = handle.neighbours().get().set_address_family(AddressFamily::Inet);
    request.execute().try_collect().await.map_err(NetlinkError::new("list neighbours"))
}

/// Sets or clears the managed flag of a neighbour; setting creates it. Clearing goes by an ordinary use of the entry.
async fn manage(
    handle: &Handle,
    (ifindex, address): NeighbourKey,
    managed: bool,
) -> Result<(), NetlinkError> {
    let mut request =
        handle.neighbours().add(ifindex, IpAddr::V4(address)).state(NeighbourState::None).replace();
    let attributes = &mut request.message_mut().attributes;
    attributes.push(NeighbourAttribute::Protocol(PROTOCOL));
    if managed {
        attributes.push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
    } else {
        request = request.flags(NeighbourFlags::Use);
    }
    request.execute().await.map_err(NetlinkError::new(format!("manage neighbour {address}")))
}
