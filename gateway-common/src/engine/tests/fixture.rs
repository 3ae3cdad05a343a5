//! One gateway, one-armed, with two nodes; and frames made by etherparse.

use etherparse::{EtherType, Ethernet2Header, IpFragOffset, IpNumber, Ipv4Header, PacketBuilder, UdpHeader};

use crate::{
    abi::{
        Class, Config, Egress, LocalAddress, Outcome, Overlay, OverlayAddress, OverlayFlags, Prefix, Roles,
        Route, Vtep, VtepFlags, VtepSlot,
    },
    checksum::Sum,
    engine::{Action, Fib, Verdict},
    model::{FibEntry, HostTables},
    wire::{Be16, Ipv4, Mac, Vni},
};

pub(super) const IFINDEX: u32 = 7;
pub(super) const OUTSIDE: u32 = 8;
pub(super) const NIC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
pub(super) const NODE_NIC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x0a];
pub(super) const CLIENT_NIC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x77];
pub(super) const VTEP: [u8; 6] = [0x0e, 0x11, 0x22, 0x33, 0x44, 0x55];
pub(super) const NODE_VTEP: [u8; 6] = [0xde, 0x70, 0xbc, 0xb6, 0xca, 0x8d];
pub(super) const LOCAL: [u8; 4] = [172, 16, 2, 200];
pub(super) const NODE: [u8; 4] = [172, 16, 2, 10];
pub(super) const OTHER_NODE: [u8; 4] = [172, 16, 2, 11];
pub(super) const CLIENT: [u8; 4] = [10, 244, 30, 15];
pub(super) const POD: [u8; 4] = [10, 244, 1, 2];
/// In the node's podCIDR, but in no pod table.
pub(super) const UNLISTED_POD: [u8; 4] = [10, 244, 1, 200];
pub(super) const OTHER_POD: [u8; 4] = [10, 244, 2, 2];
pub(super) const OVERLAY_ADDRESS: [u8; 4] = [10, 244, 30, 0];
/// Of the interface.
pub(super) const ADDRESS: [u8; 4] = [10, 244, 30, 1];
pub(super) const PORT: u16 = 8472;
pub(super) const NODE_ID: u32 = 1;
pub(super) const OTHER_ID: u32 = 2;

/// The finished header of a VTEP as the daemon writes it, by etherparse.
pub(super) fn slot(node: [u8; 4], tos: u8, dont_fragment: bool) -> VtepSlot {
    let mut ip = Ipv4Header::new(0, 64, IpNumber::UDP, LOCAL, node).unwrap();
    ip.dscp = (tos >> 2).try_into().unwrap();
    ip.dont_fragment = dont_fragment;
    ip.total_len = 0;
    let mut bytes = Vec::new();
    Ethernet2Header { destination: NODE_NIC, source: NIC, ether_type: EtherType::IPV4 }
        .write(&mut bytes)
        .unwrap();
    ip.write_raw(&mut bytes).unwrap();
    UdpHeader { source_port: 0, destination_port: PORT, length: 0, checksum: 0 }.write(&mut bytes).unwrap();
    bytes.extend([8, 0, 0, 0, 0, 0, 1, 0]);
    Ethernet2Header { destination: NODE_VTEP, source: VTEP, ether_type: EtherType::IPV4 }
        .write(&mut bytes)
        .unwrap();
    let checksum_base = Sum::of(&bytes[14..34]).fold();
    let header_len = u16::try_from(bytes.len()).unwrap();
    bytes.resize(88, 0);
    VtepSlot {
        overlay: 0,
        flags: VtepFlags::USED.with(VtepFlags::READY),
        ifindex: IFINDEX,
        header_len,
        mtu: 1450,
        checksum_base,
        ip_offset: 14,
        header: bytes.try_into().unwrap(),
        endpoint: Ipv4::new(node),
        mac: Mac::new(NODE_VTEP),
        next_hop: Mac::new(NODE_NIC),
    }
}

pub(super) fn vtep(slot: VtepSlot) -> Vtep {
    Vtep { active: 0, generation: 1, slots: [slot, bytemuck::zeroed()] }
}

fn key(address: [u8; 4]) -> OverlayAddress {
    OverlayAddress { overlay: 0, address: Ipv4::new(address) }
}

