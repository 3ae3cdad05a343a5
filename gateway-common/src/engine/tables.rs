//! The two traits through which the engine sees the world.

use core::ops::Deref;

use super::{
    Verdict,
    session::{Opening, Shared},
};
use crate::{
    abi::{
        Config, Egress, Forward, ForwardKey, LocalAddress, OverlayAddress, PrefixKey, Reverse, ReverseKey,
        Route, SessionEvent, State, Ticks, Vtep,
    },
    wire::{Ethernet, Ipv4, Mac, Wire},
};

/// A frame, from the first byte of the Ethernet header.
///
/// References into the frame borrow it; resizing needs it whole. So no reference survives a resize.
pub trait Frame {
    /// Bytes of the frame. Those in fragments, which cannot be read directly, are certain to be counted only after
    /// [`measure`](Self::measure).
    fn len(&self) -> u32;

    /// Makes sure that [`len`](Self::len) counts fragments: a call that short frames in one piece need not pay for. Not
    /// after the frame was resized.
    fn measure(&mut self);

    /// Whether the frame has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The header at `offset`; `None` if the frame ends before it does.
    fn read<T: Wire>(&self, offset: usize) -> Option<&T>;

    /// The header at `offset`, for writing; `None` if the frame ends before it does.
    fn write<T: Wire>(&mut self, offset: usize) -> Option<&mut T>;

    /// Adds `by` bytes of any content in front, or takes `-by` away; `false` if there is no room. The frame is
    /// unchanged then.
    #[must_use]
    fn grow_front(&mut self, by: i32) -> bool;

    /// Cuts the frame to `len` bytes, which must not be more than it has; `false` if that is not possible.
    #[must_use]
    fn truncate(&mut self, len: u32) -> bool;
}

/// What the kernel's FIB is asked for a packet that leaves to the outside.
#[derive(Clone, Copy, Debug)]
pub struct FibQuery {
    /// Source address.
    pub source: Ipv4,
    /// Destination address.
    pub destination: Ipv4,
    /// Type of service byte.
    pub tos: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Total length of the packet in bytes; larger than the way out takes gives [`Fib::TooBig`].
    pub total_length: u16,
}

/// The FIB's answer (`BPF_FIB_LKUP_RET_*` of Linux `include/uapi/linux/bpf.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fib {
    /// There is a way out.
    Forward {
        /// Interface.
        ifindex: u32,
        /// MAC address of that interface.
        source: Mac,
        /// MAC address of the next hop.
        next_hop: Mac,
        /// Largest packet that this way takes, bytes; at least what was asked for.
        mtu: u16,
    },
    /// Not to be forwarded: local, broadcast, or no route.
    NotForwarded,
    /// The next hop is not resolved.
    NoNeighbour,
    /// The packet is larger than the way out takes.
    TooBig,
    /// Blackhole, unreachable, prohibited, forwarding switched off, a tunnel of the kernel's.
    Refused,
}

/// A way out that was found for a flow, and everything that a packet needs to take it. Asking the FIB costs more than
/// all the rest of a packet's way, so an answer serves the flow for the rest of the tick.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WayOut {
    /// The tick in which it was found.
    pub found: Ticks,
    /// For packets from this address.
    pub source: Ipv4,
    /// For packets to this address.
    pub destination: Ipv4,
    /// For packets with this type of service.
    pub tos: u8,
    /// For packets of this protocol.
    pub protocol: u8,
    /// Largest packet, bytes; 0 in an entry that was never filled, so that it serves nobody.
    pub mtu: u16,
    /// Interface to leave by.
    pub ifindex: u32,
    /// VLAN id to push, 0 for none.
    pub vlan: u16,
    /// Link header, without a tag.
    pub link: Ethernet,
}

impl WayOut {
    /// Whether it was found for such a packet in this very tick.
    #[inline(always)]
    pub(super) fn serves(&self, query: &FibQuery, now: Ticks) -> bool {
        self.found == now
            && self.source == query.source
            && self.destination == query.destination
            && self.tos == query.tos
            && self.protocol == query.protocol
            && self.mtu >= query.total_length
    }
}

/// How an insertion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The entry is in the table.
    Done,
    /// The key was there already.
    Exists,
    /// The table has no room.
    Full,
}

/// The tables of sessions. Every method is one atomic step; other CPUs work on the same tables.
pub trait Sessions {
    /// An entry of the forward table, where it lies.
    type Forward<'a>: Deref<Target = Shared<Forward>>
    where
        Self: 'a;
    /// An entry of the reverse table, where it lies.
    type Reverse<'a>: Deref<Target = Shared<Reverse>>
    where
        Self: 'a;

