//! The slow path: the kernel's own VXLAN device, configured as flannel configures a node's.
//!
//! It carries what the XDP program passes up (expiring TTL, IP options, oversize) and the gateway host's own traffic to
//! pods. For each node, as flannel does it (`pkg/backend/vxlan/vxlan_network.go`): a permanent neighbour, the subnet's
//! network address to the node's VTEP MAC; a permanent FDB entry, that MAC to the tunnel endpoint; a route, the subnet
//! via its network address, onlink. Nodes reached directly get a route via the endpoint instead.
//!
//! Everything is compared with what the kernel shows and changed by difference. Nothing but our own device (by name and
//! alias), and our own routes (by protocol number and source address), is touched.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use futures::TryStreamExt as _;
use gateway_common::wire::Mac;
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle, LinkUnspec, LinkVxlan, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressMessage},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
        route::{RouteAttribute, RouteHeader, RouteMessage, RouteScope},
    },
};

use super::{
    PROTOCOL,
    host::{Host, Kind, Link, Vxlan},
    ipv4,
    netlink::{self, NetlinkError},
    underlay::{NextHop, ReadyHop},
};
use crate::{
    config::Overlay,
    dataplane::template::VXLAN_OVERHEAD,
    plan::{Desired, OverlayId, VtepKey},
};

/// Longest device name that the kernel takes (IFNAMSIZ less the final zero).
const MAX_NAME: usize = 15;

/// Name of an overlay's kernel device.
pub fn device_name(overlay: &Overlay) -> String {
    format!("gw-{}", overlay.name)
}

/// What is noted on the devices of an instance, so that nobody takes those of another for its own.
fn alias(instance: &str) -> String {
    format!("gateway instance {instance}")
}

/// The slow path of an overlay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Goal {
    /// Network address of a pod CIDR to VTEP MAC.
    pub neighbours: BTreeMap<Ipv4Addr, Mac>,
    /// VTEP MAC to tunnel endpoint.
    pub forwarding: BTreeMap<Mac, Ipv4Addr>,
    /// Pod CIDR to the way there.
    pub routes: BTreeMap<Ipv4Net, Way>,
    /// More may be meant than is named: nothing is removed.
    pub partial: bool,
}

/// How the kernel reaches a pod CIDR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Through our device.
    Tunnel,
    /// Via the node, on the underlay device with this index.
    Direct {
        /// Address of the node.
        gateway: Ipv4Addr,
        /// Device (a VLAN device where there is one).
        ifindex: u32,
    },
}

impl Goal {
    /// What the plan asks of an overlay. `hops` has the next hop of every node, `egress` finds the kernel device for it.
    pub fn new(
        overlay: OverlayId,
        desired: &Desired,
        hops: &BTreeMap<VtepKey, NextHop>,
        egress: impl Fn(&ReadyHop) -> Option<u32>,
    ) -> Self {
        let mut goal = Self::default();
        for ((_, net), key) in desired.prefixes.iter().filter(|((id, _), _)| *id == overlay) {
            let Some(vtep) = desired.vteps.get(key) else { continue };
            let direct = match hops.get(key) {
                Some(NextHop::Ready(hop)) if vtep.direct && hop.on_link => egress(hop),
                _ => None,
            };
            if let Some(ifindex) = direct {
                goal.routes.insert(*net, Way::Direct { gateway: vtep.endpoint, ifindex });
            } else {
                goal.neighbours.insert(net.network(), vtep.mac);
                goal.forwarding.insert(vtep.mac, vtep.endpoint);
                goal.routes.insert(*net, Way::Tunnel);
            }
        }
        goal
    }
}

/// Keeps the device of one overlay.
#[derive(Debug)]
pub struct Device {
    handle: Handle,
    overlay: Overlay,
    name: String,
    alias: String,
}

