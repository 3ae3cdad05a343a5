//! Overlays, nodes and tables of the tests. The tables are described once, as the model's; the loaded program gets the
//! same entries.

use std::{cell::Cell, collections::BTreeMap};

use bytemuck::Zeroable as _;
use etherparse::checksum::Sum16BitWords;
use gateway_common::{
    abi::{
        Config, Egress, HEADER_CAPACITY, LocalAddress, Overlay, OverlayAddress, OverlayFlags, Port, Roles,
        Route, SnatRule, Timeouts, VlanPort, Vtep, VtepFlags, VtepSlot,
    },
    model::{HostSessions, HostTables},
    wire::{Be16, Ipv4, Mac, Vni},
};

use crate::{
    packet::{Address, IPV4, Ip, Link, UDP, vxlan, vxlan_header},
    rig::{self, Ports},
    subject,
};

/// The VLANs of the program's interface.
pub(crate) const VLAN_BOTH: u16 = 100;
pub(crate) const VLAN_EXTERNAL: u16 = 200;
pub(crate) const VLAN_UNDERLAY: u16 = 300;
pub(crate) const VLAN_IDLE: u16 = 400;
/// Of the underlay behind the second interface, and of clients there.
pub(crate) const VLAN_OUT: u16 = 77;

/// Numbers of the nodes in the VTEP table.
pub(crate) const PLAIN: u32 = 1;
pub(crate) const TAGGED: u32 = 2;
pub(crate) const DIRECT: u32 = 3;
pub(crate) const DIRECT_TAGGED: u32 = 4;
pub(crate) const UNRESOLVED: u32 = 5;
const FREE: u32 = 6;
pub(crate) const CILIUM: u32 = 7;
pub(crate) const OTHER_PORT: u32 = 8;
pub(crate) const VNI_ZERO: u32 = 9;
const BAD_HEADER: u32 = 10;
/// Beyond the table.
const NOWHERE: u32 = 4000;

/// A pod of each node, by number.
pub(crate) fn pod(node: u32) -> Address {
    match node {
        CILIUM => [10, 1, 1, 9],
        OTHER_PORT => [10, 60, 1, 9],
        VNI_ZERO => [10, 70, 1, 9],
        _ => [10, 244, u8::try_from(node).unwrap(), 2],
    }
}
/// In the prefix of [`PLAIN`], but an exact pod of [`TAGGED`].
pub(crate) const MOVED_POD: Address = [10, 244, 1, 77];
pub(crate) const POD_OF_FREE: Address = [10, 244, 6, 2];
pub(crate) const POD_OF_NOWHERE: Address = [10, 244, 7, 2];
pub(crate) const POD_OF_BAD_HEADER: Address = [10, 244, 10, 2];

/// The gateway's own address inside overlay 0, flannel's kind: the network address of its subnet.
pub(crate) const OVERLAY_ADDRESS: Address = [10, 244, 30, 0];
/// And inside overlay 1.
pub(crate) const CILIUM_ADDRESS: Address = [10, 0, 1, 1];

/// Clients that pods cannot answer, by what the rules say of them: one SNAT address, a pool, no translation, no rule.
pub(crate) const FOREIGN: Address = [198, 51, 100, 9];
pub(crate) const POOLED: Address = [198, 51, 100, 70];
pub(crate) const TRUSTED: Address = [198, 51, 100, 130];
pub(crate) const STRANGER: Address = [192, 0, 2, 99];
/// The address of all translated clients but the pooled ones.
pub(crate) const SNAT: Address = [10, 244, 30, 200];
/// The addresses of the pool.
pub(crate) const POOL: [Address; 3] = [[10, 244, 30, 201], [10, 244, 30, 202], [10, 244, 30, 203]];
/// The address of clients on their way to [`TAGGED`].
pub(crate) const SNAT_TAGGED: Address = [10, 244, 30, 204];
/// The address inside overlay 1.
pub(crate) const SNAT_CILIUM: Address = [10, 0, 1, 200];
/// Between the lowest and the highest SNAT address, and none.
pub(crate) const AMONG_SNAT: Address = [10, 244, 30, 205];
/// Highest SNAT address of overlay 0; taken out of its pool, so no rule names it.
pub(crate) const DRAINED: Address = [10, 244, 30, 206];

