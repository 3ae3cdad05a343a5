//! Constants of one loaded program: the interface it serves and the overlays it knows.
//!
//! They live in frozen read-only data, so the verifier folds them and removes the branches of what is off.
//! Each interface gets its own load of the program. Changing a constant is a load and an atomic swap.

use bytemuck::{Pod, Zeroable};

use super::Timeouts;
use crate::wire::{Be16, Ipv4, Mac, Vni};

/// How many overlays one gateway can serve.
pub const MAX_OVERLAYS: usize = 4;
/// How many VLANs of one interface can have roles.
pub const MAX_VLANS: usize = 8;
/// How many interfaces one gateway can drive; their index fits [`LastHop`](super::LastHop).
pub const MAX_PORTS: usize = 16;
/// How many prefixes of the host's own a program can know.
pub const MAX_LOCAL_PREFIXES: usize = 8;
/// How many rules say which clients are translated.
pub const MAX_SNAT_RULES: usize = 32;
/// How many SNAT addresses all pools have together.
pub const MAX_SNAT_ADDRESSES: usize = 256;

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

/// An interface of the gateway, as a way out.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Port {
    /// Interface index; 0 while the interface is absent.
    pub ifindex: u32,
    /// MAC address.
    pub mac: Mac,
    /// Largest IP packet that fits, bytes.
    pub mtu: u16,
}

/// A prefix of addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Prefix {
    /// Network address.
    pub network: Ipv4,
    /// Mask, contiguous ones.
    pub mask: Ipv4,
}

/// Which clients are translated for which pods, and to what. The first rule that matches counts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SnatRule {
    /// Clients: network address.
    pub client: Ipv4,
    /// Clients: mask, contiguous ones.
    pub client_mask: Ipv4,
    /// Destinations: network address.
    pub destination: Ipv4,
    /// Destinations: mask, contiguous ones.
    pub destination_mask: Ipv4,
    /// Overlay id.
    pub overlay: u16,
    /// Always 0.
    pub pad: u16,
    /// First of the rule's addresses in [`Config::snat_addresses`].
    pub first: u16,
    /// How many addresses; 0 routes without translation.
    pub count: u16,
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
    /// The lowest SNAT address, as a number.
    pub snat_first: u32,
    /// How many addresses from there to the highest SNAT address; 0 if there are none. Every SNAT address lies there,
    /// also one that is being drained; other addresses may, too.
    pub snat_span: u32,
}

impl Overlay {
    /// Whether the address might be a SNAT address of this overlay.
    #[inline(always)]
    pub const fn may_be_snat(&self, address: Ipv4) -> bool {
        u32::from_be_bytes(address.octets).wrapping_sub(self.snat_first) < self.snat_span
    }
}

/// All constants of a program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
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
    /// Index of this interface in `ports`.
    pub port: u32,
    /// The interfaces. A session remembers its way out by the index, which outlives the interface.
    pub ports: [Port; MAX_PORTS],
    /// How many of `local_prefixes` are used.
    pub local_prefix_count: u32,
    /// Prefixes that the kernel takes for itself. Single addresses are in the address table.
    pub local_prefixes: [Prefix; MAX_LOCAL_PREFIXES],
    /// How many of `snat_rules` are used; 0 switches translation off.
    pub snat_rule_count: u32,
    /// Which clients are translated.
    pub snat_rules: [SnatRule; MAX_SNAT_RULES],
    /// SNAT addresses.
    pub snat_addresses: [Ipv4; MAX_SNAT_ADDRESSES],
    /// Entries of the slot table.
    pub session_slots: u32,
    /// How long sessions may be idle.
    pub timeouts: Timeouts,
}

impl Default for Config {
    fn default() -> Self {
        Self::UNSET
    }
}

impl Config {
    /// All zero: no roles, no overlays. What the object holds until the loader replaces it.
    pub const UNSET: Self = bytemuck::zeroed();

    /// Whether `address` lies in an overlay's own subnet: pods can answer it, so it is routed.
    #[inline(always)]
    pub fn is_own(&self, address: Ipv4) -> bool {
        self.overlays().any(|(_, overlay)| address.in_subnet(overlay.subnet, overlay.mask))
    }

    /// Whether `address` lies in a prefix that the kernel takes for itself.
    #[inline(always)]
    pub fn is_in_local_prefix(&self, address: Ipv4) -> bool {
        let prefixes = self.local_prefixes.iter().take(self.local_prefix_count as usize);
        // Without a way out of the loop, a verifier goes on with one state.
        prefixes.fold(false, |found, prefix| found | address.in_subnet(prefix.network, prefix.mask))
    }

    /// Whether `address` might be a SNAT address of any overlay.
    #[inline(always)]
    pub fn may_be_snat(&self, address: Ipv4) -> bool {
        self.overlays().any(|(_, overlay)| overlay.may_be_snat(address))
    }

    /// The first rule for a client and a pod of this overlay.
    #[inline(always)]
    pub fn snat_rule(&self, overlay: u32, client: Ipv4, pod: Ipv4) -> Option<&SnatRule> {
        self.snat_rules.iter().take(self.snat_rule_count as usize).find(|rule| {
            u32::from(rule.overlay) == overlay
                && client.in_subnet(rule.client, rule.client_mask)
                && pod.in_subnet(rule.destination, rule.destination_mask)
        })
    }

    /// An interface by its index.
    #[inline(always)]
    pub const fn port_at(&self, index: u16) -> &Port {
        const { assert!(MAX_PORTS.is_power_of_two()) };
        &self.ports[index as usize & (MAX_PORTS - 1)]
    }

    /// A SNAT address by its index.
    #[inline(always)]
    pub const fn snat_address(&self, index: u32) -> Ipv4 {
        const { assert!(MAX_SNAT_ADDRESSES.is_power_of_two()) };
        self.snat_addresses[index as usize & (MAX_SNAT_ADDRESSES - 1)]
    }

    /// An overlay by its id.
    #[inline(always)]
    pub const fn overlay(&self, id: u32) -> &Overlay {
        const { assert!(MAX_OVERLAYS.is_power_of_two()) };
        &self.overlays[id as usize & (MAX_OVERLAYS - 1)]
    }

    /// The overlays in use, with their ids.
    pub fn overlays(&self) -> impl Iterator<Item = (u32, &Overlay)> {
        (0u32..).zip(self.overlays.iter().take(self.overlay_count as usize))
    }
}

const _: () = {
    assert!(size_of::<Overlay>() == 36 && size_of::<Port>() == 12 && size_of::<SnatRule>() == 24);
    assert!(MAX_PORTS <= 1 << 4);
};
