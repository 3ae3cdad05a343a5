//! The edits: everything that changes a frame, done after everything is decided.

use network_types::ip::Ipv4Hdr;

use super::{Frame, Verdict};
use crate::{
    abi::{
        HEADER_CAPACITY, HEADER_DIRECT, HEADER_DIRECT_TAGGED, HEADER_VXLAN, HEADER_VXLAN_TAGGED, Outcome,
        VtepSlot,
    },
    checksum::{self, Sum},
    flow,
    wire::{Be16, EtherType, Ethernet, Tag, TaggedEthernet, TunnelHeaders, Wire, view},
};

/// What of the inner packet shows on the outer header.
#[derive(Clone, Copy)]
pub(super) struct Outer {
    /// Flow hash.
    pub hash: u32,
    /// Inner type of service byte, for ECN.
    pub tos: u8,
    /// Set the outer DF bit.
    pub dont_fragment: bool,
}

/// Outer headers of a VXLAN packet over IPv4 behind `L2` bytes of link header.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct TunnelHeader<const L2: usize> {
    pub link: [u8; L2],
    pub ip: Ipv4Hdr,
    pub tunnel: TunnelHeaders,
}

// SAFETY: `repr(C)` of `Wire` fields: alignment 1, no padding, any bit pattern.
unsafe impl<const L2: usize> Wire for TunnelHeader<L2> {}

/// A packet to be routed and `P` bytes in front of it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Routed<P> {
    front: P,
    ip: Ipv4Hdr,
}

// SAFETY: as above.
unsafe impl<P: Wire> Wire for Routed<P> {}

const ECN_MASK: u8 = 3;
const ECN_ECT0: u8 = 2;
const ECN_CE: u8 = 3;
const DF: [u8; 2] = [0x40, 0];

impl<const L2: usize> TunnelHeader<L2> {
    /// Header length.
    pub(super) const LEN: usize = size_of::<Self>();

    /// The template of a slot whose `header_len` is [`Self::LEN`].
    #[inline(always)]
    pub(super) fn template(slot: &VtepSlot) -> &Self {
        const { assert!(Self::LEN <= HEADER_CAPACITY) };
        view::prefix(&slot.header)
    }

    /// Patches a copied template for `payload` bytes behind the inner Ethernet header.
    #[inline(always)]
    pub(super) fn patch(&mut self, slot: &VtepSlot, payload: u32, outer: Outer) {
        let total =
            Be16::new((payload as u16).wrapping_add((size_of::<Ipv4Hdr>() + TunnelHeaders::LEN) as u16));
        // ECN: the inner bits, but CE becomes ECT(0), as Linux does it (include/net/inet_ecn.h, INET_ECN_encapsulate).
        let inner = outer.tos & ECN_MASK;
        let ecn = if inner == ECN_CE { ECN_ECT0 } else { inner };
        let mut sum = Sum::new(slot.checksum_base).add(total.bytes).add([0, ecn]);
        self.ip.tos |= ecn;
        self.ip.tot_len = total.bytes;
        // A template made before the daemon was told to inherit may have it already.
        if outer.dont_fragment && self.ip.frags != DF {
            self.ip.frags = DF;
            sum = sum.add(DF);
        }
        self.ip.check = sum.checksum();
        self.tunnel.udp.src = flow::source_port(outer.hash).bytes;
        self.tunnel.udp.len = Be16::new((payload as u16).wrapping_add(TunnelHeaders::LEN as u16)).bytes;
    }
}

/// What stands in front of a packet to a VTEP.
pub(super) trait Front: Wire {
    /// Copies the slot's header, whose length is that of `Self`, for `payload` bytes behind it.
    fn put(&mut self, slot: &VtepSlot, payload: u32, outer: Outer);
}

impl<const L2: usize> Front for TunnelHeader<L2> {
    #[inline(always)]
    fn put(&mut self, slot: &VtepSlot, payload: u32, outer: Outer) {
        *self = *Self::template(slot);
        self.patch(slot, payload, outer);
    }
}

impl<const L2: usize> Front for [u8; L2] {
    #[inline(always)]
    fn put(&mut self, slot: &VtepSlot, _: u32, _: Outer) {
        const { assert!(L2 <= HEADER_CAPACITY) };
        *self = *view::prefix(&slot.header);
    }
}

