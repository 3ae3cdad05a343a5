//! Who is where, flows between them, and their frames as clients and nodes send them. All frames are written by etherparse.

use gateway_common::{
    abi::{ForwardKey, ReverseKey},
    wire::{Be16, Ipv4, Mac},
};

use crate::packet::{ACK, Address, Ip, Link, SYN, TCP, UDP, vxlan, vxlan_header};

/// Interface that faces the clients.
pub(super) const EXTERNAL: &str = "eth0";
/// Interface that faces the nodes.
pub(super) const UNDERLAY: &str = "eth1";
/// Underlay address, the VTEP's.
pub(super) const LOCAL: Ipv4 = Ipv4::new([172, 16, 2, 200]);
/// Who sends frames from outside.
pub(super) const CLIENT_MAC: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0xc1]);
/// The underlay's router.
pub(super) const ROUTER_MAC: Mac = Mac::new([0x52, 0x54, 0, 0, 0, 0x0a]);
/// How many clients take turns.
pub(super) const CLIENTS: usize = 16;

/// A client that pods can answer: of the gateway's own subnet.
pub(super) fn own_client(index: usize) -> Ipv4 {
    Ipv4::new([10, 244, 30, 64 + u8::try_from(index % CLIENTS).expect("below 16")])
}

/// MAC address of the gateway's VTEP.
pub(super) const VTEP_MAC: Mac = Mac::new([0x0e, 0x11, 0x22, 0x33, 0x44, 0x55]);
/// Flannel's port and VNI.
const PORT: u16 = 8472;
const VNI: u32 = 1;
/// What pods listen on.
const SERVICE: u16 = 80;
/// In every segment of an established connection.
const DATA: &[u8; 6] = b"6bytes";
/// Sequence numbers of a connection's first segments.
const CLIENT_SEQUENCE: u32 = 1000;
const POD_SEQUENCE: u32 = 5000;

/// First host number of pods that are in the table.
pub(super) const POD: u8 = 2;
/// First host number of addresses that only the node's CIDR covers.
pub(super) const UNKNOWN_POD: u8 = 200;

/// Network address of a node's pod CIDR, a /24.
pub(super) fn cidr(node: u32) -> Ipv4 {
    Ipv4::new((0x0a40_0000 + (node << 8)).to_be_bytes())
}

/// Tunnel address of a node.
pub(super) fn endpoint(node: u32) -> Ipv4 {
    Ipv4::new((0xac14_0001 + node).to_be_bytes())
}

/// MAC address of a node's VTEP.
pub(super) fn node_mac(node: u32) -> Mac {
    let [a, b, c, d] = node.to_be_bytes();
    Mac::new([0x0e, 0x02, a, b, c, d])
}

/// A flow. The numbers are taken apart as the driver does (`gateway-ebpf/src/reference/driver.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flow {
    /// The pod's node, 0 or 1.
    pub(super) node: u32,
    /// The pod.
    pub(super) pod: Address,
    /// Which client.
    pub(super) client: usize,
    /// The client's port.
    pub(super) port: u16,
}

impl Flow {
    pub(super) fn new(number: u32, first_pod: u8, first_port: u16) -> Self {
        let node = number & 1;
        let [a, b, c, _] = cidr(node).octets;
        let host = first_pod + u8::try_from(number >> 1 & 3).expect("two bits");
        Self {
            node,
            pod: [a, b, c, host],
            client: usize::try_from(number >> 3).expect("fits") & (CLIENTS - 1),
            port: first_port.wrapping_add(u16::try_from(number >> 7).expect("at most 2^23 flows")),
        }
    }

    pub(super) fn forward_key(self, client: Ipv4) -> ForwardKey {
        ForwardKey {
            client,
            destination: Ipv4::new(self.pod),
            client_port: Be16::new(self.port),
            destination_port: Be16::new(SERVICE),
            protocol: TCP.into(),
            pad: 0,
        }
    }

    pub(super) fn reverse_key(self, snat: Ipv4) -> ReverseKey {
        ReverseKey {
            pod: Ipv4::new(self.pod),
            address: snat,
            pod_port: Be16::new(SERVICE),
            port: Be16::new(self.port),
            protocol: TCP.into(),
            overlay: 0,
        }
    }

    /// A segment from the clients' side.
    pub(super) fn upstream(self, client: Ipv4, kind: Kind) -> Ip {
        let (flags, numbers, data) = match kind {
            Kind::Syn => (SYN, (CLIENT_SEQUENCE, 0), &[][..]),
            Kind::Ack => (ACK, (CLIENT_SEQUENCE + 1, POD_SEQUENCE + 1), &[][..]),
            Kind::Data => (ACK, (CLIENT_SEQUENCE + 1, POD_SEQUENCE + 1), &DATA[..]),
        };
        Ip::segment(client.octets, self.pod, (self.port, SERVICE), flags, numbers, data)
    }

    /// A segment from the pod.
    pub(super) fn downstream(self, client: Ipv4, kind: Kind) -> Ip {
        let (flags, numbers, data) = match kind {
            Kind::Syn => (SYN | ACK, (POD_SEQUENCE, CLIENT_SEQUENCE + 1), &[][..]),
            Kind::Ack => (ACK, (POD_SEQUENCE + 1, CLIENT_SEQUENCE + 1), &[][..]),
            Kind::Data => (ACK, (POD_SEQUENCE + 1, CLIENT_SEQUENCE + 1), &DATA[..]),
        };
        Ip::segment(self.pod, client.octets, (SERVICE, self.port), flags, numbers, data)
    }
}

/// What a segment does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Asks for a connection; from the pod, agrees to it.
    Syn,
    /// Completes the handshake.
    Ack,
    /// Carries data.
    Data,
}

/// The frame by which a client sends a packet to the gateway.
pub(super) fn plain(external: Mac, packet: &Ip) -> Vec<u8> {
    Link::new(external, CLIENT_MAC).ip(packet)
}

/// The frame by which the gateway sends a packet to a client.
pub(super) fn plain_out(external: Mac, packet: &Ip) -> Vec<u8> {
    Link::new(CLIENT_MAC, external).ip(packet)
}

/// The frame by which a node sends a packet of a pod to the gateway.
pub(super) fn tunnelled(underlay: Mac, node: u32, packet: &Ip) -> Vec<u8> {
    tunnelled_from(underlay, endpoint(node), node_mac(node), packet)
}

/// The same from any tunnel address.
pub(super) fn tunnelled_from(underlay: Mac, from: Ipv4, mac: Mac, packet: &Ip) -> Vec<u8> {
    let inner = Link::new(VTEP_MAC, mac).ip(packet);
    let datagram = vxlan(49_999, PORT, vxlan_header(VNI), &inner);
    Link::new(underlay, ROUTER_MAC).ip(&Ip::new(from.octets, LOCAL.octets, UDP, datagram))
}

/// The frame by which the gateway sends a packet to a node. `source_port` is whatever the program chose.
pub(super) fn tunnelled_out(underlay: Mac, node: u32, packet: &Ip, source_port: u16) -> Vec<u8> {
    let inner = Link::new(node_mac(node), VTEP_MAC).ip(packet);
    let datagram = vxlan(source_port, PORT, vxlan_header(VNI), &inner);
    Link::new(ROUTER_MAC, underlay).ip(&Ip::new(LOCAL.octets, endpoint(node).octets, UDP, datagram))
}