/// Index of the program's interface among the ports, that of [`rig::Ports::second`], and of one that is absent.
pub(crate) const OWN_PORT: u16 = 3;
pub(crate) const SECOND_PORT: u16 = 15;
pub(crate) const ABSENT_PORT: u16 = 7;

/// Underlay router or node as next hop.
const NEXT_HOP: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x0a]);

/// A node as the gateway sees it.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) overlay: usize,
    pub(crate) endpoint: Address,
    pub(crate) mac: Mac,
    /// Link header of the way there.
    pub(crate) link: Link,
    pub(crate) ifindex: u32,
    pub(crate) mtu: u16,
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) dont_fragment: bool,
    pub(crate) direct: bool,
}

impl Node {
    /// The outer packet around `inner`, an Ethernet payload of EtherType `kind`.
    fn outer(&self, overlay: &Overlay, kind: u16, inner: &[u8], source_port: u16, ecn: u8) -> Ip {
        let frame = Link::new(self.mac, overlay.mac).frame(kind, inner);
        let datagram = vxlan(source_port, overlay.port.get(), vxlan_header(overlay.vni.get()), &frame);
        Ip {
            ttl: self.ttl,
            tos: self.tos | ecn,
            dont_fragment: self.dont_fragment,
            ..Ip::new(overlay.local.octets, self.endpoint, UDP, datagram)
        }
    }

    /// The frame in which `inner` must leave for this node: RFC 7348 around the packet one hop further, or the packet
    /// itself on a direct way.
    pub(crate) fn carries(&self, config: &Config, inner: &Ip, source_port: u16) -> Vec<u8> {
        // Linux INET_ECN_encapsulate: CE becomes ECT(0), the rest is copied.
        let ecn = if inner.tos & 3 == 3 { 2 } else { inner.tos & 3 };
        self.carries_marked(config, inner, source_port, ecn, self.dont_fragment)
    }

    /// As [`carries`](Self::carries), with these outer ECN bits and DF.
    pub(crate) fn carries_marked(
        &self,
        config: &Config,
        inner: &Ip,
        source_port: u16,
        ecn: u8,
        dont_fragment: bool,
    ) -> Vec<u8> {
        if self.direct {
            return self.link.ip(&inner.hop());
        }
        let outer = self.outer(&config.overlays[self.overlay], IPV4, &inner.hop().bytes(), source_port, ecn);
        self.link.ip(&Ip { dont_fragment, ..outer })
    }

    /// The frame in which an ARP packet must leave for this node.
    pub(crate) fn carries_arp(&self, config: &Config, to: Mac, arp: &[u8], source_port: u16) -> Vec<u8> {
        let towards = Self { mac: to, ..self.clone() };
        self.link.ip(&towards.outer(&config.overlays[self.overlay], crate::packet::ARP, arp, source_port, 0))
    }

    /// The node's entry in the VTEP table: the header of an empty packet without its variable fields.
    pub(crate) fn slot(&self, config: &Config) -> VtepSlot {
        let mut slot = VtepSlot {
            overlay: u16::try_from(self.overlay).unwrap(),
            flags: VtepFlags::USED.with(VtepFlags::READY),
            ifindex: self.ifindex,
            mtu: self.mtu,
            endpoint: Ipv4::new(self.endpoint),
            mac: self.mac,
            next_hop: self.link.destination,
            ..VtepSlot::zeroed()
        };
        let mut header = if self.direct {
            slot.flags = slot.flags.with(VtepFlags::DIRECT);
            self.link.frame(IPV4, &[])
        } else {
            self.link.ip(&self.outer(&config.overlays[self.overlay], IPV4, &[], 0, 0))
        };
        if !self.direct {
            let at = self.link.length();
            slot.ip_offset = u16::try_from(at).unwrap();
            // Total length, header checksum, UDP length.
            for variable in [2..4, 10..12, 24..26] {
                header[at + variable.start..at + variable.end].fill(0);
            }
            slot.checksum_base = !Sum16BitWords::new().add_slice(&header[at..at + 20]).ones_complement();
        }
        slot.header_len = u16::try_from(header.len()).unwrap();
        header.resize(HEADER_CAPACITY, 0);
        slot.header = header.try_into().unwrap();
        slot
    }
}