impl Device {
    /// Changes nothing yet.
    pub fn new(handle: Handle, instance: &str, overlay: &Overlay) -> Self {
        Self { handle, overlay: overlay.clone(), name: device_name(overlay), alias: alias(instance) }
    }

    /// What the device must be from its beginning.
    fn settings(&self) -> Vxlan {
        Vxlan {
            vni: self.overlay.vni.get(),
            port: self.overlay.port,
            local: Some(self.overlay.local),
            learning: false,
            metadata: false,
        }
    }

    /// Whether a device of our name is ours: it says so, or it says nothing and is what we would make.
    fn is_ours(&self, link: &Link) -> bool {
        match &link.alias {
            Some(alias) => *alias == self.alias,
            None => link.kind == Kind::Vxlan(self.settings()),
        }
    }

    /// Makes the device and its entries what they should be. Returns what could not be done, for people; the rest is
    /// done nevertheless.
    pub async fn apply(&self, goal: &Goal, host: &Host, underlay_mtu: u32) -> Vec<String> {
        let index = match self.ensure(host, underlay_mtu).await {
            Ok(index) => index,
            Err(problem) => return vec![problem],
        };
        let mut problems = Vec::new();
        let mut note = |result: Result<(), NetlinkError>| {
            if let Err(error) = result {
                problems.push(format!("kernel device {}: {error}", self.name));
            }
        };
        let state = match self.read(index).await {
            Ok(state) => state,
            Err(error) => {
                note(Err(error));
                return problems;
            }
        };
        // As flannel does it: neighbours and forwarding before routes, and the other way round.
        for (address, mac) in &goal.neighbours {
            if state.neighbours.get(address) != Some(mac) {
                note(self.set_neighbour(index, *address, *mac).await);
            }
        }
        for (mac, endpoint) in &goal.forwarding {
            if state.forwarding.get(mac) != Some(endpoint) {
                note(self.set_forwarding(index, *mac, *endpoint).await);
            }
        }
        let routes: BTreeSet<_> =
            goal.routes.iter().map(|(net, way)| KernelRoute::new(*net, way, index)).collect();
        // A net that moves is replaced in place; only those that have no successor are deleted.
        for route in routes.difference(&state.routes) {
            note(self.set_route(route).await);
        }
        if goal.partial {
            return problems;
        }
        for route in state.routes.difference(&routes).filter(|old| !goal.routes.contains_key(&old.net)) {
            note(self.delete_route(route).await);
        }
        for address in state.neighbours.keys().filter(|address| !goal.neighbours.contains_key(address)) {
            note(self.delete_neighbour(index, *address).await);
        }
        for mac in state.forwarding.keys().filter(|mac| !goal.forwarding.contains_key(mac)) {
            note(self.delete_forwarding(index, *mac).await);
        }
        problems
    }