/// Puts the slot's header in front of a packet that has `link_len` bytes of link header and `space` bytes behind it;
/// where the packet's IP header is then.
#[inline(always)]
pub(super) fn to_vtep<F: Frame>(
    frame: &mut F,
    link_len: usize,
    space: u32,
    slot: &VtepSlot,
    outer: Outer,
) -> Result<usize, Verdict> {
    match slot.header_len {
        HEADER_VXLAN => routed::<F, TunnelHeader<{ Ethernet::LEN }>>(frame, link_len, space, slot, outer),
        HEADER_VXLAN_TAGGED => {
            routed::<F, TunnelHeader<{ TaggedEthernet::LEN }>>(frame, link_len, space, slot, outer)
        }
        HEADER_DIRECT => routed::<F, [u8; Ethernet::LEN]>(frame, link_len, space, slot, outer),
        HEADER_DIRECT_TAGGED => routed::<F, [u8; TaggedEthernet::LEN]>(frame, link_len, space, slot, outer),
        _ => Err(Verdict::drop(Outcome::VtepMissing)),
    }
}

#[inline(always)]
fn routed<F: Frame, P: Front>(
    frame: &mut F,
    link_len: usize,
    space: u32,
    slot: &VtepSlot,
    outer: Outer,
) -> Result<usize, Verdict> {
    let routed: &mut Routed<P> = resized(frame, link_len, size_of::<P>())?;
    routed.front.put(slot, space, outer);
    hop(&mut routed.ip);
    Ok(size_of::<P>())
}

/// How a packet leaves to the outside.
#[derive(Clone, Copy)]
pub(super) struct Outward<'a> {
    /// Header of the link, of an IPv4 packet; where it lies, as on the stack it would be copied in odd pieces.
    pub link: &'a Ethernet,
    /// VLAN tag to push, 0 for none.
    pub vlan: u16,
    /// New ECN bits, if they change.
    pub ecn: Option<u8>,
}

/// Strips everything in front of the packet at `at`, and gives it a link header for the outside; where the packet's
/// IP header is then.
#[inline(always)]
pub(super) fn to_outside<F: Frame>(frame: &mut F, at: usize, outward: Outward<'_>) -> Result<usize, Verdict> {
    let (at, ip) = if outward.vlan == 0 {
        let routed: &mut Routed<Ethernet> = resized(frame, at, Ethernet::LEN)?;
        routed.front = *outward.link;
        (Ethernet::LEN, &mut routed.ip)
    } else {
        let routed: &mut Routed<TaggedEthernet> = resized(frame, at, TaggedEthernet::LEN)?;
        // In place: put together on the stack, it would be copied in odd pieces.
        routed.front.ethernet = *outward.link;
        routed.front.ethernet.kind = EtherType::VLAN;
        routed.front.tag = Tag { tci: Be16::new(outward.vlan), kind: EtherType::IPV4 };
        (TaggedEthernet::LEN, &mut routed.ip)
    };
    if let Some(ecn) = outward.ecn {
        set_ecn(ip, ecn);
    }
    hop(ip);
    Ok(at)
}

/// Makes what stands in front of the IP packet `to` bytes long instead of `from`.
#[inline(always)]
#[expect(clippy::cast_possible_wrap, reason = "lengths of headers")]
fn resized<F: Frame, T: Wire>(frame: &mut F, from: usize, to: usize) -> Result<&mut T, Verdict> {
    if from != to && !frame.grow_front((to as i32).wrapping_sub(from as i32)) {
        return Err(Verdict::pass(Outcome::NoHeadroom));
    }
    frame.write::<T>(0).ok_or(Verdict::drop(Outcome::ResizeFailed))
}

/// One hop of a router: TTL and header checksum (RFC 1812 section 5.3.1). The TTL is at least 2.
#[inline(always)]
fn hop(ip: &mut Ipv4Hdr) {
    let old = [ip.ttl, ip.proto];
    let new = [ip.ttl.wrapping_sub(1), ip.proto];
    ip.ttl = new[0];
    ip.check = checksum::update(ip.check, old, new);
}

#[inline(always)]
fn set_ecn(ip: &mut Ipv4Hdr, ecn: u8) {
    let old = [ip.vihl, ip.tos];
    let new = [ip.vihl, ip.tos & !ECN_MASK | ecn];
    ip.tos = new[1];
    ip.check = checksum::update(ip.check, old, new);
}