pub(super) fn gateway() -> HostTables {
    let overlay = Overlay {
        local: Ipv4::new(LOCAL),
        port: Be16::new(PORT),
        mac: Mac::new(VTEP),
        vni: Vni::new(1).unwrap(),
        pad: 0,
        subnet: Ipv4::new([10, 244, 30, 0]),
        mask: Ipv4::new([255, 255, 255, 0]),
        flags: OverlayFlags::SOURCE_CHECK,
        snat_first: 0,
        snat_span: 0,
    };
    let mut config = Config::UNSET;
    config.ifindex = IFINDEX;
    config.mac = Mac::new(NIC);
    config.address = Ipv4::new(ADDRESS);
    config.roles = Roles::BOTH;
    config.overlay_count = 1;
    config.overlays[0] = overlay;
    let outward =
        Fib::Forward { ifindex: OUTSIDE, source: Mac::new(NIC), next_hop: Mac::new(CLIENT_NIC), mtu: 1500 };
    HostTables {
        config,
        pods: [(key(POD), Route::to(NODE_ID)), (key(OTHER_POD), Route::to(OTHER_ID))].into(),
        prefixes: [
            ((0, 24, Ipv4::new([10, 244, 1, 0])), Route::to(NODE_ID)),
            ((0, 24, Ipv4::new([10, 244, 2, 0])), Route::to(OTHER_ID)),
        ]
        .into(),
        vteps: [(NODE_ID, vtep(slot(NODE, 0, false))), (OTHER_ID, vtep(slot(OTHER_NODE, 0, false)))].into(),
        sources: [(key(NODE), Route::to(NODE_ID)), (key(OTHER_NODE), Route::to(OTHER_ID))].into(),
        addresses: [
            (Ipv4::new(LOCAL), LocalAddress { kind: LocalAddress::KERNEL, ifindex: IFINDEX }),
            (
                Ipv4::new(OVERLAY_ADDRESS),
                LocalAddress { kind: LocalAddress::KERNEL | LocalAddress::OVERLAY, ifindex: 9 },
            ),
        ]
        .into(),
        egress: [(OUTSIDE, Egress { ifindex: OUTSIDE, vlan: 0, kind: Egress::EXTERNAL })].into(),
        fib: [(Ipv4::new(CLIENT), FibEntry { answer: outward, mtu: 1500 })].into(),
        icmp_allowance: std::cell::Cell::new(u32::MAX),
        ..HostTables::default()
    }
}

/// Lets the kernel take a prefix for itself.
pub(super) fn set_local_prefix(tables: &mut HostTables, network: [u8; 4], length: u32) {
    let mask = Ipv4::new((u32::MAX << (32 - length)).to_be_bytes());
    tables.config.local_prefixes[0] = Prefix { network: Ipv4::new(network), mask };
    tables.config.local_prefix_count = 1;
}

/// A UDP packet as a host sends it.
pub(super) fn udp(
    source: [u8; 4],
    destination: [u8; 4],
    ttl: u8,
    tos: u8,
    ports: (u16, u16),
    data: &[u8],
) -> Vec<u8> {
    let mut ip = Ipv4Header::new(0, ttl, IpNumber::UDP, source, destination).unwrap();
    ip.dscp = (tos >> 2).try_into().unwrap();
    ip.ecn = (tos & 3).try_into().unwrap();
    ip.fragment_offset = IpFragOffset::ZERO;
    let mut bytes = Vec::new();
    PacketBuilder::ip(etherparse::IpHeaders::Ipv4(ip, etherparse::Ipv4Extensions::default()))
        .udp(ports.0, ports.1)
        .write(&mut bytes, data)
        .unwrap();
    bytes
}

pub(super) fn ethernet(destination: [u8; 6], source: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Ethernet2Header { destination, source, ether_type: EtherType(kind) }.to_bytes().to_vec();
    bytes.extend(payload);
    bytes
}

/// A client's UDP packet on its way to a pod.
pub(super) fn client_udp(ttl: u8, tos: u8, ports: (u16, u16), data: &[u8]) -> Vec<u8> {
    ethernet(NIC, CLIENT_NIC, 0x0800, &udp(CLIENT, POD, ttl, tos, ports, data))
}

/// An inner frame in VXLAN, as a node's kernel sends it.
pub(super) fn tunnel(node: [u8; 4], outer_tos: u8, vxlan: [u8; 8], inner: &[u8]) -> Vec<u8> {
    let mut payload = vxlan.to_vec();
    payload.extend(inner);
    ethernet(NIC, NODE_NIC, 0x0800, &udp(node, LOCAL, 64, outer_tos, (40_000, PORT), &payload))
}

pub(super) const VNI_1: [u8; 8] = [8, 0, 0, 0, 0, 0, 1, 0];

/// A pod's answer in the tunnel.
pub(super) fn pod_udp(outer_tos: u8, ttl: u8, tos: u8, data: &[u8]) -> Vec<u8> {
    let inner = ethernet(VTEP, NODE_VTEP, 0x0800, &udp(POD, CLIENT, ttl, tos, (80, 5555), data));
    tunnel(NODE, outer_tos, VNI_1, &inner)
}

/// Runs the engine, and checks what holds for every frame: the action is of the outcome's class, one packet is
/// counted, and what passes is as it came.
pub(super) fn run(tables: &HostTables, frame: &[u8]) -> (Outcome, Action, Vec<u8>) {
    let before: u64 = tables.counters.borrow().values().map(|counter| counter.packets).sum();
    let (verdict, after) = tables.run(frame);
    let info = checked(verdict, frame, &after);
    let counted: u64 = tables.counters.borrow().values().map(|counter| counter.packets).sum();
    assert_eq!(counted, before + 1);
    (info, verdict.action(), after)
}

fn checked(verdict: Verdict, before: &[u8], after: &[u8]) -> Outcome {
    let info = verdict.info().expect("every verdict has an outcome");
    let class = match verdict.action() {
        Action::Pass => Class::Pass,
        Action::Drop => Class::Drop,
        Action::Transmit | Action::Redirect(_) => Class::Forward,
    };
    assert_eq!(info.class, class, "{verdict:?}");
    if class == Class::Pass {
        assert_eq!(before, after, "{verdict:?} must leave the frame as it came");
    }
    info.outcome
}

/// The outcome alone.
pub(super) fn outcome(tables: &HostTables, frame: &[u8]) -> Outcome {
    run(tables, frame).0
}