    /// The device, created or mended; its index.
    async fn ensure(&self, host: &Host, underlay_mtu: u32) -> Result<u32, String> {
        let text = |error: NetlinkError| format!("kernel device {}: {error}", self.name);
        if self.name.len() > MAX_NAME {
            return Err(format!(
                "kernel device {}: the name has more than {MAX_NAME} characters, so there is no slow path: give the \
                 overlay a shorter name",
                self.name
            ));
        }
        let overlay = &self.overlay;
        let wanted = self.settings();
        let mtu = underlay_mtu.saturating_sub(VXLAN_OVERHEAD);
        let mut present = host.by_name(&self.name).cloned();
        match &present {
            None => {}
            Some(link) if !self.is_ours(link) => {
                let whose = link.alias.as_ref().map_or(String::new(), |alias| format!(" ({alias})"));
                return Err(format!(
                    "a device named {} exists and is not of this gateway{whose}, so there is no slow path (the fast path \
                     goes on): remove it with `ip link delete {}`, or give the overlay another name",
                    self.name, self.name
                ));
            }
            Some(link) if link.kind == Kind::Vxlan(wanted.clone()) => {}
            Some(link) => {
                // VNI, port, address and learning of a device cannot change.
                let index = link.index;
                present = None;
                let action = "delete the device, whose settings are outdated";
                self.handle
                    .link()
                    .del(index)
                    .execute()
                    .await
                    .map_err(NetlinkError::new(action))
                    .map_err(text)?;
            }
        }
        if let Some(rival) =
            host.links.values().find(|link| link.name != self.name && conflicts(&link.kind, &wanted))
        {
            return Err(format!(
                "device {} already uses VNI {} on UDP port {}, so there is no slow path (the fast path goes on): remove \
                 that device",
                rival.name, wanted.vni, wanted.port
            ));
        }
        let index = if let Some(link) = present {
            if link.mtu != mtu || link.mac != Some(overlay.mac) || !link.up || link.alias.is_none() {
                let change = LinkUnspec::new_with_index(link.index)
                    .mtu(mtu)
                    .address(overlay.mac.octets.to_vec())
                    .alias(&self.alias)
                    .up()
                    .build();
                let changed = self.handle.link().change(change).execute().await;
                changed.map_err(NetlinkError::new("set MTU, address and state")).map_err(text)?;
            }
            link.index
        } else {
            self.create(&wanted, mtu).await?
        };
        self.ensure_address(index, host).await.map_err(text)?;
        Ok(index)
    }

    async fn create(&self, wanted: &Vxlan, mtu: u32) -> Result<u32, String> {
        let text = |error: NetlinkError| format!("kernel device {}: {error}", self.name);
        let message = LinkVxlan::new(&self.name, wanted.vni)
            .port(wanted.port)
            .local(self.overlay.local)
            .learning(false)
            .address(self.overlay.mac.octets.to_vec())
            .mtu(mtu)
            .up()
            .build();
        let created = self.handle.link().add(message).execute().await;
        created.map_err(NetlinkError::new("create the device")).map_err(|error| match error.errno() {
            Some(libc::EEXIST) => format!(
                "VNI {} on UDP port {} is already in use by another device, so there is no slow path (the fast path goes \
                 on): find it with `ip -d link show type vxlan` and remove it",
                wanted.vni, wanted.port
            ),
            Some(libc::EOPNOTSUPP) => {
                format!("kernel device {}: this kernel has no vxlan: load that module", self.name)
            }
            _ => text(error),
        })?;
        let found = self.handle.link().get().match_name(self.name.clone()).execute().try_next().await;
        let index = found
            .map_err(NetlinkError::new("find the new device"))
            .map_err(text)?
            .map(|message| message.header.index)
            .ok_or_else(|| format!("kernel device {} vanished", self.name))?;
        // The kernel takes no alias with the device.
        let named = LinkUnspec::new_with_index(index).alias(&self.alias).build();
        let named = self.handle.link().change(named).execute().await;
        named.map_err(NetlinkError::new("set the alias")).map_err(text)?;
        Ok(index)
    }

    async fn ensure_address(&self, index: u32, host: &Host) -> Result<(), NetlinkError> {
        let wanted = self.overlay.address;
        for (address, _) in host.addresses.iter().filter(|(address, at)| *at == index && *address != wanted) {
            let mut message = AddressMessage::default();
            message.header.family = AddressFamily::Inet;
            message.header.index = index;
            message.header.prefix_len = 32;
            message.attributes.push(AddressAttribute::Local(IpAddr::V4(*address)));
            let action = format!("delete the address {address}");
            self.handle.address().del(message).execute().await.map_err(NetlinkError::new(action))?;
        }
        if host.addresses.contains(&(wanted, index)) {
            return Ok(());
        }
        let request = self.handle.address().add(index, IpAddr::V4(wanted), 32).replace();
        request.execute().await.map_err(NetlinkError::new(format!("add the address {wanted}")))
    }

