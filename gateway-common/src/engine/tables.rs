//! The two traits through which the engine sees the world.

use crate::{
    abi::{Config, Egress, LocalAddress, OverlayAddress, PrefixKey, Route, Vtep},
    wire::{Ipv4, Mac, Wire},
};

/// A frame, from the first byte of the Ethernet header.
///
/// References into the frame borrow it; resizing needs it whole. So no reference survives a resize.
pub trait Frame {
    /// Bytes of the whole frame, also those that cannot be read directly (fragments of a jumbo frame).
    fn len(&self) -> u32;

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

/// Tables, constants and the FIB.
pub trait Tables {
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

    /// Whether one more ICMP error may be sent now; takes it from the allowance (RFC 1812 section 4.3.2.8).
    fn may_answer(&self) -> bool;

    /// Whether the host's network stack owns `address`.
    #[inline(always)]
    fn is_kernels(&self, address: Ipv4) -> bool {
        self.address(address).is_some_and(|found| found.kind & LocalAddress::KERNEL != 0)
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
