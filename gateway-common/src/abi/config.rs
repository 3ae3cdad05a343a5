//! Constants of one loaded program: the interface it serves and the overlays it knows.
//!
//! They live in frozen read-only data, so the verifier folds them and removes the branches of what is off.
//! Each interface gets its own load of the program. Changing a constant is a load and an atomic swap.

use bytemuck::{Pod, Zeroable};

use crate::wire::{Be16, Ipv4, Mac, Vni};

/// How many overlays one gateway can serve.
pub const MAX_OVERLAYS: usize = 4;
/// How many VLANs of one interface can have roles.
pub const MAX_VLANS: usize = 8;

/// What an (interface, VLAN) may do: a set of bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Roles {
    /// [`Self::UNDERLAY`] and [`Self::EXTERNAL`] bits.
    pub bits: u16,
}

impl Roles {
    /// No role: everything passes to the kernel.
    pub const NONE: Self = Self { bits: 0 };
    /// Tunnel packets of nodes arrive here.
    pub const UNDERLAY: Self = Self { bits: 1 };
    /// Clients are here.
    pub const EXTERNAL: Self = Self { bits: 2 };
    /// One-armed.
    pub const BOTH: Self = Self { bits: 3 };
}

bit_set!(Roles);

/// Roles of one VLAN of the interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct VlanPort {
    /// VLAN id, 1 to 4094.
    pub vlan: u16,
    /// What it may do.
    pub roles: Roles,
}

/// Switches of an overlay: a set of bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct OverlayFlags {
    /// The constants below, or-ed.
    pub bits: u32,
}

impl OverlayFlags {
    /// Nothing set.
    pub const NONE: Self = Self { bits: 0 };
    /// The outer source must be known and the inner source must belong to that node.
    pub const SOURCE_CHECK: Self = Self { bits: 1 };
    /// Accept the G bit and the policy id of VXLAN GBP (draft-smith-vxlan-group-policy).
    pub const ALLOW_GBP: Self = Self { bits: 2 };
    /// Outer DF is a copy of inner DF (without it the header template decides).
    pub const DF_INHERIT: Self = Self { bits: 4 };
    /// TCP SYNs announce no larger segments than the path takes, in both directions.
    pub const CLAMP_MSS: Self = Self { bits: 8 };
}

bit_set!(OverlayFlags);

/// One overlay network. Its index in [`Config::overlays`] is its overlay id.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Overlay {
    /// Underlay address of our VTEP.
    pub local: Ipv4,
    /// UDP destination port of the tunnel.
    pub port: Be16,
    /// MAC address of our VTEP.
    pub mac: Mac,
    /// Network identifier.
    pub vni: Vni,
    /// Always 0.
    pub pad: u8,
    /// Our own subnet (podCIDR on flannel): network address.
    pub subnet: Ipv4,
    /// Our own subnet: mask, contiguous ones.
    pub mask: Ipv4,
    /// Switches.
    pub flags: OverlayFlags,
}

/// All constants of a program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Config {
    /// Index of the interface this program is attached to.
    pub ifindex: u32,
    /// MAC address of that interface.
    pub mac: Mac,
    /// Roles of untagged frames.
    pub roles: Roles,
    /// IPv4 address of that interface, from which ICMP errors are sent; `0.0.0.0` leaves them to the kernel.
    pub address: Ipv4,
    /// How many of `vlans` are used.
    pub vlan_count: u32,
    /// Roles of tagged frames.
    pub vlans: [VlanPort; MAX_VLANS],
    /// How many of `overlays` are used.
    pub overlay_count: u32,
    /// The overlays.
    pub overlays: [Overlay; MAX_OVERLAYS],
}

impl Config {
    /// All zero: no roles, no overlays. What the object holds until the loader replaces it.
    pub const UNSET: Self = bytemuck::zeroed();

    /// The overlays in use, with their ids.
    pub fn overlays(&self) -> impl Iterator<Item = (u32, &Overlay)> {
        (0u32..).zip(self.overlays.iter().take(self.overlay_count as usize))
    }
}

const _: () = {
    assert!(size_of::<Overlay>() == 28);
    assert!(size_of::<Config>() == 20 + 4 * MAX_VLANS + 4 + 28 * MAX_OVERLAYS);
};