    async fn read(&self, index: u32) -> Result<State, NetlinkError> {
        let mut state = State::default();
        let neighbours: Vec<_> = self
            .handle
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Inet)
            .execute()
            .try_collect()
            .await
            .map_err(NetlinkError::new("list neighbours"))?;
        for message in neighbours.iter().filter(|message| message.header.ifindex == index) {
            if let Entry { address: Some(address), mac: Some(mac) } = entry(message)
                && message.header.state == NeighbourState::Permanent
            {
                state.neighbours.insert(address, mac);
            }
        }
        let forwarding: Vec<_> = self
            .handle
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Bridge)
            .execute()
            .try_collect()
            .await
            .map_err(NetlinkError::new("list forwarding entries"))?;
        for message in forwarding.iter().filter(|message| message.header.ifindex == index) {
            if let Entry { address: Some(endpoint), mac: Some(mac) } = entry(message) {
                state.forwarding.insert(mac, endpoint);
            }
        }
        let ours = |header: &mut RouteHeader| header.protocol = PROTOCOL;
        let routes = netlink::routes(RouteHeader::RT_TABLE_MAIN, ours).await?;
        state.routes = routes
            .iter()
            .filter(|message| self.owns(message))
            .filter_map(KernelRoute::from_message)
            .collect();
        Ok(state)
    }

    /// Our routes are told from others, and from those of other overlays, by protocol and source address.
    fn owns(&self, message: &RouteMessage) -> bool {
        message.header.protocol == PROTOCOL
            && message.header.table == RouteHeader::RT_TABLE_MAIN
            && message.attributes.iter().any(|attribute| match attribute {
                RouteAttribute::PrefSource(address) => ipv4(address) == Some(self.overlay.address),
                _ => false,
            })
    }

    async fn set_neighbour(&self, index: u32, address: Ipv4Addr, mac: Mac) -> Result<(), NetlinkError> {
        let mut request = self
            .handle
            .neighbours()
            .add(index, IpAddr::V4(address))
            .link_layer_address(&mac.octets)
            .replace();
        request.message_mut().attributes.push(NeighbourAttribute::Protocol(PROTOCOL));
        request.execute().await.map_err(NetlinkError::new(format!("set the neighbour {address}")))
    }

    async fn delete_neighbour(&self, index: u32, address: Ipv4Addr) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = index;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(address)));
        let action = format!("delete the neighbour {address}");
        gone(self.handle.neighbours().del(message).execute().await.map_err(NetlinkError::new(action)))
    }

    async fn set_forwarding(&self, index: u32, mac: Mac, endpoint: Ipv4Addr) -> Result<(), NetlinkError> {
        let request = self
            .handle
            .neighbours()
            .add_bridge(index, &mac.octets)
            .flags(NeighbourFlags::Own)
            .destination(IpAddr::V4(endpoint))
            .replace();
        request.execute().await.map_err(NetlinkError::new(format!("set the forwarding entry of {mac}")))
    }

    async fn delete_forwarding(&self, index: u32, mac: Mac) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index;
        message.header.flags = NeighbourFlags::Own;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets.to_vec()));
        let action = format!("delete the forwarding entry of {mac}");
        gone(self.handle.neighbours().del(message).execute().await.map_err(NetlinkError::new(action)))
    }

    fn route_message(&self, route: &KernelRoute) -> RouteMessage {
        let mut builder = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(route.net.network(), route.net.prefix_len())
            .gateway(route.gateway)
            .output_interface(route.ifindex)
            .pref_source(self.overlay.address)
            .protocol(PROTOCOL)
            .scope(RouteScope::Universe);
        if route.tunnel {
            builder = builder.onlink();
        }
        builder.build()
    }

    async fn set_route(&self, route: &KernelRoute) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(self.route_message(route)).replace();
        request.execute().await.map_err(NetlinkError::new(format!("set the route to {}", route.net)))
    }

    async fn delete_route(&self, route: &KernelRoute) -> Result<(), NetlinkError> {
        let request = self.handle.route().del(self.route_message(route));
        gone(request.execute().await.map_err(NetlinkError::new(format!("delete the route to {}", route.net))))
    }

    /// Removes the device and our routes.
    ///
    /// # Errors
    ///
    /// What the kernel refused.
    pub async fn remove(&self) -> Result<bool, NetlinkError> {
        let host = Host::read(&self.handle).await?;
        let Some(link) = host.by_name(&self.name).filter(|link| self.is_ours(link)) else {
            return Ok(self.remove_routes(0).await? > 0);
        };
        self.remove_routes(link.index).await?;
        delete(&self.handle, link).await?;
        Ok(true)
    }

    async fn remove_routes(&self, index: u32) -> Result<usize, NetlinkError> {
        let state = self.read(index).await?;
        for route in &state.routes {
            self.delete_route(route).await?;
        }
        Ok(state.routes.len())
    }
}

