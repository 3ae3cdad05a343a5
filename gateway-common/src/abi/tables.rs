//! Keys and values of the BPF maps.

use bytemuck::{Pod, Zeroable};

use crate::wire::{Ipv4, Mac};

/// Key of exact tables: an address within an overlay. Overlays may use the same addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct OverlayAddress {
    /// Overlay id: index into [`Config::overlays`](super::Config::overlays).
    pub overlay: u32,
    /// The address.
    pub address: Ipv4,
}

/// Data part of the prefix trie's key. The trie's prefix length counts from the first bit of `overlay`, which always
/// matches whole: prefix length = [`Self::OVERLAY_BITS`] + the length of the CIDR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PrefixKey {
    /// Overlay id.
    pub overlay: u32,
    /// Network address.
    pub address: Ipv4,
}

impl PrefixKey {
    /// Bits of the key in front of the address.
    pub const OVERLAY_BITS: u32 = u32::BITS;
}

/// Value of the pod, prefix and source tables: which VTEP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Route {
    /// Index into the VTEP table.
    pub vtep: u32,
    /// Always 0; keeps the value 8 bytes, so that it is replaced whole.
    pub reserved: u32,
}

impl Route {
    /// A route to VTEP `vtep`.
    pub const fn to(vtep: u32) -> Self {
        Self { vtep, reserved: 0 }
    }
}

/// Value of the address table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct LocalAddress {
    /// Bits: [`Self::KERNEL`], [`Self::OVERLAY`], [`Self::SNAT`].
    pub kind: u32,
    /// Interface that carries the address, 0 if none.
    pub ifindex: u32,
}

impl LocalAddress {
    /// The host's network stack owns the address.
    pub const KERNEL: u32 = 1;
    /// It is an address of ours inside an overlay: ARP for it in the tunnel is answered with the VTEP's MAC.
    pub const OVERLAY: u32 = 2;
    /// Clients are translated to it, or were until it was taken out of its pool.
    pub const SNAT: u32 = 4;
}

/// Value of the egress table: how a frame leaves by an interface that the kernel's FIB names.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Egress {
    /// Interface to redirect to: the interface itself, or the parent of a VLAN device.
    pub ifindex: u32,
    /// VLAN id to push, 0 for none.
    pub vlan: u16,
    /// Bits: [`Self::EXTERNAL`], [`Self::TUNNEL`].
    pub kind: u16,
}

impl Egress {
    /// Clients are behind it: decapsulated traffic may leave there.
    pub const EXTERNAL: u16 = 1;
    /// It is a tunnel device of ours: traffic from the tunnel must not go back there.
    pub const TUNNEL: u16 = 2;
}

/// Room for the longest header: VLAN tag, IPv6, UDP, VXLAN, inner Ethernet.
pub const HEADER_CAPACITY: usize = 88;
/// Header of a plain next hop.
pub const HEADER_DIRECT: u16 = 14;
/// Header of a plain next hop behind an 802.1Q tag.
pub const HEADER_DIRECT_TAGGED: u16 = 18;
/// Header of a VXLAN tunnel over IPv4.
pub const HEADER_VXLAN: u16 = 64;
/// Header of a VXLAN tunnel over IPv4 behind an 802.1Q tag.
pub const HEADER_VXLAN_TAGGED: u16 = 68;

/// State of a VTEP: a set of bits. All zero is a free entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct VtepFlags {
    /// The constants below, or-ed.
    pub bits: u16,
}

impl VtepFlags {
    /// A node owns this entry.
    pub const USED: Self = Self { bits: 1 };
    /// Next hop known, header complete.
    pub const READY: Self = Self { bits: 2 };
    /// The node is reached without a tunnel (flannel's DirectRouting).
    pub const DIRECT: Self = Self { bits: 4 };
}

bit_set!(VtepFlags);

/// How to reach a VTEP: the finished header and what must be patched into it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct VtepSlot {
    /// Overlay id.
    pub overlay: u16,
    /// State.
    pub flags: VtepFlags,
    /// Interface the frame leaves by.
    pub ifindex: u32,
    /// Used bytes of `header`: one of the `HEADER_*` lengths.
    pub header_len: u16,
    /// Largest inner IP packet that fits the path, bytes.
    pub mtu: u16,
    /// One's-complement sum of the outer IP header as it stands in `header` (total length, identification and
    /// checksum are 0 there), as [`Sum::fold`](crate::checksum::Sum::fold) gives it. 0 without a tunnel.
    pub checksum_base: u16,
    /// Offset of the outer IP header in `header`: 14 or 18.
    pub ip_offset: u16,
    /// From outer Ethernet to inner Ethernet, as it is copied in front of the inner packet.
    pub header: [u8; HEADER_CAPACITY],
    /// The node's tunnel address, or its address as plain next hop; for people, and for the daemon.
    pub endpoint: Ipv4,
    /// The node's VTEP MAC; zero without a tunnel.
    pub mac: Mac,
    /// MAC address of the underlay's next hop; zero while unresolved.
    pub next_hop: Mac,
}

/// Entry of the VTEP table.
///
/// An array entry is overwritten in place while other CPUs read it. So it has two slots: the daemon writes the one
/// that is not active, and in a second update flips `active`; a reader never sees half a header.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Vtep {
    /// Which slot is valid: 0 or 1.
    pub active: u32,
    /// Raised whenever the entry changes its owner.
    pub generation: u32,
    /// The slots.
    pub slots: [VtepSlot; 2],
}

impl Vtep {
    /// The valid slot.
    #[inline(always)]
    pub const fn slot(&self) -> &VtepSlot {
        // An index, not a branch: the verifier goes on with one state instead of two.
        &self.slots[(self.active & 1) as usize]
    }
}

const _: () = {
    assert!(size_of::<OverlayAddress>() == 8 && size_of::<Route>() == 8);
    assert!(size_of::<LocalAddress>() == 8 && size_of::<Egress>() == 8);
    assert!(size_of::<VtepSlot>() == 120 && size_of::<Vtep>() == 248);
    assert!(HEADER_VXLAN_TAGGED as usize <= HEADER_CAPACITY);
};

/// aya's marker: these types may be written to and read from maps.
#[cfg(feature = "user")]
mod user {
    use aya::Pod;

    use crate::{
        abi::{
            Config, Counter, Egress, Forward, ForwardKey, LocalAddress, OverlayAddress, PrefixKey, Reverse,
            ReverseKey, Route, Slot, Vtep,
        },
        wire::Ipv4,
    };

    macro_rules! pod {
        ($($name:ident),+) => {
            $(
                // SAFETY: the type is `bytemuck::Pod`: no padding, valid for every bit pattern.
                unsafe impl Pod for $name {}
            )+
        };
    }

    pod!(
        Config,
        Counter,
        Egress,
        Forward,
        ForwardKey,
        Ipv4,
        LocalAddress,
        OverlayAddress,
        PrefixKey,
        Reverse,
        ReverseKey,
        Route,
        Slot,
        Vtep
    );
}