    /// The time.
    fn ticks(&self) -> Ticks;

    /// The session of a client's packet.
    fn forward(&self, key: &ForwardKey) -> Option<Self::Forward<'_>>;

    /// The session of a pod's packet.
    fn reverse(&self, key: &ReverseKey) -> Option<Self::Reverse<'_>>;

    /// Adds a forward entry that must not exist yet. The value is made where the stack does not hold it.
    fn insert_forward(&self, key: &ForwardKey, value: impl FnOnce() -> Forward) -> Inserted;

    /// Adds a reverse entry that must not exist yet; as above.
    fn insert_reverse(&self, key: &ReverseKey, value: impl FnOnce() -> Reverse) -> Inserted;

    /// Removes a forward entry, if it exists.
    fn remove_forward(&self, key: &ForwardKey);

    /// Removes a reverse entry, if it exists.
    fn remove_reverse(&self, key: &ReverseKey);

    /// Compare-and-swap of a session's state; whether it was `old`.
    fn exchange(&self, session: &Shared<Reverse>, old: State, new: State) -> bool;

    /// Moves the hand on by `by` slots; where it was. The same slots are given to nobody else until the hand has gone
    /// round.
    fn advance_hand(&self, by: u32) -> u32;

    /// The session that holds a slot; all zero if none ever did.
    fn slot(&self, index: u32) -> ReverseKey;

    /// Gives a slot to a session.
    fn set_slot(&self, index: u32, session: &ReverseKey);

    /// Counts what became of a session.
    fn note(&self, event: SessionEvent);

    /// Gives `work` room that is this CPU's alone, and what `work` gives; 0 if there is none, which does not happen.
    fn with_opening(&self, work: impl FnOnce(&mut Opening) -> u64) -> u64;

    /// Calls `step` with 0, 1 and so on below `count`, until it gives `true`. A loop of its own, so that a verifier
    /// looks at one step and not at all of them.
    fn repeat(&self, count: u32, step: impl FnMut(u32) -> bool);
}

/// Tables, constants and the FIB.
pub trait Tables: Sessions {
    /// Constants of this program.
    fn config(&self) -> &Config;

    /// Where an exact pod address is.
    fn pod(&self, key: &OverlayAddress) -> Option<Route>;

    /// Where the longest prefix that holds `key` is.
    fn prefix(&self, key: PrefixKey) -> Option<Route>;

    /// The VTEP with this id.
    fn vtep(&self, id: u32) -> Option<&Vtep>;

    /// The node that an outer source address belongs to.
    fn source(&self, key: &OverlayAddress) -> Option<Route>;

    /// What an address of this host is.
    fn address(&self, address: Ipv4) -> Option<LocalAddress>;

    /// How to leave by an interface that the FIB named.
    fn egress(&self, ifindex: u32) -> Option<Egress>;

    /// Asks the FIB, as if the packet had arrived on this interface.
    fn fib(&self, query: &FibQuery) -> Fib;

    /// Gives `work` the place where the way out of such packets is remembered, which is this CPU's alone and may hold
    /// anybody's, and gives what `work` gives.
    fn with_way_out<R>(&self, query: &FibQuery, work: impl FnOnce(&mut WayOut) -> R) -> Option<R>;

    /// Whether one more ICMP error may be sent now; takes it from the allowance (RFC 1812 section 4.3.2.8).
    fn may_answer(&self) -> bool;

    /// The same verdict, of which a verifier knows nothing: it goes on with one state for all that lead here.
    #[inline(always)]
    fn forget(&self, verdict: Verdict) -> Verdict {
        verdict
    }

    /// Whether the host's network stack owns `address`.
    #[inline(always)]
    fn is_kernels(&self, address: Ipv4) -> bool {
        self.config().is_in_local_prefix(address)
            || self.address(address).is_some_and(|found| found.kind & LocalAddress::KERNEL != 0)
    }

    /// Whether clients are translated to `address`, or were.
    #[inline(always)]
    fn is_snat(&self, address: Ipv4) -> bool {
        self.config().may_be_snat(address)
            && self.address(address).is_some_and(|found| found.kind & LocalAddress::SNAT != 0)
    }

    /// Where `address` is within `overlay`: the exact pod if there is one (cheap), else the longest prefix (dear).
    #[inline(always)]
    fn route(&self, overlay: u32, address: Ipv4) -> Option<Route> {
        match self.pod(&OverlayAddress { overlay, address }) {
            Some(route) => Some(route),
            None => self.prefix(PrefixKey { overlay, address }),
        }
    }
}
