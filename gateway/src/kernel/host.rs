//! Links and addresses of this host.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use futures::TryStreamExt as _;
use gateway_common::{
    abi::{Egress, LocalAddress, Roles},
    wire::{Ipv4, Mac},
};
use ipnet::Ipv4Net;
use rtnetlink::{
    Handle,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressMessage},
        link::{
            InfoData, InfoKind, InfoVlan, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
            LinkXdp, XdpAttached,
        },
    },
};

use super::{local, netlink::NetlinkError};
use crate::{
    config::{Config, Snat},
    plan::{Lan, Surroundings},
};

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Its Ethernet address; `None` for devices without one.
    pub mac: Option<Mac>,
    /// Largest IP packet, bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// What it is.
    pub kind: Kind,
    /// What somebody noted on it (`ip link set ... alias`).
    pub alias: Option<String>,
    /// XDP program on it.
    pub xdp: XdpState,
}

/// What a network device is, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 802.1Q device on another one.
    Vlan {
        /// Index of the device below.
        parent: u32,
        /// VLAN id.
        id: u16,
    },
    /// VXLAN tunnel.
    Vxlan(Vxlan),
    /// Anything else.
    Other,
}

/// Settings of a kernel VXLAN device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vxlan {
    /// Network identifier; 0 with `metadata`.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Outer source address.
    pub local: Option<Ipv4Addr>,
    /// Learns from what it receives.
    pub learning: bool,
    /// Takes every VNI (`external`, Cilium's way).
    pub metadata: bool,
}

/// How an XDP program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachMode {
    /// In the driver.
    Driver,
    /// In the kernel's generic hook.
    Generic,
    /// In the network card.
    Hardware,
    /// Several at once.
    Multiple,
}

impl AttachMode {
    /// Lower-case name.
    pub fn label(self) -> &'static str {
        match self {
            Self::Driver => "driver",
            Self::Generic => "generic",
            Self::Hardware => "hardware",
            Self::Multiple => "multiple",
        }
    }
}

/// XDP state of a link, as the kernel tells it (`IFLA_XDP`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpState {
    /// Id of the program.
    pub program: Option<u32>,
    /// Where it runs.
    pub mode: Option<AttachMode>,
}

/// Everything of the host that the tables depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Devices by index.
    pub links: BTreeMap<u32, Link>,
    /// IPv4 addresses and the device that has them.
    pub addresses: BTreeSet<(Ipv4Addr, u32)>,
    /// The first address of each device that has one: what the kernel sends from.
    pub primary: BTreeMap<u32, Ipv4Addr>,
    /// Broadcast addresses of their subnets, and the device: the kernel takes what is sent there.
    pub broadcasts: BTreeSet<(Ipv4Addr, u32)>,
    /// Networks that are on the link of a device, by its addresses.
    pub networks: BTreeSet<(Ipv4Net, u32)>,
    /// What the kernel takes for itself by routes of type local, and the device.
    pub locals: BTreeSet<(Ipv4Net, u32)>,
}

impl Host {
    /// Reads links and addresses.
    ///
    /// # Errors
    ///
    /// The kernel does not answer.
    pub async fn read(handle: &Handle) -> Result<Self, NetlinkError> {
        let links: Vec<_> =
            handle.link().get().execute().try_collect().await.map_err(NetlinkError::new("list links"))?;
        let addresses: Vec<_> = handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(NetlinkError::new("list addresses"))?;
        let mut primary = BTreeMap::new();
        for (address, index) in addresses.iter().filter_map(address) {
            primary.entry(index).or_insert(address);
        }
        Ok(Self {
            links: links.iter().filter_map(link).map(|link| (link.index, link)).collect(),
            addresses: addresses.iter().filter_map(address).collect(),
            primary,
            broadcasts: addresses.iter().flat_map(broadcasts).collect(),
            networks: addresses.iter().filter_map(network).collect(),
            locals: local::read().await?,
        })
    }

    /// The device of that name.
    pub fn by_name(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }

