//! ARP: the proxy on external interfaces, and answers in the tunnel.
//!
//! Answered is only what is in a table; everything else passes to the kernel (RFC 826, RFC 5227; the shape of
//! Cilium's `bpf/lib/arp.h`).

use network_types::arp::ArpHdr;

use super::{
    Frame, Tables, Verdict,
    classify::Link,
    emit::{Outer, TunnelHeader},
    ingress::Origin,
};
use crate::{
    abi::{LocalAddress, Outcome, OverlayFlags, Roles, VtepFlags},
    flow::Flow,
    wire::{Be16, EtherType, Ethernet, Ipv4, LinkHeader, Mac, TaggedEthernet, Wire},
};

const ETHERNET: Be16 = Be16::new(1);
const REQUEST: Be16 = Be16::new(1);
const REPLY: Be16 = Be16::new(2);

/// A well-formed request.
#[derive(Clone, Copy)]
struct Request {
    sender_mac: Mac,
    sender: Ipv4,
    target: Ipv4,
}

enum Kind {
    Malformed,
    /// A reply, an announcement, or an operation that we do not know.
    Other,
    Request(Request),
}

#[inline(always)]
fn read<F: Frame>(frame: &F, at: usize) -> Kind {
    let Some(arp) = frame.read::<ArpHdr>(at) else {
        return Kind::Malformed;
    };
    let sender_mac = Mac::new(arp.sha);
    if (Be16 { bytes: arp.htype }) != ETHERNET
        || (Be16 { bytes: arp.ptype }) != EtherType::IPV4
        || arp.hlen != 6
        || arp.plen != 4
        || !sender_mac.is_station()
    {
        return Kind::Malformed;
    }
    let (sender, target) = (Ipv4::new(arp.spa), Ipv4::new(arp.tpa));
    // A request for the sender's own address announces it (RFC 5227 section 3) and wants no answer.
    if (Be16 { bytes: arp.oper }) != REQUEST || sender == target {
        return Kind::Other;
    }
    Kind::Request(Request { sender_mac, sender, target })
}

/// Turns a request into the reply that says `target` is at `mac`.
#[inline(always)]
fn answer(arp: &mut ArpHdr, request: Request, mac: Mac) {
    arp.oper = REPLY.bytes;
    arp.sha = mac.octets;
    arp.spa = request.target.octets;
    arp.tha = request.sender_mac.octets;
    arp.tpa = request.sender.octets;
}

/// ARP on an interface: answered with the interface's MAC address if the target is a pod, in a pod prefix, or a SNAT address.
/// A probe
/// (sender 0.0.0.0) is answered too: the address is in use (RFC 5227 section 2.1.1).
#[inline(always)]
pub(super) fn from_outside<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: Link,
) -> Result<Verdict, Verdict> {
    let config = tables.config();
    let for_us = link.destination == config.mac || link.destination == Mac::BROADCAST;
    if !link.roles.has(Roles::EXTERNAL) || !for_us {
        return Err(Verdict::pass(Outcome::ArpOther));
    }
    let request = match read(frame, link.len) {
        Kind::Request(request) => request,
        Kind::Other => return Err(Verdict::pass(Outcome::ArpOther)),
        Kind::Malformed => return Err(Verdict::pass(Outcome::ArpMalformed)),
    };
    if !is_ours(tables, request.target) {
        return Err(Verdict::pass(Outcome::ArpOther));
    }
    let edited = if link.len == Ethernet::LEN {
        reply_in_place::<F, Ethernet>(frame, request, config.mac)
    } else {
        reply_in_place::<F, TaggedEthernet>(frame, request, config.mac)
    };
    match edited {
        Some(()) => Ok(Verdict::send(Outcome::ArpReply, config.ifindex, config)),
        None => Err(Verdict::pass(Outcome::ArpMalformed)),
    }
}

