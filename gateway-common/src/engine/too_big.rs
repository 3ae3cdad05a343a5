//! ICMP "fragmentation needed" (RFC 792, RFC 1191) to a client whose packet does not fit the path to the pod.

use network_types::ip::Ipv4Hdr;

use super::{
    Frame, Tables, Verdict,
    classify::{ICMP, Link, Packet},
};
use crate::{
    abi::{Config, Outcome},
    checksum::Sum,
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

    let answer = frame.write::<Answer<L>>(0).ok_or(failed)?;
    let from = config.address;
    let total = Be16::new((size_of::<Ipv4Hdr>() + ICMP_HEADER + QUOTE) as u16).bytes;
    let sum = Sum::default()
        .add([0x45, TOS])
        .add(total)
        .add([TTL, ICMP])
        .add([from.octets[0], from.octets[1]])
        .add([from.octets[2], from.octets[3]])
        .add([to.octets[0], to.octets[1]])
        .add([to.octets[2], to.octets[3]]);
    answer.ip = Ipv4Hdr {
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
    for word in answer.quote.as_chunks::<2>().0 {
        sum = sum.add(*word);
    }
    let [check_high, check_low] = sum.checksum();
    answer.icmp = [DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED, check_high, check_low, 0, 0, high, low];
    Ok(())
}

const _: () = assert!(FRONT == GROWTH as usize);
