//! What tells a packet's session: addresses, ports, protocol.

use network_types::ip::Ipv4Hdr;

use crate::{
    abi::{ForwardKey, ReverseKey},
    engine::{
        Frame,
        classify::{FRAGMENT_BITS, ICMP, Packet, TCP, UDP},
    },
    wire::{Be16, Ipv4},
};

/// Headers as long as they must be at least.
pub(super) const TCP_HEADER: usize = 20;
pub(super) const SHORT_HEADER: usize = 8;
/// An ICMP error quotes from here.
pub(super) const QUOTE: usize = 8;

const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const ECHO_REQUEST: u8 = 8;
const TIME_EXCEEDED: u8 = 11;
const PARAMETER_PROBLEM: u8 = 12;

/// A packet's flow, from its sender's point of view.
#[derive(Clone, Copy)]
pub(super) struct Tuple {
    pub source: Ipv4,
    pub destination: Ipv4,
    pub source_port: Be16,
    pub destination_port: Be16,
    pub protocol: u8,
}

/// What a TCP segment says of its connection. Zero for other protocols.
#[derive(Clone, Copy, Default)]
pub(super) struct Segment {
    pub flags: u8,
    pub sequence: u32,
    pub acknowledgement: u32,
    /// Bytes of payload.
    pub len: u32,
}

impl Segment {
    pub(super) const FIN: u8 = 1;
    pub(super) const SYN: u8 = 2;
    pub(super) const RST: u8 = 4;
    pub(super) const ACK: u8 = 16;

    /// Whether any of these flags is set.
    #[inline(always)]
    pub(super) const fn any(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }

    /// The sequence number behind the segment: what acknowledges all of it.
    #[inline(always)]
    pub(super) const fn end(&self) -> u32 {
        let phantom = (self.flags & Self::SYN != 0) as u32 + (self.flags & Self::FIN != 0) as u32;
        self.sequence.wrapping_add(self.len).wrapping_add(phantom)
    }
}

/// What a packet is to address translation.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// Of a flow.
    Flow(Tuple, Segment),
    /// An ICMP error that quotes a packet of this flow.
    Error(Tuple),
    /// Cannot be translated.
    Fragment,
    /// Cannot be translated.
    Other,
    /// Its transport header is not whole.
    Malformed,
    /// IPv4 options.
    Options,
}

impl Tuple {
    /// The key of the session if the packet is a client's.
    #[inline(always)]
    pub(super) const fn forward_key(&self) -> ForwardKey {
        ForwardKey {
            client: self.source,
            destination: self.destination,
            client_port: self.source_port,
            destination_port: self.destination_port,
            protocol: self.protocol as u16,
            pad: 0,
        }
    }

    /// The key of the session if the packet is a pod's.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "overlay ids are below MAX_OVERLAYS")]
    pub(super) const fn reverse_key(&self, overlay: u32) -> ReverseKey {
        ReverseKey {
            pod: self.source,
            address: self.destination,
            pod_port: self.source_port,
            port: self.destination_port,
            protocol: self.protocol as u16,
            overlay: overlay as u16,
        }
    }

    /// The flow of the answers.
    #[inline(always)]
    pub(super) const fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..self
        }
    }
}

/// Which side sent the packet. An echo's identifier stands for the client's port, the pod's is 0.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Pod,
}

/// Looks at the transport header of `packet`, which `side` sent.
#[inline(always)]
pub(super) fn kind<F: Frame>(frame: &F, packet: Packet, side: Side) -> Kind {
    if packet.has_options() {
        return Kind::Options;
    }
    if packet.is_fragment() {
        return Kind::Fragment;
    }
    let at = packet.transport();
    let carried = usize::from(packet.total_len).wrapping_sub(size_of::<Ipv4Hdr>());
    match packet.protocol {
        TCP => tcp(frame, packet, at, carried),
        UDP => match frame.read::<[u8; SHORT_HEADER]>(at) {
            Some(&[a, b, c, d, ..]) if carried >= SHORT_HEADER => {
                Kind::Flow(ports(packet, UDP, [a, b], [c, d]), Segment::default())
            }
            _ => Kind::Malformed,
        },
        ICMP => match frame.read::<[u8; SHORT_HEADER]>(at) {
            Some(&[kind, _, _, _, high, low, _, _]) if carried >= SHORT_HEADER => match (kind, side) {
                (ECHO_REQUEST, Side::Client) => {
                    Kind::Flow(ports(packet, ICMP, [high, low], [0, 0]), Segment::default())
                }
                (ECHO_REPLY, Side::Pod) => {
                    Kind::Flow(ports(packet, ICMP, [0, 0], [high, low]), Segment::default())
                }
                (UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM, _) => quoted(frame, packet, carried, side),
                _ => Kind::Other,
            },
            _ => Kind::Malformed,
        },
        _ => Kind::Other,
    }
}

#[inline(always)]
const fn ports(packet: Packet, protocol: u8, source: [u8; 2], destination: [u8; 2]) -> Tuple {
    Tuple {
        source: packet.source,
        destination: packet.destination,
        source_port: Be16 { bytes: source },
        destination_port: Be16 { bytes: destination },
        protocol,
    }
}

#[inline(always)]
fn tcp<F: Frame>(frame: &F, packet: Packet, at: usize, carried: usize) -> Kind {
    let Some(header) = frame.read::<[u8; TCP_HEADER]>(at) else {
        return Kind::Malformed;
    };
    let header_len = usize::from(header[12] >> 4) * 4;
    if header_len < TCP_HEADER || carried < header_len {
        return Kind::Malformed;
    }
    let segment = Segment {
        flags: header[13],
        sequence: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
        acknowledgement: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
        len: carried.wrapping_sub(header_len) as u32,
    };
    Kind::Flow(ports(packet, TCP, [header[0], header[1]], [header[2], header[3]]), segment)
}

/// The flow of the packet that an ICMP error quotes; its sender got the error.
#[inline(always)]
fn quoted<F: Frame>(frame: &F, packet: Packet, carried: usize, side: Side) -> Kind {
    const SHORTEST: usize = QUOTE + size_of::<Ipv4Hdr>() + SHORT_HEADER;
    if carried < SHORTEST {
        return Kind::Malformed;
    }
    let at = packet.transport() + QUOTE;
    let Some(ip) = frame.read::<Ipv4Hdr>(at) else {
        return Kind::Malformed;
    };
    let Some(&[a, b, c, d, e, f, ..]) = frame.read::<[u8; SHORT_HEADER]>(at + size_of::<Ipv4Hdr>()) else {
        return Kind::Malformed;
    };
    // What has options or is a fragment was not translated; an error goes to whom the quoted packet came from.
    let source = Ipv4::new(ip.src_addr);
    if ip.vihl != 0x45 || u16::from_be_bytes(ip.frags) & FRAGMENT_BITS != 0 || source != packet.destination {
        return Kind::Other;
    }
    let (source_port, destination_port) = match (ip.proto, a, side) {
        (TCP | UDP, _, _) => ([a, b], [c, d]),
        // A pod's reply comes back to the pod, a client's request to the client.
        (ICMP, ECHO_REPLY, Side::Client) => ([0, 0], [e, f]),
        (ICMP, ECHO_REQUEST, Side::Pod) => ([e, f], [0, 0]),
        _ => return Kind::Other,
    };
    Kind::Error(Tuple {
        source,
        destination: Ipv4::new(ip.dst_addr),
        source_port: Be16 { bytes: source_port },
        destination_port: Be16 { bytes: destination_port },
        protocol: ip.proto,
    })
}