/// An entry whose slot 0 is valid; slot 1 would send to nowhere.
pub(crate) fn entry(slot: VtepSlot) -> Vtep {
    Vtep { active: 0, generation: 1, slots: [slot, VtepSlot::zeroed()] }
}

/// Everything a test needs to know.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) ports: Ports,
    pub(crate) tables: HostTables,
    pub(crate) nodes: BTreeMap<u32, Node>,
}

impl World {
    /// A one-armed gateway with four overlays; see the code for who is where.
    pub(crate) fn new(ports: Ports) -> Self {
        let config = config(&ports);
        let nodes = nodes(&ports);
        let mut tables = HostTables {
            config,
            fib: rig::model(&ports),
            icmp_allowance: Cell::new(u32::MAX),
            sessions: sessions(),
            ..HostTables::default()
        };
        for (&id, node) in &nodes {
            tables.vteps.insert(id, entry(node.slot(&config)));
            let overlay = u32::try_from(node.overlay).unwrap();
            tables.sources.insert(key(overlay, node.endpoint), Route::to(id));
            let [a, b, c, _] = pod(id);
            tables.prefixes.insert((overlay, 24, Ipv4::new([a, b, c, 0])), Route::to(id));
        }
        tables.vteps.entry(UNRESOLVED).and_modify(|vtep| vtep.slots[0].flags = VtepFlags::USED);
        tables.vteps.entry(BAD_HEADER).and_modify(|vtep| vtep.slots[0].header_len = 20);
        // The array of the kernel has every entry, all zero.
        for id in 0..subject::TABLE_SIZE {
            tables.vteps.entry(id).or_insert_with(Vtep::zeroed);
        }
        for (pod, node) in [(POD_OF_FREE, FREE), (POD_OF_NOWHERE, NOWHERE)] {
            let [a, b, c, _] = pod;
            tables.prefixes.insert((0, 24, Ipv4::new([a, b, c, 0])), Route::to(node));
        }
        tables.pods.insert(key(0, pod(PLAIN)), Route::to(PLAIN));
        tables.pods.insert(key(0, MOVED_POD), Route::to(TAGGED));
        let kernel = LocalAddress { kind: LocalAddress::KERNEL, ifindex: ports.own.index };
        for address in [rig::UNDERLAY, rig::UNDERLAY_OTHER, rig::UNDERLAY_SECOND, rig::GATEWAY] {
            tables.addresses.insert(Ipv4::new(address), kernel);
        }
        let overlay = LocalAddress { kind: LocalAddress::KERNEL | LocalAddress::OVERLAY, ifindex: 0 };
        for address in [OVERLAY_ADDRESS, CILIUM_ADDRESS] {
            tables.addresses.insert(Ipv4::new(address), overlay);
        }
        let snat = LocalAddress { kind: LocalAddress::SNAT | LocalAddress::OVERLAY, ifindex: 0 };
        for address in [SNAT, SNAT_TAGGED, SNAT_CILIUM, DRAINED].into_iter().chain(POOL) {
            tables.addresses.insert(Ipv4::new(address), snat);
        }
        let external = |port: rig::Port, vlan| Egress { ifindex: port.index, vlan, kind: Egress::EXTERNAL };
        tables.egress = BTreeMap::from([
            (ports.own.index, external(ports.own, 0)),
            (ports.second.index, external(ports.second, 0)),
            (ports.vlan.index, external(ports.second, VLAN_OUT)),
            (ports.inside.index, Egress { ifindex: ports.inside.index, vlan: 0, kind: 0 }),
            (ports.tunnel.index, Egress { ifindex: ports.tunnel.index, vlan: 0, kind: Egress::TUNNEL }),
        ]);
        Self { ports, tables, nodes }
    }