    /// How frames leave by a device: through itself, or tagged through the device below.
    pub fn port<'a>(&'a self, link: &'a Link) -> Option<(&'a Link, Option<u16>)> {
        match &link.kind {
            Kind::Vlan { parent, id } => Some((self.links.get(parent)?, Some(*id))),
            _ => Some((link, None)),
        }
    }

    /// Roles of a device by the configuration; those of a VLAN device are configured on the device below.
    pub fn roles(&self, config: &Config, link: &Link) -> Roles {
        let Some((port, vlan)) = self.port(link) else { return Roles::NONE };
        config
            .interfaces
            .iter()
            .filter(|interface| interface.name == port.name && interface.vlan == vlan)
            .fold(Roles::NONE, |roles, interface| roles.with(interface.roles))
    }

    /// What the plan depends on: networks on the links of interfaces with a role, and what the kernel takes for itself.
    pub fn surroundings(&self, config: &Config) -> Surroundings {
        let lan = |(network, index): &(Ipv4Net, u32)| {
            let link = self.links.get(index)?;
            let lan = || Lan { network: *network, interface: link.name.as_str().into() };
            (self.roles(config, link) != Roles::NONE).then(lan)
        };
        Surroundings {
            lans: self.networks.iter().filter_map(lan).collect(),
            own: self.owned().map(|(address, _)| address).collect(),
        }
    }

    /// The address from which clients behind `port` get ICMP errors: the primary one of the device itself, or where
    /// only its VLANs have clients, of the first VLAN device that has one. `None` where there are no clients.
    pub fn client_address(&self, config: &Config, port: &Link) -> Option<Ipv4Addr> {
        let external = |link: &&Link| self.roles(config, link).has(Roles::EXTERNAL);
        let vlans = self
            .links
            .values()
            .filter(|link| matches!(&link.kind, Kind::Vlan { parent, .. } if *parent == port.index));
        std::iter::once(port)
            .chain(vlans)
            .filter(external)
            .find_map(|link| self.primary.get(&link.index))
            .copied()
    }

    /// Single addresses that the kernel takes for itself, and the device: addresses and broadcast addresses of devices,
    /// and local routes to one address.
    fn owned(&self) -> impl Iterator<Item = (Ipv4Addr, u32)> {
        let routed = self.locals.iter().filter(|(net, _)| net.prefix_len() == 32);
        let routed = routed.map(|(net, index)| (net.addr(), *index));
        routed.chain(self.broadcasts.iter().chain(&self.addresses).copied())
    }

    /// Whole prefixes that the kernel takes for itself, joined where that is possible, the widest first.
    pub fn local_prefixes(&self) -> Vec<Ipv4Net> {
        let wide = self.locals.iter().map(|(net, _)| *net).filter(|net| net.prefix_len() < 32);
        let mut joined = Ipv4Net::aggregate(&wide.collect());
        joined.sort_by_key(|net| (net.prefix_len(), net.addr()));
        joined
    }

    /// The device by which the kernel takes an address for itself, if it does.
    pub fn owner(&self, address: Ipv4Addr) -> Option<u32> {
        let single = self.owned().find(|(owned, _)| *owned == address);
        let prefix = || self.locals.iter().find(|(net, _)| net.contains(&address)).map(|(_, index)| *index);
        single.map(|(_, index)| index).or_else(prefix)
    }

    /// SNAT addresses that the kernel takes for its own, and what to do about it, for people.
    pub fn misused(&self, snat: &Snat) -> impl Iterator<Item = (Ipv4Addr, String)> {
        snat.addresses().collect::<Vec<_>>().into_iter().filter_map(move |address| {
            let device = self.links.get(&self.owner(address)?).map_or("a device", |link| link.name.as_str());
            let text = format!(
                "SNAT address {address} is an address of this host (on {device}), so the kernel would answer for it: it is \
                 not used; take it off the device (or the local route to it away), or out of [snat]"
            );
            Some((address, text))
        })
    }

    /// Goal of the address table: what the kernel owns, our addresses in the overlays, and the addresses that clients are
    /// or were translated to. One that is the kernel's is nobody else's.
    pub fn address_table(
        &self,
        config: &Config,
        draining: &BTreeSet<Ipv4Addr>,
    ) -> BTreeMap<Ipv4, LocalAddress> {
        let mut table: BTreeMap<Ipv4, LocalAddress> = BTreeMap::new();
        for (address, ifindex) in self.owned() {
            table.insert(address.into(), LocalAddress { kind: LocalAddress::KERNEL, ifindex });
        }
        for overlay in &config.overlays {
            table.entry(overlay.address.into()).or_default().kind |= LocalAddress::OVERLAY;
        }
        for address in config.snat.addresses().chain(draining.iter().copied()) {
            table
                .entry(address.into())
                .or_insert(LocalAddress { kind: LocalAddress::SNAT | LocalAddress::OVERLAY, ifindex: 0 });
        }
        table
    }

    /// Goal of the table of ways out: devices with clients, and the tunnel devices among `tunnels`.
    pub fn egress_table(&self, config: &Config, tunnels: impl Fn(&str) -> bool) -> BTreeMap<u32, Egress> {
        self.links
            .values()
            .filter_map(|link| {
                if tunnels(&link.name) {
                    return Some((link.index, Egress { ifindex: link.index, vlan: 0, kind: Egress::TUNNEL }));
                }
                let (port, vlan) = self.port(link)?;
                let external = self.roles(config, link).has(Roles::EXTERNAL);
                external.then_some((
                    link.index,
                    Egress { ifindex: port.index, vlan: vlan.unwrap_or(0), kind: Egress::EXTERNAL },
                ))
            })
            .collect()
    }
}

