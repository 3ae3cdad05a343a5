//! Wire types whose byte order is part of the type.
//!
//! Addresses and big-endian integers are arrays of bytes, so they have alignment 1, compare in place and cannot
//! be mistaken for host integers. `network-types` brings the IPv4, UDP, VXLAN and ARP headers; this module adds
//! Ethernet with alignment 1, the 802.1Q tag and the stacks of headers that the engine reads with one bounds check.

mod ethernet;
mod stack;
pub mod view;

use core::fmt;
#[cfg(feature = "model")]
use core::net::AddrParseError;

use bytemuck::{Pod, Zeroable};
pub use ethernet::{EtherType, Ethernet, LinkHeader, Tag, TaggedEthernet};
use network_types::{arp::ArpHdr, ip::Ipv4Hdr, udp::UdpHdr, vxlan::VxlanHdr};
pub use stack::{EthernetIpv4, TunnelHeaders};

/// A header that may be laid over packet bytes.
///
/// # Safety
///
/// The type must have alignment 1, no padding, and be valid for every bit pattern.
pub unsafe trait Wire: Copy + 'static {}

// SAFETY: `repr(C)` structs of bytes and byte arrays only; see `network_types::ip`.
unsafe impl Wire for Ipv4Hdr {}
// SAFETY: as above, `network_types::udp`.
unsafe impl Wire for UdpHdr {}
// SAFETY: as above, `network_types::vxlan`.
unsafe impl Wire for VxlanHdr {}
// SAFETY: as above, `network_types::arp`.
unsafe impl Wire for ArpHdr {}
// SAFETY: a byte array.
unsafe impl<const N: usize> Wire for [u8; N] {}

const _: () = {
    assert!(align_of::<Ipv4Hdr>() == 1 && size_of::<Ipv4Hdr>() == 20);
    assert!(align_of::<UdpHdr>() == 1 && size_of::<UdpHdr>() == 8);
    assert!(align_of::<VxlanHdr>() == 1 && size_of::<VxlanHdr>() == 8);
    assert!(align_of::<ArpHdr>() == 1 && size_of::<ArpHdr>() == 28);
};

/// An IPv4 address in network order.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Ipv4 {
    /// The four octets, most significant first.
    pub octets: [u8; 4],
}

impl Ipv4 {
    /// Length of an address in bits.
    pub const BITS: u32 = u32::BITS;
    /// `0.0.0.0`.
    pub const UNSPECIFIED: Self = Self { octets: [0; 4] };

    /// An address from its octets.
    #[inline(always)]
    pub const fn new(octets: [u8; 4]) -> Self {
        Self { octets }
    }

    /// The address as an opaque word in memory order: for comparing, masking and hashing only.
    #[inline(always)]
    pub const fn word(self) -> u32 {
        u32::from_ne_bytes(self.octets)
    }

    /// Whether the address lies in the subnet of `network` under `mask`.
    #[inline(always)]
    pub const fn in_subnet(self, network: Self, mask: Self) -> bool {
        self.word() & mask.word() == network.word()
    }

    /// Whether a router may forward to the address: neither of this network (0/8), nor multicast, reserved or
    /// broadcast (224/3).
    #[inline(always)]
    pub const fn is_routable(self) -> bool {
        let [first, ..] = self.octets;
        first != 0 && first < 224
    }

    /// Whether a packet that a router gets may come from the address: routable, and not loopback (RFC 1812 section
    /// 5.3.7).
    #[inline(always)]
    pub const fn is_source(self) -> bool {
        self.is_routable() && self.octets[0] != 127
    }
}

impl From<core::net::Ipv4Addr> for Ipv4 {
    fn from(address: core::net::Ipv4Addr) -> Self {
        Self::new(address.octets())
    }
}

impl From<Ipv4> for core::net::Ipv4Addr {
    fn from(address: Ipv4) -> Self {
        address.octets.into()
    }
}

impl fmt::Display for Ipv4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        core::net::Ipv4Addr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Ipv4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(feature = "model")]
impl core::str::FromStr for Ipv4 {
    type Err = AddrParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<core::net::Ipv4Addr>().map(Self::from)
    }
}

/// An Ethernet MAC address.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Mac {
    /// The six octets as they stand on the wire.
    pub octets: [u8; 6],
}

/// Text that is not a MAC address of six hexadecimal octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacParseError;

impl fmt::Display for MacParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a MAC address: six hexadecimal octets such as 0e:11:22:33:44:55 are expected")
    }
}

