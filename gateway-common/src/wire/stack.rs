//! Stacks of headers that lie behind one another at a known offset: one bounds check reads them all.

use network_types::{ip::Ipv4Hdr, udp::UdpHdr, vxlan::VxlanHdr};

use super::{Ethernet, Wire};

/// Ethernet II and IPv4.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct EthernetIpv4 {
    /// Link layer.
    pub ethernet: Ethernet,
    /// Network layer, without options.
    pub ip: Ipv4Hdr,
}

// SAFETY: `repr(C)` of `Wire` fields: alignment 1, no padding, any bit pattern.
unsafe impl Wire for EthernetIpv4 {}

/// What stands between the outer IP header and the inner packet of a VXLAN datagram.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TunnelHeaders {
    /// Outer UDP.
    pub udp: UdpHdr,
    /// VXLAN (RFC 7348 section 5).
    pub vxlan: VxlanHdr,
    /// Inner Ethernet.
    pub ethernet: Ethernet,
}

// SAFETY: as above.
unsafe impl Wire for TunnelHeaders {}

impl TunnelHeaders {
    /// Bytes on the wire.
    pub const LEN: usize = size_of::<Self>();
}

const _: () = assert!(TunnelHeaders::LEN == 30 && size_of::<EthernetIpv4>() == 34);