/// Removes a device that an instance noted as its own, if it is there; routes through it go with it.
///
/// # Errors
///
/// What the kernel refused.
pub async fn remove(handle: &Handle, instance: &str, name: &str) -> Result<bool, NetlinkError> {
    let host = Host::read(handle).await?;
    let Some(link) = host.by_name(name).filter(|link| link.alias == Some(alias(instance))) else {
        return Ok(false);
    };
    delete(handle, link).await?;
    Ok(true)
}

async fn delete(handle: &Handle, link: &Link) -> Result<(), NetlinkError> {
    let action = format!("delete device {}", link.name);
    handle.link().del(link.index).execute().await.map_err(NetlinkError::new(action))
}

/// Two devices cannot share a VNI on a port, and a metadata device takes all of them.
fn conflicts(kind: &Kind, wanted: &Vxlan) -> bool {
    match kind {
        Kind::Vxlan(found) => found.port == wanted.port && (found.metadata || found.vni == wanted.vni),
        _ => false,
    }
}

fn gone(result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
        result => result,
    }
}

#[derive(Debug, Default)]
struct State {
    neighbours: BTreeMap<Ipv4Addr, Mac>,
    forwarding: BTreeMap<Mac, Ipv4Addr>,
    routes: BTreeSet<KernelRoute>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct KernelRoute {
    net: Ipv4Net,
    gateway: Ipv4Addr,
    ifindex: u32,
    tunnel: bool,
}

impl KernelRoute {
    fn new(net: Ipv4Net, way: &Way, device: u32) -> Self {
        match *way {
            Way::Tunnel => Self { net, gateway: net.network(), ifindex: device, tunnel: true },
            Way::Direct { gateway, ifindex } => Self { net, gateway, ifindex, tunnel: false },
        }
    }

    fn from_message(message: &RouteMessage) -> Option<Self> {
        let (mut network, mut gateway, mut ifindex) = (None, None, None);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => network = ipv4(address),
                RouteAttribute::Gateway(address) => gateway = ipv4(address),
                RouteAttribute::Oif(index) => ifindex = Some(*index),
                _ => {}
            }
        }
        let net = Ipv4Net::new(network?, message.header.destination_prefix_length).ok()?;
        let gateway = gateway?;
        Some(Self { net, gateway, ifindex: ifindex?, tunnel: gateway == net.network() })
    }
}

struct Entry {
    address: Option<Ipv4Addr>,
    mac: Option<Mac>,
}

fn entry(message: &NeighbourMessage) -> Entry {
    let mut entry = Entry { address: None, mac: None };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                entry.address = Some(*address);
            }
            // In FDB messages the family is the bridge's, so addresses come as bytes.
            NeighbourAttribute::Destination(NeighbourAddress::Other(octets)) => {
                entry.address = <[u8; 4]>::try_from(octets.as_slice()).ok().map(Ipv4Addr::from);
            }
            NeighbourAttribute::LinkLayerAddress(octets) => {
                entry.mac = octets.as_slice().try_into().ok().map(Mac::new);
            }
            _ => {}
        }
    }
    entry
}
