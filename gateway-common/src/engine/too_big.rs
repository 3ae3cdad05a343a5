//! ICMP "fragmentation needed" (RFC 792, RFC 1191): to a client whose packet does not fit the path to the pod, and to a
//! pod whose translated packet does not fit the client's link.

use network_types::ip::Ipv4Hdr;

use super::{
    Frame, Tables, Verdict,
    classify::{DONT_FRAGMENT, ICMP, Link, Packet},
    emit::{Front, Outer, TunnelHeader},
    ingress::Arrived,
};
use crate::{
    abi::{
        Config, HEADER_DIRECT, HEADER_DIRECT_TAGGED, HEADER_VXLAN, HEADER_VXLAN_TAGGED, Outcome, VtepFlags,
        VtepSlot,
    },
    checksum::Sum,
    flow::Flow,
    wire::{Be16, Ethernet, Ipv4, LinkHeader, TaggedEthernet, Wire},
};

/// What the error quotes: the IP header and eight bytes (RFC 792). It is all that a host needs to find the socket.
const QUOTE: usize = 28;
const ICMP_HEADER: usize = 8;
const DESTINATION_UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
const TTL: u8 = 64;
/// Precedence "internetwork control" (RFC 1812 section 4.3.2.5).
const TOS: u8 = 0xc0;

/// Bytes that come in front: the error's own headers.
const FRONT: usize = size_of::<Ipv4Hdr>() + ICMP_HEADER;
const GROWTH: i32 = 28;

/// The link header of the error, and the client's, which the growth left behind it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Shifted<L, const GAP: usize> {
    new: L,
    gap: [u8; GAP],
    old: L,
}

// SAFETY: `repr(C)` of `Wire` fields: alignment 1, no padding, any bit pattern.
unsafe impl<L: Wire, const GAP: usize> Wire for Shifted<L, GAP> {}

/// The error, in front of and around what is left of the client's packet.
#[repr(C)]
#[derive(Clone, Copy)]
struct Answer<L> {
    link: L,
    ip: Ipv4Hdr,
    icmp: [u8; ICMP_HEADER],
    quote: [u8; QUOTE],
}

// SAFETY: `repr(C)` of `Wire` fields: alignment 1, no padding, any bit pattern.
unsafe impl<L: Wire> Wire for Answer<L> {}

/// Answers `packet`, which is larger than `mtu` bytes and may not be fragmented. It is quoted as the client sent it.
#[inline(always)]
pub(super) fn answer<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    link: Link,
    packet: Packet,
    mtu: u16,
) -> Verdict {
    let config = tables.config();
    // Errors about errors and about later fragments are not sent (RFC 1122 section 3.2.2).
    if packet.is_later_fragment() || is_icmp_error(frame, packet) {
        return Verdict::drop(Outcome::TooBigSilent);
    }
    if config.address == Ipv4::UNSPECIFIED {
        return Verdict::pass(Outcome::Oversize);
    }
    if !tables.may_answer() {
        return Verdict::drop(Outcome::TooBigLimited);
    }
    let edited = if link.len == Ethernet::LEN {
        edit::<F, Ethernet, { FRONT - Ethernet::LEN }>(frame, config, packet.source, mtu)
    } else {
        edit::<F, TaggedEthernet, { FRONT - TaggedEthernet::LEN }>(frame, config, packet.source, mtu)
    };
    match edited {
        Ok(()) => Verdict::send(Outcome::TooBigReply, config.ifindex, config),
        Err(verdict) => verdict,
    }
}

#[inline(always)]
fn is_icmp_error<F: Frame>(frame: &F, packet: Packet) -> bool {
    // All but the queries and their answers (RFC 792, RFC 1122 section 3.2.2).
    packet.protocol == ICMP
        && match frame.read::<[u8; 1]>(packet.transport()) {
            Some([kind]) => !matches!(kind, 0 | 8 | 13 | 14),
            None => true,
        }
}

#[inline(always)]
fn edit<F: Frame, L: LinkHeader, const GAP: usize>(
    frame: &mut F,
    config: &Config,
    to: Ipv4,
    mtu: u16,
) -> Result<(), Verdict> {
    if !frame.grow_front(GROWTH) {
        return Err(Verdict::pass(Outcome::NoHeadroom));
    }
    let failed = Verdict::drop(Outcome::ResizeFailed);
    if !frame.truncate(size_of::<Answer<L>>() as u32) {
        return Err(failed);
    }
    let shifted = frame.write::<Shifted<L, GAP>>(0).ok_or(failed)?;
    shifted.new = shifted.old;
    let client = shifted.old.addresses().src;
    let ethernet = shifted.new.addresses();
    ethernet.dst = client;
    ethernet.src = config.mac;

    let Answer { ip, icmp, quote, .. } = frame.write::<Answer<L>>(0).ok_or(failed)?;
    fill(ip, icmp, quote, Error { from: config.address, to, mtu });
    Ok(())
}

