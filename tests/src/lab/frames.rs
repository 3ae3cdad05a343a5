//! Frames built layer by layer with etherparse: what nodes and clients send, and what nobody should.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use etherparse::{Ethernet2Header, IpNumber, Ipv4Header, SlicedPacket, TransportSlice, UdpHeader};
use gateway_common::wire::Mac;

use super::flannel::{GATEWAY_ENDPOINT, GATEWAY_VTEP, Node, PORT};

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// The VXLAN header of VNI 1 (RFC 7348 section 5).
pub const VXLAN: [u8; 8] = [0x08, 0, 0, 0, 0, 0, 1, 0];

/// Offset of the IP header in a frame without VLAN tag.
pub const IP: usize = 14;
/// Offset of the UDP header behind an IP header without options.
pub const UDP: usize = IP + 20;
/// Offset of the VXLAN header.
pub const TUNNEL: usize = UDP + 8;
/// Offset of the inner Ethernet header.
pub const INNER: usize = TUNNEL + 8;
/// Offset of the inner IP header.
pub const INNER_IP: usize = INNER + 14;

/// A UDP datagram without checksum, in IPv4.
#[derive(Clone, Debug)]
pub struct Datagram {
    /// Source address and port.
    pub from: (Ipv4Addr, u16),
    /// Destination address and port.
    pub to: (Ipv4Addr, u16),
    /// Time to live.
    pub ttl: u8,
    /// Explicit congestion notification, 0 to 3.
    pub ecn: u8,
    /// What is carried.
    pub payload: Vec<u8>,
}

impl Datagram {
    /// The IPv4 packet.
    pub fn packet(&self) -> Result<Vec<u8>> {
        let ((source, source_port), (destination, destination_port)) = (self.from, self.to);
        let udp = UdpHeader::without_ipv4_checksum(source_port, destination_port, self.payload.len())?;
        let length = u16::try_from(UdpHeader::LEN + self.payload.len())?;
        let mut ip = Ipv4Header::new(length, self.ttl, IpNumber::UDP, source.octets(), destination.octets())?;
        ip.ecn = self.ecn.try_into()?;
        ip.header_checksum = ip.calc_header_checksum();
        Ok([ip.to_bytes().as_slice(), udp.to_bytes().as_slice(), &self.payload].concat())
    }
}

/// An Ethernet frame.
pub fn ethernet(source: Mac, destination: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let header =
        Ethernet2Header { source: source.octets, destination: destination.octets, ether_type: kind.into() };
    [header.to_bytes().as_slice(), payload].concat()
}

/// An ARP request for `target`, broadcast.
pub fn arp_request(sender_mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4, 0, 1];
    let body = [&head[..], &sender_mac.octets, &sender.octets(), &[0; 6], &target.octets()].concat();
    ethernet(sender_mac, Mac::BROADCAST, ARP, &body)
}

/// The frame by which `node` sends `packet` to the gateway, correct in every field.
/// `ecn` is the outer field; `gateway` is the MAC address of the gateway's underlay interface.
pub fn tunnelled(node: Node, gateway: Mac, ecn: u8, packet: &[u8]) -> Result<Vec<u8>> {
    let inner = ethernet(node.vtep(), GATEWAY_VTEP, IPV4, packet);
    let outer = Datagram {
        from: (node.endpoint(), 45_678),
        to: (GATEWAY_ENDPOINT, PORT),
        ttl: 64,
        ecn,
        payload: [&VXLAN[..], &inner].concat(),
    };
    Ok(ethernet(node.mac(), gateway, IPV4, &outer.packet()?))
}

/// Makes the checksum of the IPv4 header at `offset` right again after an edit.
pub fn mend_checksum(frame: &mut [u8], offset: usize) -> Result<()> {
    let (header, _) = Ipv4Header::from_slice(&frame[offset..]).context("no IPv4 header to mend")?;
    frame[offset + 10..offset + 12].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
    Ok(())
}

/// What a tunnel frame says, layer by layer.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Outer Ethernet header.
    pub ethernet: Ethernet2Header,
    /// Outer IPv4 header.
    pub ip: Ipv4Header,
    /// Outer UDP header.
    pub udp: UdpHeader,
    /// VXLAN header.
    pub vxlan: [u8; 8],
    /// Inner Ethernet header.
    pub inner_ethernet: Ethernet2Header,
    /// Inner IPv4 header.
    pub inner_ip: Ipv4Header,
    /// Behind the inner IPv4 header.
    pub inner_payload: Vec<u8>,
}

/// Reads a tunnel frame.
///
/// # Errors
/// When it is none, or a length does not fit.
pub fn read(frame: &[u8]) -> Result<Seen> {
    let outer = SlicedPacket::from_ethernet(frame)?;
    let Some(TransportSlice::Udp(udp)) = outer.transport else { anyhow::bail!("no UDP in {outer:?}") };
    let (ethernet, rest) = Ethernet2Header::from_slice(frame)?;
    let (ip, _) = Ipv4Header::from_slice(rest)?;
    let (vxlan, inner) = udp.payload().split_first_chunk().context("no VXLAN header")?;
    let (inner_ethernet, inner) = Ethernet2Header::from_slice(inner)?;
    let (inner_ip, inner_payload) = Ipv4Header::from_slice(inner)?;
    Ok(Seen {
        ethernet,
        ip,
        udp: udp.to_header(),
        vxlan: *vxlan,
        inner_ethernet,
        inner_ip,
        inner_payload: inner_payload.to_vec(),
    })
}
