//! Ethernet II and the 802.1Q tag, with alignment 1.

use bytemuck::{Pod, Zeroable};

use super::{Be16, Mac, Wire};

/// EtherTypes that the engine knows, in network order.
#[derive(Clone, Copy, Debug)]
pub struct EtherType;

impl EtherType {
    /// IPv4.
    pub const IPV4: Be16 = Be16::new(0x0800);
    /// ARP (RFC 826).
    pub const ARP: Be16 = Be16::new(0x0806);
    /// IPv6.
    pub const IPV6: Be16 = Be16::new(0x86dd);
    /// 802.1Q customer tag.
    pub const VLAN: Be16 = Be16::new(0x8100);
    /// 802.1ad service tag.
    pub const SERVICE_VLAN: Be16 = Be16::new(0x88a8);
}

/// An untagged Ethernet II header.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Ethernet {
    /// Destination station.
    pub dst: Mac,
    /// Source station.
    pub src: Mac,
    /// What follows; [`EtherType`].
    pub kind: Be16,
}

// SAFETY: `Pod`, alignment 1 (checked below).
unsafe impl Wire for Ethernet {}

impl Ethernet {
    /// Bytes on the wire.
    pub const LEN: usize = size_of::<Self>();
}

/// An 802.1Q tag: the two bytes of tag control information and the EtherType behind them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Tag {
    /// Priority (3 bits), drop eligible (1 bit), VLAN id (12 bits).
    pub tci: Be16,
    /// What follows; [`EtherType`].
    pub kind: Be16,
}

// SAFETY: `Pod`, alignment 1 (checked below).
unsafe impl Wire for Tag {}

impl Tag {
    /// Bytes on the wire.
    pub const LEN: usize = size_of::<Self>();

    /// The VLAN id, 0 for a priority tag.
    #[inline(always)]
    pub const fn vlan(self) -> u16 {
        self.tci.get() & 0x0fff
    }
}

/// Ethernet II with one 802.1Q tag.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct TaggedEthernet {
    /// Addresses, and [`EtherType::VLAN`] as type.
    pub ethernet: Ethernet,
    /// The tag.
    pub tag: Tag,
}

// SAFETY: `Pod`, alignment 1 (checked below).
unsafe impl Wire for TaggedEthernet {}

impl TaggedEthernet {
    /// Bytes on the wire.
    pub const LEN: usize = size_of::<Self>();
}

/// A link header that starts with Ethernet addresses.
pub trait LinkHeader: Wire {
    /// The header without its tag.
    fn addresses(&mut self) -> &mut Ethernet;
}

impl LinkHeader for Ethernet {
    #[inline(always)]
    fn addresses(&mut self) -> &mut Ethernet {
        self
    }
}

impl LinkHeader for TaggedEthernet {
    #[inline(always)]
    fn addresses(&mut self) -> &mut Ethernet {
        &mut self.ethernet
    }
}

const _: () = {
    assert!(align_of::<TaggedEthernet>() == 1);
    assert!(Ethernet::LEN == 14 && Tag::LEN == 4 && TaggedEthernet::LEN == 18);
};