impl core::error::Error for MacParseError {}

impl Mac {
    /// `00:00:00:00:00:00`.
    pub const ZERO: Self = Self { octets: [0; 6] };
    /// `ff:ff:ff:ff:ff:ff`.
    pub const BROADCAST: Self = Self { octets: [0xff; 6] };

    /// An address from its octets.
    #[inline(always)]
    pub const fn new(octets: [u8; 6]) -> Self {
        Self { octets }
    }

    #[inline(always)]
    const fn halves(self) -> (u32, u16) {
        let [a, b, c, d, e, f] = self.octets;
        (u32::from_ne_bytes([a, b, c, d]), u16::from_ne_bytes([e, f]))
    }

    /// Whether the group bit is set: multicast or broadcast.
    #[inline(always)]
    pub const fn is_group(self) -> bool {
        self.octets[0] & 1 != 0
    }

    /// Whether a station may send from this address: neither zero nor a group address
    /// (Linux `is_valid_ether_addr`).
    #[inline(always)]
    pub const fn is_station(self) -> bool {
        let (high, low) = self.halves();
        !self.is_group() && (high != 0 || low != 0)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.octets;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::str::FromStr for Mac {
    type Err = MacParseError;

    /// Parses six octets of two hexadecimal digits, separated by `:` or by `-` as flannel accepts both
    /// (Go `net.ParseMAC`).
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let separator = *text.as_bytes().get(2).ok_or(MacParseError)?;
        if separator != b':' && separator != b'-' {
            return Err(MacParseError);
        }
        let mut octets = [0; 6];
        let mut parts = text.split(char::from(separator));
        for octet in &mut octets {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(MacParseError)?;
            if !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(MacParseError);
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| MacParseError)?;
        }
        if parts.next().is_some() { Err(MacParseError) } else { Ok(Self { octets }) }
    }
}

/// A 16-bit integer in network order.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Be16 {
    /// Most significant byte first.
    pub bytes: [u8; 2],
}

impl Be16 {
    /// Puts a host integer into network order.
    #[inline(always)]
    pub const fn new(value: u16) -> Self {
        Self { bytes: value.to_be_bytes() }
    }

    /// The host integer.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.bytes)
    }
}

impl fmt::Debug for Be16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// A 24-bit VXLAN or Geneve network identifier in network order.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct Vni {
    /// Most significant byte first.
    pub bytes: [u8; 3],
}

impl Vni {
    /// The largest VNI, 2^24 - 1.
    pub const MAX: u32 = 0x00ff_ffff;

    /// Puts a host integer into network order; `None` if it has more than 24 bits.
    pub const fn new(value: u32) -> Option<Self> {
        if value > Self::MAX {
            return None;
        }
        let [_, a, b, c] = value.to_be_bytes();
        Some(Self { bytes: [a, b, c] })
    }

    /// The host integer.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        let [a, b, c] = self.bytes;
        u32::from_be_bytes([0, a, b, c])
    }
}

impl fmt::Debug for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("0e:11:22:33:44:55", Some([0x0e, 0x11, 0x22, 0x33, 0x44, 0x55]))]
    #[case("0E-11-22-33-44-55", Some([0x0e, 0x11, 0x22, 0x33, 0x44, 0x55]))]
    #[case("0e:11:22:33:44", None)]
    #[case("0e:11:22:33:44:55:66", None)]
    #[case("0e:11-22:33:44:55", None)]
    #[case("0e:11:22:33:44:5", None)]
    #[case("0e:11:22:33:44:+5", None)]
    #[case("", None)]
    fn mac_text(#[case] text: &str, #[case] octets: Option<[u8; 6]>) {
        assert_eq!(text.parse::<Mac>().ok(), octets.map(Mac::new));
    }

    #[test]
    fn vni_bytes_match_the_table_of_rfc_7348() {
        assert_eq!(Vni::new(0xab_cdef).unwrap().bytes, [0xab, 0xcd, 0xef]);
        assert_eq!(Vni::new(1).unwrap().bytes, [0, 0, 1]);
        assert_eq!(Vni::new(0x0100_0000), None);
    }

    #[test]
    fn stations_are_unicast_and_not_zero() {
        assert!(!Mac::ZERO.is_station());
        assert!(!Mac::BROADCAST.is_station());
        assert!(!Mac::new([1, 0, 0x5e, 0, 0, 1]).is_station());
        assert!(Mac::new([0, 0, 0, 0, 0, 1]).is_station());
    }
}
