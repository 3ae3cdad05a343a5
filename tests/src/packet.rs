//! Frames as etherparse writes them: nothing here is code of the gateway. For tests that know what they build: what
//! cannot be built panics.

use etherparse::{
    ArpEthIpv4Packet, ArpOperation, ArpPacket, EtherType, Ethernet2Header, IcmpEchoHeader, Icmpv4Header,
    Icmpv4Type, IpDscp, IpEcn, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, SingleVlanHeader, TcpHeader,
    UdpHeader, VlanId, VlanPcp, icmpv4::DestUnreachableHeader,
};
use gateway_common::wire::Mac;

/// An IPv4 address.
pub type Address = [u8; 4];

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;
/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;

/// TCP flag FIN (RFC 9293 section 3.1).
pub const FIN: u8 = 1;
/// TCP flag SYN.
pub const SYN: u8 = 2;
/// TCP flag RST.
pub const RST: u8 = 4;
/// TCP flag ACK.
pub const ACK: u8 = 16;

/// Bytes from hexadecimal digits.
pub fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// An IPv4 packet before it becomes bytes.
#[derive(Clone, Debug)]
pub struct Ip {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Time to live.
    pub ttl: u8,
    /// Type of service: DSCP and ECN.
    pub tos: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Identification.
    pub id: u16,
    /// DF.
    pub dont_fragment: bool,
    /// MF.
    pub more_fragments: bool,
    /// Fragment offset in units of 8 bytes.
    pub offset: u16,
    /// Options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// Behind the IP header.
    pub payload: Vec<u8>,
}

impl Ip {
    /// A packet without options.
    pub fn new(source: Address, destination: Address, protocol: u8, payload: Vec<u8>) -> Self {
        Self {
            source,
            destination,
            ttl: 64,
            tos: 0,
            protocol,
            id: 0,
            dont_fragment: false,
            more_fragments: false,
            offset: 0,
            options: Vec::new(),
            payload,
        }
    }

    /// A UDP packet with a right checksum.
    pub fn udp(source: Address, destination: Address, ports: (u16, u16), data: &[u8]) -> Self {
        let mut packet = Self::new(source, destination, UDP, Vec::new());
        let ip = packet.header();
        let header = UdpHeader::with_ipv4_checksum(ports.0, ports.1, &ip, data).unwrap();
        packet.payload = [&header.to_bytes(), data].concat();
        packet
    }

    /// A TCP segment with a right checksum.
    pub fn tcp(source: Address, destination: Address, ports: (u16, u16), data: &[u8]) -> Self {
        let mut packet = Self::new(source, destination, TCP, Vec::new());
        let mut header = TcpHeader::new(ports.0, ports.1, 1, 64_240);
        header.checksum = header.calc_checksum_ipv4(&packet.header(), data).unwrap();
        packet.payload = [&header.to_bytes(), data].concat();
        packet
    }

    /// A SYN with these options, filled up with zero bytes, and a right checksum.
    pub fn syn(source: Address, destination: Address, options: &[u8]) -> Self {
        let mut packet = Self::new(source, destination, TCP, Vec::new());
        let mut header = TcpHeader::new(40_000, 80, 1, 64_240);
        header.syn = true;
        header.set_options_raw(options).unwrap();
        header.checksum = header.calc_checksum_ipv4(&packet.header(), &[]).unwrap();
        packet.payload = header.to_bytes().to_vec();
        packet
    }

    /// A TCP segment with these flags, sequence and acknowledgement numbers, and a right checksum.
    pub fn segment(
        source: Address,
        destination: Address,
        ports: (u16, u16),
        flags: u8,
        numbers: (u32, u32),
        data: &[u8],
    ) -> Self {
        let mut packet = Self::new(source, destination, TCP, Vec::new());
        let mut header = TcpHeader::new(ports.0, ports.1, numbers.0, 64_240);
        header.acknowledgment_number = numbers.1;
        header.fin = flags & FIN != 0;
        header.syn = flags & SYN != 0;
        header.rst = flags & RST != 0;
        header.ack = flags & ACK != 0;
        header.checksum = header.calc_checksum_ipv4(&packet.header(), data).unwrap();
        packet.payload = [&header.to_bytes(), data].concat();
        packet
    }

    /// The ICMP error of a host or router at `from` about `packet`, of which `quoted` bytes come back.
    pub fn error(from: Address, kind: Icmpv4Type, packet: &Self, quoted: usize) -> Self {
        Self::error_to(packet.source, from, kind, &packet.bytes()[..quoted])
    }

    /// The ICMP error to `to` that quotes these bytes.
    pub fn error_to(to: Address, from: Address, kind: Icmpv4Type, quoted: &[u8]) -> Self {
        let header = Icmpv4Header::with_checksum(kind, quoted);
        Self::new(from, to, ICMP, [&header.to_bytes(), quoted].concat())
    }