    /// The same under changed constants or tables, with session tables of its own.
    pub(crate) fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut changed = self.clone();
        changed.tables.sessions = sessions();
        change(&mut changed);
        changed
    }

    pub(crate) fn config(&self) -> &Config {
        &self.tables.config
    }

    /// Link header of frames that arrive from clients.
    pub(crate) fn client_link(&self) -> Link {
        Link::new(self.ports.own.mac, rig::CLIENT_MAC)
    }

    /// Link header of frames that arrive from the underlay.
    pub(crate) fn underlay_link(&self) -> Link {
        Link::new(self.ports.own.mac, NEXT_HOP)
    }

    /// Link header of frames that leave towards `CLIENT`.
    pub(crate) fn to_client(&self) -> Link {
        Link::new(rig::CLIENT_MAC, self.ports.second.mac)
    }
}

fn sessions() -> HostSessions {
    HostSessions { capacity: Some(subject::TABLE_SIZE as usize), ..HostSessions::default() }
}

pub(crate) fn key(overlay: u32, address: Address) -> OverlayAddress {
    OverlayAddress { overlay, address: Ipv4::new(address) }
}

fn config(ports: &Ports) -> Config {
    let overlay = |local, port, mac, vni, subnet: Address, flags| Overlay {
        local: Ipv4::new(local),
        port: Be16::new(port),
        mac: Mac::new(mac),
        vni: Vni::new(vni).unwrap(),
        pad: 0,
        subnet: Ipv4::new(subnet),
        mask: Ipv4::new([255, 255, 255, 0]),
        flags,
        snat_first: 0,
        snat_span: 0,
    };
    let check = OverlayFlags::SOURCE_CHECK.with(OverlayFlags::CLAMP_MSS);
    let cilium = check.with(OverlayFlags::ALLOW_GBP).with(OverlayFlags::DF_INHERIT);
    let mut config = Config {
        ifindex: ports.own.index,
        mac: ports.own.mac,
        roles: Roles::BOTH,
        address: Ipv4::new(rig::GATEWAY),
        vlan_count: 4,
        overlay_count: 4,
        overlays: [
            overlay(rig::UNDERLAY, 8472, [0x0e, 0x11, 0x22, 0x33, 0x44, 0x55], 1, [10, 244, 30, 0], check),
            overlay(rig::UNDERLAY, 8472, [0x06, 0xa6, 0x6e, 0xb5, 0x69, 0x2c], 2, [10, 0, 1, 0], cilium),
            overlay(
                rig::UNDERLAY_SECOND,
                4789,
                [0x0e, 2, 2, 2, 2, 2],
                0x00ab_cdef,
                [10, 61, 0, 0],
                OverlayFlags::NONE,
            ),
            overlay(rig::UNDERLAY, 8472, [0x0e, 3, 3, 3, 3, 3], 0, [10, 71, 0, 0], check),
        ],
        ..Config::UNSET
    };
    let vlans = [
        (VLAN_BOTH, Roles::BOTH),
        (VLAN_EXTERNAL, Roles::EXTERNAL),
        (VLAN_UNDERLAY, Roles::UNDERLAY),
        (VLAN_IDLE, Roles::NONE),
    ];
    for (port, (vlan, roles)) in config.vlans.iter_mut().zip(vlans) {
        *port = VlanPort { vlan, roles };
    }
    translate(&mut config, ports);
    config
}