fn link(message: &LinkMessage) -> Option<Link> {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        kind: Kind::Other,
        alias: None,
        xdp: XdpState::default(),
    };
    let mut parent = 0;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(octets) => link.mac = octets.as_slice().try_into().ok().map(Mac::new),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::Link(index) => parent = *index,
            LinkAttribute::LinkInfo(infos) => link.kind = kind(infos),
            LinkAttribute::Xdp(attributes) => link.xdp = xdp(attributes),
            _ => {}
        }
    }
    if let Kind::Vlan { parent: below, .. } = &mut link.kind {
        *below = parent;
    }
    (!link.name.is_empty()).then_some(link)
}

fn kind(infos: &[LinkInfo]) -> Kind {
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(data) => Some(data),
        _ => None,
    });
    let name = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match (name, data) {
        (Some(InfoKind::Vlan), Some(InfoData::Vlan(attributes))) => attributes
            .iter()
            .find_map(|attribute| match attribute {
                InfoVlan::Id(id) => Some(Kind::Vlan { parent: 0, id: *id }),
                _ => None,
            })
            .unwrap_or(Kind::Other),
        (Some(InfoKind::Vxlan), Some(InfoData::Vxlan(attributes))) => Kind::Vxlan(vxlan(attributes)),
        _ => Kind::Other,
    }
}

fn vxlan(attributes: &[InfoVxlan]) -> Vxlan {
    let mut vxlan = Vxlan::default();
    for attribute in attributes {
        match attribute {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Local(local) => vxlan.local = Some(*local),
            InfoVxlan::Learning(learning) => vxlan.learning = *learning,
            InfoVxlan::CollectMetadata(metadata) => vxlan.metadata = *metadata,
            _ => {}
        }
    }
    vxlan
}