    /// The error of a router at `from` about `packet`, which does not fit `mtu` bytes (RFC 1191 section 4): the IP header
    /// and eight bytes come back as they were.
    pub fn too_big(from: Address, packet: &Self, mtu: u16) -> Self {
        let kind = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: mtu };
        let quoted = &packet.bytes()[..28];
        let header = Icmpv4Header::with_checksum(Icmpv4Type::DestinationUnreachable(kind), quoted);
        // RFC 1812 section 4.3.2.5: precedence 6.
        Self { tos: 0xc0, ..Self::new(from, packet.source, ICMP, [&header.to_bytes(), quoted].concat()) }
    }

    /// An echo request.
    pub fn echo(source: Address, destination: Address, id: u16, data: &[u8]) -> Self {
        let kind = Icmpv4Type::EchoRequest(IcmpEchoHeader { id, seq: 1 });
        let header = Icmpv4Header::with_checksum(kind, data);
        Self::new(source, destination, ICMP, [&header.to_bytes(), data].concat())
    }

    /// An echo reply.
    pub fn echo_reply(source: Address, destination: Address, id: u16, data: &[u8]) -> Self {
        let kind = Icmpv4Type::EchoReply(IcmpEchoHeader { id, seq: 1 });
        let header = Icmpv4Header::with_checksum(kind, data);
        Self::new(source, destination, ICMP, [&header.to_bytes(), data].concat())
    }

    fn header(&self) -> Ipv4Header {
        let mut header = Ipv4Header {
            dscp: IpDscp::try_new(self.tos >> 2).unwrap(),
            ecn: IpEcn::try_new(self.tos & 3).unwrap(),
            identification: self.id,
            dont_fragment: self.dont_fragment,
            more_fragments: self.more_fragments,
            fragment_offset: IpFragOffset::try_new(self.offset).unwrap(),
            time_to_live: self.ttl,
            protocol: IpNumber(self.protocol),
            source: self.source,
            destination: self.destination,
            options: Ipv4Options::try_from(self.options.as_slice()).unwrap(),
            ..Ipv4Header::default()
        };
        header.set_payload_len(self.payload.len()).unwrap();
        header.header_checksum = header.calc_header_checksum();
        header
    }

    /// The packet's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        [&self.header().to_bytes(), self.payload.as_slice()].concat()
    }

    /// The packet one router further.
    pub fn hop(&self) -> Self {
        Self { ttl: self.ttl - 1, ..self.clone() }
    }
}

/// Addresses and tag in front of a network layer.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Destination address.
    pub destination: Mac,
    /// Source address.
    pub source: Mac,
    /// VLAN id of an 802.1Q tag; 0 is a priority tag.
    pub vlan: Option<u16>,
}

impl Link {
    /// Without a tag.
    pub const fn new(destination: Mac, source: Mac) -> Self {
        Self { destination, source, vlan: None }
    }

    /// The same with this tag.
    pub fn tagged(self, vlan: u16) -> Self {
        Self { vlan: Some(vlan), ..self }
    }

    /// Bytes of the header.
    pub fn length(self) -> usize {
        if self.vlan.is_some() { 18 } else { 14 }
    }

    /// A frame of EtherType `kind`.
    pub fn frame(self, kind: u16, payload: &[u8]) -> Vec<u8> {
        let (source, destination) = (self.source.octets, self.destination.octets);
        let Some(vlan) = self.vlan else {
            return [
                &Ethernet2Header { source, destination, ether_type: EtherType(kind) }.to_bytes(),
                payload,
            ]
            .concat();
        };
        let ethernet = Ethernet2Header { source, destination, ether_type: EtherType::VLAN_TAGGED_FRAME };
        let tag = SingleVlanHeader {
            pcp: VlanPcp::ZERO,
            drop_eligible_indicator: false,
            vlan_id: VlanId::try_new(vlan).unwrap(),
            ether_type: EtherType(kind),
        };
        [&ethernet.to_bytes(), tag.to_bytes().as_slice(), payload].concat()
    }

    /// A frame with an IPv4 packet.
    pub fn ip(self, packet: &Ip) -> Vec<u8> {
        self.frame(IPV4, &packet.bytes())
    }
}

/// The VXLAN header of RFC 7348 section 5.
pub fn vxlan_header(vni: u32) -> [u8; 8] {
    let [_, a, b, c] = vni.to_be_bytes();
    [0x08, 0, 0, 0, a, b, c, 0]
}

/// A VXLAN datagram: UDP with checksum 0, VXLAN, inner frame.
pub fn vxlan(source_port: u16, port: u16, header: [u8; 8], inner: &[u8]) -> Vec<u8> {
    let udp = UdpHeader::without_ipv4_checksum(source_port, port, header.len() + inner.len()).unwrap();
    [&udp.to_bytes(), header.as_slice(), inner].concat()
}

/// What an ARP packet says.
#[derive(Clone, Copy, Debug)]
pub struct Arp {
    /// 1 asks, 2 answers.
    pub operation: u16,
    /// MAC address of the sender.
    pub sender_mac: Mac,
    /// Address of the sender.
    pub sender: Address,
    /// MAC address of the target, if it is known.
    pub target_mac: Mac,
    /// Address of the target.
    pub target: Address,
}

impl Arp {
    /// Who has `target`?
    pub const fn request(sender_mac: Mac, sender: Address, target: Address) -> Self {
        Self { operation: 1, sender_mac, sender, target_mac: Mac::ZERO, target }
    }

    /// The answer that says the target is at `mac`.
    pub const fn answered(self, mac: Mac) -> Self {
        Self {
            operation: 2,
            sender_mac: mac,
            sender: self.target,
            target_mac: self.sender_mac,
            target: self.sender,
        }
    }

    /// The packet's bytes.
    pub fn bytes(self) -> Vec<u8> {
        let packet = ArpPacket::from(ArpEthIpv4Packet {
            operation: ArpOperation(self.operation),
            sender_mac: self.sender_mac.octets,
            sender_ipv4: self.sender,
            target_mac: self.target_mac.octets,
            target_ipv4: self.target,
        });
        packet.to_bytes().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The headers that etherparse does not write, against RFC 7348 section 5 written out.
    #[test]
    fn vxlan_headers() {
        let written = [
            (0, "0800000000000000"),
            (1, "0800000000000100"),
            (2, "0800000000000200"),
            (4096, "0800000000100000"),
            (0x00ab_cdef, "08000000abcdef00"),
        ];
        for (vni, bytes) in written {
            assert_eq!(vxlan_header(vni).to_vec(), hex(bytes));
        }
    }
}