/// Which clients are translated, and to what.
fn translate(config: &mut Config, ports: &Ports) {
    let addresses = [SNAT, POOL[0], POOL[1], POOL[2], SNAT_TAGGED, SNAT_CILIUM];
    for (place, address) in config.snat_addresses.iter_mut().zip(addresses) {
        *place = Ipv4::new(address);
    }
    let quarter = |last: u8| SnatRule {
        client: Ipv4::new([198, 51, 100, last]),
        client_mask: Ipv4::new([255, 255, 255, 192]),
        ..SnatRule::default()
    };
    let [a, b, c, _] = pod(TAGGED);
    let rules = [
        SnatRule {
            destination: Ipv4::new([a, b, c, 0]),
            destination_mask: Ipv4::new([255, 255, 255, 0]),
            first: 4,
            count: 1,
            ..quarter(0)
        },
        SnatRule { first: 0, count: 1, ..quarter(0) },
        SnatRule { first: 1, count: 3, ..quarter(64) },
        SnatRule { count: 0, ..quarter(128) },
        SnatRule { overlay: 1, first: 5, count: 1, ..quarter(0) },
    ];
    config.snat_rule_count = u32::try_from(rules.len()).unwrap();
    config.snat_rules[..rules.len()].copy_from_slice(&rules);
    for (overlay, first, last) in [(0, SNAT, DRAINED), (1, SNAT_CILIUM, SNAT_CILIUM)] {
        let [first, last] = [first, last].map(u32::from_be_bytes);
        config.overlays[overlay].snat_first = first;
        config.overlays[overlay].snat_span = last - first + 1;
    }
    config.port = OWN_PORT.into();
    // The interface takes jumbo frames, its clients do not.
    for (index, port) in [(OWN_PORT, ports.own), (SECOND_PORT, ports.second)] {
        config.ports[usize::from(index)] = Port { ifindex: port.index, mac: port.mac, mtu: 1500 };
    }
    config.session_slots = subject::TABLE_SIZE;
    config.timeouts = Timeouts::DEFAULT;
}

fn nodes(ports: &Ports) -> BTreeMap<u32, Node> {
    let own = Link::new(NEXT_HOP, ports.own.mac);
    let second = Link::new(NEXT_HOP, ports.second.mac);
    let plain = Node {
        overlay: 0,
        endpoint: [172, 16, 2, 10],
        mac: Mac::new([0xde, 0x70, 0xbc, 0xb6, 0xca, 0x8d]),
        link: own,
        ifindex: ports.own.index,
        mtu: 1450,
        tos: 0,
        ttl: 64,
        dont_fragment: false,
        direct: false,
    };
    let node = |id: u8| Node {
        endpoint: [172, 16, 2, 10 + id],
        mac: Mac::new([0xde, 0x70, 0xbc, 0xb6, 0xca, id]),
        ..plain.clone()
    };
    let tagged = Node {
        link: second.tagged(VLAN_OUT),
        ifindex: ports.second.index,
        // Expedited forwarding, a short way, and a path that takes jumbo frames.
        tos: 0xb8,
        ttl: 9,
        dont_fragment: true,
        mtu: 8950,
        ..node(2)
    };
    BTreeMap::from([
        (PLAIN, plain.clone()),
        (TAGGED, tagged),
        (DIRECT, Node { direct: true, mtu: 1500, ..node(3) }),
        (
            DIRECT_TAGGED,
            Node {
                direct: true,
                mtu: 1500,
                link: second.tagged(VLAN_OUT),
                ifindex: ports.second.index,
                ..node(4)
            },
        ),
        (UNRESOLVED, node(5)),
        (
            CILIUM,
            Node {
                overlay: 1,
                mac: Mac::new([0x82, 0x36, 0x4c, 0x98, 0x2e, 0x56]),
                link: second,
                ifindex: ports.second.index,
                ..node(7)
            },
        ),
        (OTHER_PORT, Node { overlay: 2, ..node(8) }),
        (VNI_ZERO, Node { overlay: 3, ..node(9) }),
        (BAD_HEADER, node(10)),
    ])
}
