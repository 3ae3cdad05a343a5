//! What userspace and the XDP program agree on: table layouts, constants, outcomes.
//!
//! All structs are `repr(C)` without padding (`bytemuck::Pod` refuses it), with named fields so that
//! `bpftool map dump` prints something a person can read. A change of any layout raises [`VERSION`].

/// The operations of a structure whose field `bits` is a set.
macro_rules! bit_set {
    ($name:ident) => {
        impl $name {
            /// Whether all of `other` is included.
            #[inline(always)]
            pub const fn has(self, other: Self) -> bool {
                self.bits & other.bits == other.bits
            }

            /// Both sets together.
            pub const fn with(self, other: Self) -> Self {
                Self { bits: self.bits | other.bits }
            }
        }
    };
}

mod config;
mod outcome;
mod session;
mod tables;

pub use config::{
    Config, MAX_LOCAL_PREFIXES, MAX_OVERLAYS, MAX_PORTS, MAX_SNAT_ADDRESSES, MAX_SNAT_RULES, MAX_VLANS,
    Overlay, OverlayFlags, Port, Prefix, Roles, SnatRule, VlanPort,
};
pub use outcome::{Class, Counter, OUTCOME_CAPACITY, Outcome, OutcomeInfo, Severity};
pub use session::{
    Forward, ForwardKey, LastHop, Phase, Reverse, ReverseKey, SWEEP_CAPACITY, SessionEvent, Slot, State,
    Sweep, SweepMode, TICK_SHIFT, Ticks, Timeouts, ticks,
};
pub use tables::{
    Egress, HEADER_CAPACITY, HEADER_DIRECT, HEADER_DIRECT_TAGGED, HEADER_VXLAN, HEADER_VXLAN_TAGGED,
    LocalAddress, OverlayAddress, PrefixKey, Route, Vtep, VtepFlags, VtepSlot,
};

/// Version of the table layouts; part of the bpffs path, so that two versions never share a pin.
pub const VERSION: u32 = 1;

/// Name of the XDP program in the object and in the kernel.
pub const PROGRAM: &str = "gateway";

/// Name of the program that removes sessions. It is never attached: the daemon runs it by `BPF_PROG_TEST_RUN` on a
/// [`Sweep`].
pub const SWEEP_PROGRAM: &str = "sweep";

/// Symbol of the constants in the object's `.rodata`, a [`Config`].
pub const CONFIG_SYMBOL: &str = "CONFIG";

/// Map names; at most 15 characters, because the kernel cuts the rest.
pub mod map {
    /// HASH of [`OverlayAddress`](super::OverlayAddress) to [`Route`](super::Route): exact pods.
    pub const PODS: &str = "PODS";
    /// LPM trie of [`PrefixKey`](super::PrefixKey) to [`Route`](super::Route): pod CIDRs.
    pub const PREFIXES: &str = "PREFIXES";
    /// ARRAY of [`Vtep`](super::Vtep) by VTEP id.
    pub const VTEPS: &str = "VTEPS";
    /// HASH of [`OverlayAddress`](super::OverlayAddress) to [`Route`](super::Route): outer sources and the node they
    /// belong to.
    pub const SOURCES: &str = "SOURCES";
    /// HASH of [`Ipv4`](crate::wire::Ipv4) to [`LocalAddress`](super::LocalAddress): addresses of this host. Its whole
    /// prefixes are constants.
    pub const ADDRESSES: &str = "ADDRESSES";
    /// HASH of interface index to [`Egress`](super::Egress): where FIB results may lead.
    pub const EGRESS: &str = "EGRESS";
    /// PERCPU_ARRAY of [`Counter`](super::Counter) by [`Outcome`](super::Outcome) number.
    pub const COUNTERS: &str = "COUNTERS";

    /// HASH of [`ForwardKey`](super::ForwardKey) to [`Forward`](super::Forward): sessions by the client's side.
    pub const FORWARD: &str = "SESSION_FORWARD";
    /// HASH of [`ReverseKey`](super::ReverseKey) to [`Reverse`](super::Reverse): sessions by the pod's side.
    pub const REVERSE: &str = "SESSION_REVERSE";
    /// ARRAY of [`Slot`](super::Slot): which session holds which slot.
    pub const SLOTS: &str = "SESSION_SLOTS";
    /// ARRAY of one counter: where the search for the next slot begins.
    pub const HAND: &str = "SESSION_HAND";
    /// PERCPU_ARRAY of counters by [`SessionEvent`](super::SessionEvent): what became of sessions.
    pub const EVENTS: &str = "SESSION_EVENTS";

    /// Every table, in the order in which they are pinned.
    pub const ALL: [&str; 12] =
        [PODS, PREFIXES, VTEPS, SOURCES, ADDRESSES, EGRESS, COUNTERS, FORWARD, REVERSE, SLOTS, HAND, EVENTS];

    const _: () = {
        let mut i = 0;
        while i < ALL.len() {
            assert!(ALL[i].len() <= 15);
            i += 1;
        }
    };
}
