//! What kind of packet it is. Nothing is changed here.

use network_types::{ip::Ipv4Hdr, udp::UdpHdr};

use super::{Frame, Verdict};
use crate::{
    abi::{Config, LastHop, Outcome, Roles},
    wire::{Be16, EtherType, Ethernet, Ipv4, Mac, Tag, TaggedEthernet},
};

/// IP protocol numbers.
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const SCTP: u8 = 132;

/// More fragments, and the offset.
pub(super) const FRAGMENT_BITS: u16 = 0x3fff;
const FRAGMENT_OFFSET: u16 = 0x1fff;
/// Don't fragment.
pub(super) const DONT_FRAGMENT: u16 = 0x4000;

/// The link layer of a frame.
#[derive(Clone, Copy)]
pub(super) struct Link {
    /// What the (interface, VLAN) may do.
    pub roles: Roles,
    /// Bytes in front of the network layer: 14, or 18 with a tag.
    pub len: usize,
    /// EtherType of the network layer.
    pub kind: Be16,
    /// Destination MAC address.
    pub destination: Mac,
}

#[inline(always)]
pub(super) fn link<F: Frame>(frame: &F, config: &Config) -> Result<Link, Verdict> {
    let ethernet = frame.read::<Ethernet>(0).ok_or(Verdict::pass(Outcome::NotIp))?;
    let (kind, destination) = (ethernet.kind, ethernet.dst);
    if kind != EtherType::VLAN {
        return Ok(Link { roles: config.roles, len: Ethernet::LEN, kind, destination });
    }
    let tag = frame.read::<Tag>(Ethernet::LEN).ok_or(Verdict::pass(Outcome::NotIp))?;
    Ok(Link { roles: roles_of(config, tag.vlan()), len: TaggedEthernet::LEN, kind: tag.kind, destination })
}

/// Where a frame came from.
#[inline(always)]
pub(super) fn last_hop<F: Frame>(frame: &F, config: &Config) -> LastHop {
    let Some(link) = frame.read::<TaggedEthernet>(0) else {
        return LastHop::default();
    };
    let vlan = if link.ethernet.kind == EtherType::VLAN { link.tag.vlan() } else { 0 };
    LastHop::new(link.ethernet.src, config.port as u16, vlan)
}

/// Roles of a VLAN; a priority tag (VLAN 0) is the untagged network (802.1Q section 9.6).
#[inline(always)]
fn roles_of(config: &Config, vlan: u16) -> Roles {
    if vlan == 0 {
        return config.roles;
    }
    for (index, port) in config.vlans.iter().enumerate() {
        if index as u32 >= config.vlan_count {
            break;
        }
        if port.vlan == vlan {
            return port.roles;
        }
    }
    Roles::NONE
}

/// An IPv4 packet whose header is complete and agrees with the frame.
#[derive(Clone, Copy)]
pub(super) struct Packet {
    /// Offset of the IP header in the frame.
    pub at: usize,
    /// Bytes of the IP header, 20 to 60.
    pub header_len: usize,
    /// Total length by the IP header, bytes.
    pub total_len: u16,
    /// Bytes of the frame behind the link header; at least `total_len` (Ethernet pads).
    pub space: u32,
    pub source: Ipv4,
    pub destination: Ipv4,
    pub protocol: u8,
    pub tos: u8,
    pub ttl: u8,
    /// Flags and fragment offset.
    pub fragment: u16,
}

impl Packet {
    #[inline(always)]
    pub(super) const fn has_options(&self) -> bool {
        self.header_len != size_of::<Ipv4Hdr>()
    }

    /// Part of a fragmented datagram: the first fragment or a later one.
    #[inline(always)]
    pub(super) const fn is_fragment(&self) -> bool {
        self.fragment & FRAGMENT_BITS != 0
    }

    /// A fragment without the transport header.
    #[inline(always)]
    pub(super) const fn is_later_fragment(&self) -> bool {
        self.fragment & FRAGMENT_OFFSET != 0
    }

    #[inline(always)]
    pub(super) const fn transport(&self) -> usize {
        self.at + self.header_len
    }
}

/// Why a header is refused.
pub(super) enum Flaw {
    /// The bytes end inside the header.
    Truncated,
    /// Version, header length or total length are impossible.
    Contradiction {
        /// It looked like a UDP packet to this address.
        udp_to: Option<Ipv4>,
    },
}