/// Whether `target` is for us to answer: a SNAT address, which nobody else may take, or a pod; but neither in a subnet
/// of our own, whose clients answer for themselves, nor an address of the kernel's.
#[inline(always)]
fn is_ours<T: Tables>(tables: &T, target: Ipv4) -> bool {
    let config = tables.config();
    if config.is_own(target) {
        return tables.is_snat(target) && !tables.is_kernels(target);
    }
    if tables.is_kernels(target) {
        return false;
    }
    config.overlays().any(|(id, _)| tables.route(id, target).is_some())
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ArpFrame<L> {
    link: L,
    arp: ArpHdr,
}

// SAFETY: `repr(C)` of `Wire` fields: alignment 1, no padding, any bit pattern.
unsafe impl<L: Wire> Wire for ArpFrame<L> {}

#[inline(always)]
fn reply_in_place<F: Frame, L: LinkHeader>(frame: &mut F, request: Request, mac: Mac) -> Option<()> {
    let whole = frame.write::<ArpFrame<L>>(0)?;
    let ethernet = whole.link.addresses();
    ethernet.dst = request.sender_mac;
    ethernet.src = mac;
    answer(&mut whole.arp, request, mac);
    Some(())
}

/// ARP in the tunnel: answered with the VTEP's MAC address if the target is an overlay address of ours. The answer
/// goes to the sending node's configured endpoint.
#[inline(always)]
pub(super) fn from_tunnel<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    origin: Origin<'_>,
    at: usize,
    space: u32,
) -> Result<Verdict, Verdict> {
    let other = Verdict::pass(Outcome::TunnelArp);
    let overlay = origin.overlay;
    let sender = origin.vtep(tables);
    if overlay.flags.has(OverlayFlags::SOURCE_CHECK) && sender.is_none() {
        return Err(Verdict::drop(Outcome::OuterSource));
    }
    if (space as usize) < size_of::<ArpHdr>() {
        return Err(Verdict::drop(Outcome::InnerTruncated));
    }
    let request = match read(frame, at) {
        Kind::Request(request) => request,
        Kind::Other => return Err(other),
        Kind::Malformed => return Err(Verdict::pass(Outcome::ArpMalformed)),
    };
    let ours = request.target.in_subnet(overlay.subnet, overlay.mask)
        && tables.address(request.target).is_some_and(|address| address.kind & LocalAddress::OVERLAY != 0);
    let vtep = sender.and_then(|vtep| tables.vtep(vtep));
    let (true, Some(vtep)) = (ours, vtep) else {
        return Err(other);
    };
    let slot = vtep.slot();
    // The answer overwrites the request's headers, so they must be as long as the template (outer IP options or another
    // VLAN tagging change that). Others are the kernel's.
    let same_length = usize::from(slot.header_len) == at;
    if !same_length || !slot.flags.has(VtepFlags::READY) || slot.flags.has(VtepFlags::DIRECT) {
        return Err(other);
    }
    let flow = Flow { source: request.target, destination: request.sender, ports: 0, protocol: 0 };
    let outer = Outer { hash: flow.hash(), tos: 0, dont_fragment: false };
    let edited = match at {
        TunnelHeader::<{ Ethernet::LEN }>::LEN => {
            reply_through::<F, { Ethernet::LEN }>(frame, request, overlay.mac, slot, space, outer)
        }
        TunnelHeader::<{ TaggedEthernet::LEN }>::LEN => {
            reply_through::<F, { TaggedEthernet::LEN }>(frame, request, overlay.mac, slot, space, outer)
        }
        _ => None,
    };
    match edited {
        Some(()) => Ok(Verdict::send(Outcome::ArpReplyTunnel, slot.ifindex, tables.config())),
        None => Err(other),
    }
}

#[inline(always)]
fn reply_through<F: Frame, const L2: usize>(
    frame: &mut F,
    request: Request,
    mac: Mac,
    slot: &crate::abi::VtepSlot,
    space: u32,
    outer: Outer,
) -> Option<()> {
    let whole = frame.write::<ArpFrame<TunnelHeader<L2>>>(0)?;
    whole.link = *TunnelHeader::<L2>::template(slot);
    whole.link.patch(slot, space, outer);
    whole.link.tunnel.ethernet.dst = request.sender_mac;
    whole.link.tunnel.ethernet.kind = EtherType::ARP;
    answer(&mut whole.arp, request, mac);
    Some(())
}