fn xdp(attributes: &[LinkXdp]) -> XdpState {
    let mut state = XdpState::default();
    for attribute in attributes {
        match attribute {
            LinkXdp::Attached(mode) => {
                state.mode = match mode {
                    XdpAttached::Driver => Some(AttachMode::Driver),
                    XdpAttached::SocketBuffer => Some(AttachMode::Generic),
                    XdpAttached::Hardware => Some(AttachMode::Hardware),
                    XdpAttached::Multiple => Some(AttachMode::Multiple),
                    _ => None,
                };
            }
            LinkXdp::ProgId(id) => state.program = Some(*id),
            // With several programs the kernel gives no `ProgId`.
            LinkXdp::DrvProgId(id) | LinkXdp::SkbProgId(id) | LinkXdp::HwProgId(id) => {
                state.program.get_or_insert(*id);
            }
            _ => {}
        }
    }
    state
}

fn address(message: &AddressMessage) -> Option<(Ipv4Addr, u32)> {
    if message.header.family != AddressFamily::Inet {
        return None;
    }
    // On point-to-point links `Address` is the peer's.
    let find = |local: bool| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(IpAddr::V4(address)) if local => Some(*address),
            AddressAttribute::Address(IpAddr::V4(address)) if !local => Some(*address),
            _ => None,
        })
    };
    Some((find(true).or_else(|| find(false))?, message.header.index))
}

/// The network that is on the link, by an address. On point-to-point links the prefix is the peer's, and `Address` holds
/// it.
fn network(message: &AddressMessage) -> Option<(Ipv4Net, u32)> {
    let length = message.header.prefix_len;
    message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(IpAddr::V4(address)) if length < 32 => {
            Some((Ipv4Net::new(*address, length).ok()?.trunc(), message.header.index))
        }
        _ => None,
    })
}

/// Broadcast addresses that the kernel makes of an address: the one that was set, and that of its prefix
/// (`fib_add_ifaddr`).
fn broadcasts(message: &AddressMessage) -> BTreeSet<(Ipv4Addr, u32)> {
    let index = message.header.index;
    let set = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Broadcast(address) => Some(*address),
        _ => None,
    });
    let network = network(message).filter(|(network, _)| network.prefix_len() < 31);
    set.into_iter()
        .chain(network.map(|(network, _)| network.broadcast()))
        .map(|address| (address, index))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u8, attributes: Vec<AddressAttribute>) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = length;
        message.header.index = 3;
        message.attributes = attributes;
        message
    }

    #[test]
    fn broadcasts_are_the_kernels() {
        let own = Ipv4Addr::new(172, 16, 2, 200);
        let of_prefix = Ipv4Addr::new(172, 16, 2, 255);
        let odd = Ipv4Addr::new(172, 16, 2, 127);
        let address = AddressAttribute::Address(own.into());
        let plain = broadcasts(&message(24, vec![address.clone()]));
        assert_eq!(plain, [(of_prefix, 3)].into());
        let both = broadcasts(&message(24, vec![address.clone(), AddressAttribute::Broadcast(odd)]));
        assert_eq!(both, [(odd, 3), (of_prefix, 3)].into());
        assert_eq!(broadcasts(&message(32, vec![address.clone()])), BTreeSet::new());
        assert_eq!(network(&message(24, vec![address.clone()])), Some(("172.16.2.0/24".parse().unwrap(), 3)));
        assert_eq!(network(&message(32, vec![address])), None);
    }

    #[test]
    fn local_routes_are_the_kernels() {
        let net = |text: &str| (text.parse::<Ipv4Net>().unwrap(), 1);
        let nets = ["198.51.100.0/25", "198.51.100.128/25", "203.0.113.7/32", "192.0.2.0/26"].map(net);
        let host = Host { locals: nets.into(), ..Host::default() };
        let address = |text: &str| text.parse::<Ipv4Addr>().unwrap();
        assert_eq!(host.local_prefixes(), [net("198.51.100.0/24").0, net("192.0.2.0/26").0]);
        for (text, owner) in [
            ("198.51.100.200", Some(1)),
            ("203.0.113.7", Some(1)),
            ("203.0.113.8", None),
            ("192.0.2.64", None),
        ] {
            assert_eq!(host.owner(address(text)), owner, "{text}");
        }
        assert_eq!(host.owned().collect::<Vec<_>>(), [(address("203.0.113.7"), 1)]);
    }
}