/// Reads the IPv4 header at `at`, behind which the frame has `space` bytes (RFC 1812 section 5.2.2; the header
/// checksum is left to the receiver, as an incremental update keeps a wrong one wrong).
#[inline(always)]
pub(super) fn header<F: Frame>(frame: &F, at: usize, space: u32) -> Result<Packet, Flaw> {
    let ip = frame.read::<Ipv4Hdr>(at).ok_or(Flaw::Truncated)?;
    let header_len = usize::from(ip.vihl & 0x0f) * 4;
    let total_len = u16::from_be_bytes(ip.tot_len);
    let destination = Ipv4::new(ip.dst_addr);
    if ip.vihl >> 4 != 4
        || header_len < size_of::<Ipv4Hdr>()
        || usize::from(total_len) < header_len
        || u32::from(total_len) > space
    {
        let udp_to = if ip.proto == UDP { Some(destination) } else { None };
        return Err(Flaw::Contradiction { udp_to });
    }
    Ok(Packet {
        at,
        header_len,
        total_len,
        space,
        source: Ipv4::new(ip.src_addr),
        destination,
        protocol: ip.proto,
        tos: ip.tos,
        ttl: ip.ttl,
        fragment: u16::from_be_bytes(ip.frags),
    })
}

/// The packet of a frame that is addressed to us.
#[inline(always)]
pub(super) fn ipv4<F: Frame>(frame: &mut F, config: &Config, link: Link) -> Result<Packet, Verdict> {
    let lacks =
        |&[_, _, high, low]: &[u8; 4]| u32::from(u16::from_be_bytes([high, low])) > behind(frame, link);
    if frame.read(link.len).is_some_and(lacks) {
        // The payload may be in fragments: some cards split the headers off.
        frame.measure();
    }
    header(frame, link.len, behind(frame, link)).map_err(|flaw| match flaw {
        Flaw::Contradiction { udp_to: Some(address) } if is_vtep(config, address) => {
            Verdict::drop(Outcome::OuterMalformed)
        }
        Flaw::Contradiction { .. } | Flaw::Truncated => Verdict::drop(Outcome::Ipv4Malformed),
    })
}

/// Bytes of the frame behind its link header.
#[inline(always)]
pub(super) fn behind<F: Frame>(frame: &F, link: Link) -> u32 {
    frame.len().wrapping_sub(link.len as u32)
}

/// Whether `address` is the underlay address of one of our VTEPs.
#[inline(always)]
fn is_vtep(config: &Config, address: Ipv4) -> bool {
    config.overlays().any(|(_, overlay)| overlay.local == address)
}

/// Whether `port` is a tunnel port of any overlay.
#[inline(always)]
pub(super) fn is_tunnel_port(config: &Config, port: Be16) -> bool {
    config.overlays().any(|(_, overlay)| overlay.port == port)
}

/// A tunnel packet to one of our VTEPs.
#[derive(Clone, Copy)]
pub(super) struct Tunnel {
    /// Offset of the outer UDP header.
    pub udp: usize,
    /// Tunnel port.
    pub port: Be16,
    /// UDP length by its header, bytes.
    pub udp_len: u16,
}

/// Recognises tunnel packets by destination address and port. Later fragments carry no port: they are left to the
/// kernel, which cannot complete the datagram because its first fragment ends here.
#[inline(always)]
pub(super) fn tunnel<F: Frame>(
    frame: &F,
    config: &Config,
    packet: Packet,
) -> Result<Option<Tunnel>, Verdict> {
    if packet.protocol != UDP || packet.is_later_fragment() || !is_vtep(config, packet.destination) {
        return Ok(None);
    }
    let at = packet.transport();
    let Some(udp) = frame.read::<UdpHdr>(at) else {
        return Err(Verdict::drop(Outcome::OuterMalformed));
    };
    let port = Be16 { bytes: udp.dst };
    let known =
        config.overlays().any(|(_, overlay)| overlay.local == packet.destination && overlay.port == port);
    let tunnel = Tunnel { udp: at, port, udp_len: u16::from_be_bytes(udp.len) };
    Ok(if known { Some(tunnel) } else { None })
}