/// What an error says, and between whom.
#[derive(Clone, Copy)]
struct Error {
    from: Ipv4,
    to: Ipv4,
    mtu: u16,
}

#[inline(always)]
fn fill(ip: &mut Ipv4Hdr, icmp: &mut [u8; ICMP_HEADER], quote: &[u8; QUOTE], error: Error) {
    let Error { from, to, mtu } = error;
    let total = Be16::new((size_of::<Ipv4Hdr>() + ICMP_HEADER + QUOTE) as u16).bytes;
    let sum = Sum::default()
        .add([0x45, TOS])
        .add(total)
        .add([TTL, ICMP])
        .add([from.octets[0], from.octets[1]])
        .add([from.octets[2], from.octets[3]])
        .add([to.octets[0], to.octets[1]])
        .add([to.octets[2], to.octets[3]]);
    *ip = Ipv4Hdr {
        vihl: 0x45,
        tos: TOS,
        tot_len: total,
        id: [0; 2],
        frags: [0; 2],
        ttl: TTL,
        proto: ICMP,
        check: sum.checksum(),
        src_addr: from.octets,
        dst_addr: to.octets,
    };
    let [high, low] = Be16::new(mtu).bytes;
    let mut sum = Sum::default().add([DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED]).add([high, low]);
    for word in quote.as_chunks::<2>().0 {
        sum = sum.add(*word);
    }
    let [check_high, check_low] = sum.checksum();
    *icmp = [DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED, check_high, check_low, 0, 0, high, low];
}

/// Tells a pod whose packet is of a session that it does not fit the client's link of `mtu` bytes. The error comes from
/// the SNAT address, which is where the pod sent to. `is_error`: the packet is an ICMP error itself.
#[inline(always)]
pub(super) fn answer_pod<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    arrived: Arrived<'_>,
    mtu: u16,
    is_error: bool,
) -> Verdict {
    let packet = arrived.packet;
    let dropped = Verdict::drop(Outcome::SnatReplyOversize);
    let Some(vtep) = arrived.origin.vtep(tables).and_then(|vtep| tables.vtep(vtep)) else {
        return dropped;
    };
    let slot = vtep.slot();
    // The answer takes the place of the packet's headers, as that to ARP does.
    let same_length = usize::from(slot.header_len) == packet.at;
    if packet.fragment & DONT_FRAGMENT == 0 || !slot.flags.has(VtepFlags::READY) || !same_length {
        return dropped;
    }
    if is_error {
        return Verdict::drop(Outcome::TooBigSilent);
    }
    if !tables.may_answer() {
        return Verdict::drop(Outcome::TooBigLimited);
    }
    let error = Error { from: packet.destination, to: packet.source, mtu };
    let edited = match slot.header_len {
        HEADER_VXLAN => edit_pod::<F, TunnelHeader<{ Ethernet::LEN }>>(frame, slot, error),
        HEADER_VXLAN_TAGGED => edit_pod::<F, TunnelHeader<{ TaggedEthernet::LEN }>>(frame, slot, error),
        HEADER_DIRECT => edit_pod::<F, [u8; Ethernet::LEN]>(frame, slot, error),
        HEADER_DIRECT_TAGGED => edit_pod::<F, [u8; TaggedEthernet::LEN]>(frame, slot, error),
        _ => Err(dropped),
    };
    match edited {
        Ok(()) => Verdict::send(Outcome::SnatTooBigReply, slot.ifindex, tables.config()),
        Err(verdict) => verdict,
    }
}

/// The error with everything in front of it, and what is left of the pod's packet.
#[repr(C)]
#[derive(Clone, Copy)]
struct PodAnswer<P> {
    front: P,
    ip: Ipv4Hdr,
    icmp: [u8; ICMP_HEADER],
    quote: [u8; QUOTE],
}

// SAFETY: as above.
unsafe impl<P: Wire> Wire for PodAnswer<P> {}

#[inline(always)]
fn edit_pod<F: Frame, P: Front>(frame: &mut F, slot: &VtepSlot, error: Error) -> Result<(), Verdict> {
    let failed = Verdict::drop(Outcome::ResizeFailed);
    if !frame.grow_front(GROWTH) || !frame.truncate(size_of::<PodAnswer<P>>() as u32) {
        return Err(failed);
    }
    let PodAnswer { front, ip, icmp, quote } = frame.write::<PodAnswer<P>>(0).ok_or(failed)?;
    fill(ip, icmp, quote, error);
    let flow = Flow { source: error.from, destination: error.to, ports: 0, protocol: ICMP };
    let outer = Outer { hash: flow.hash(), tos: TOS, dont_fragment: false };
    front.put(slot, (GROWTH as usize + QUOTE) as u32, outer);
    Ok(())
}

const _: () = assert!(FRONT == GROWTH as usize);
