//! What must hold for every frame, whatever it is: an oracle for random frames that knows nothing of the engine.

use std::ops::Range;

use etherparse::{
    EtherType, Icmpv4Type, NetSlice, SlicedPacket, TransportSlice, checksum::Sum16BitWords,
    icmpv4::DestUnreachableHeader,
};
use gateway_common::abi::{Class, Outcome};

use crate::world::{POOL, SNAT, SNAT_CILIUM, SNAT_TAGGED};

/// UDP, VXLAN and inner Ethernet headers.
const TUNNEL: usize = 8 + 8 + 14;

/// Checks the frame before and after the program, given the outcome that was counted.
pub(crate) fn check(outcome: Outcome, input: &[u8], output: &[u8]) -> Result<(), String> {
    let class = Outcome::by_number(outcome.number()).ok_or("no such outcome")?.class;
    match outcome {
        _ if class != Class::Forward => same(input, output, "a frame that is not forwarded"),
        Outcome::Encap => {
            let packet = &input[link_len(input)?..];
            let inner = inner_of(output)?;
            if inner.len() != packet.len() {
                return Err(format!("{} bytes became {} in the tunnel", packet.len(), inner.len()));
            }
            routed(packet, &inner)
        }
        Outcome::Decap => routed(tunnelled(input)?, plain(output)?),
        Outcome::RouteDirect | Outcome::DirectIn => routed(&input[link_len(input)?..], plain(output)?),
        Outcome::TooBigReply if output[..6] == input[6..12] => {
            too_big(&input[link_len(input)?..], plain(output)?)
        }
        Outcome::SnatTooBigReply => match inner_of(output) {
            Ok(inner) => too_big(tunnelled(input)?, &inner),
            Err(_) => too_big(&input[link_len(input)?..], plain(output)?),
        },
        Outcome::ArpReply => {
            let (before, after) = (&input[link_len(input)?..], &output[link_len(output)?..]);
            arp_answer(before, after)
        }
        Outcome::ArpReplyTunnel => arp_answer(tunnelled(input)?, &inner_of(output)?),
        Outcome::SnatNew | Outcome::SnatForward | Outcome::SnatErrorForward => {
            let packet = &input[link_len(input)?..];
            // A node without a tunnel gets the packet as it is.
            let inner = match inner_of(output) {
                Ok(inner) => inner,
                Err(_) => plain(output)?.to_vec(),
            };
            translated(outcome, packet, &inner)
        }
        Outcome::SnatReply | Outcome::SnatErrorReply => {
            let packet = match tunnelled(input) {
                Ok(inner) if inner.len() >= plain(output)?.len() => inner,
                _ => &input[link_len(input)?..],
            };
            translated(outcome, packet, plain(output)?)
        }
        other => Err(format!("{other:?} has no invariant: write it")),
    }
}

fn same(input: &[u8], output: &[u8], what: &str) -> Result<(), String> {
    if input == output { Ok(()) } else { Err(format!("{what} was edited")) }
}

fn link_len(frame: &[u8]) -> Result<usize, String> {
    match frame.get(12..14).ok_or("no Ethernet header")? {
        [0x81, 0x00] => Ok(18),
        _ => Ok(14),
    }
}

/// What a tunnel packet of a node carries.
fn tunnelled(frame: &[u8]) -> Result<&[u8], String> {
    let at = link_len(frame)?;
    let outer = usize::from(frame[at] & 0x0f) * 4;
    frame.get(at + outer + TUNNEL..).ok_or_else(|| "too short for a tunnel packet".to_owned())
}

/// The IP packet of a frame that leaves without a tunnel.
fn plain(frame: &[u8]) -> Result<&[u8], String> {
    let at = link_len(frame)?;
    match &frame[at - 2..at] {
        [0x08, 0x00] => Ok(&frame[at..]),
        other => Err(format!("leaves as EtherType {other:02x?}")),
    }
}

/// What a tunnel packet of ours carries. The outer headers are read by etherparse, and every length must fit; what
/// follows the packet is padding of an ARP request that was answered in place.
fn inner_of(frame: &[u8]) -> Result<Vec<u8>, String> {
    let packet = SlicedPacket::from_ethernet(frame).map_err(|error| format!("outer headers: {error}"))?;
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Udp(udp))) = (&packet.net, &packet.transport) else {
        return Err("the outer packet is not UDP over IPv4".to_owned());
    };
    let header = ip.header();
    if header.header_checksum() != header.to_header().calc_header_checksum() {
        return Err("the outer header checksum is wrong".to_owned());
    }
    if usize::from(udp.length()) + 20 != usize::from(header.total_len()) {
        return Err("the outer UDP length is not the rest of the packet".to_owned());
    }
    if udp.checksum() != 0 || udp.source_port() < 49_152 {
        return Err(format!("UDP checksum {:#x}, source port {}", udp.checksum(), udp.source_port()));
    }
    let [0x08, 0, 0, 0, _, _, _, 0, rest @ ..] = udp.payload() else {
        return Err("the VXLAN header is not the I bit and a VNI".to_owned());
    };
    let inner =
        etherparse::Ethernet2Slice::from_slice_without_fcs(rest).map_err(|error| error.to_string())?;
    match inner.ether_type() {
        EtherType::IPV4 | EtherType::ARP => Ok(inner.payload().payload.to_vec()),
        other => Err(format!("inner EtherType {other:?}")),
    }
}

/// RFC 1812 section 5.3.1 and RFC 6040: a router takes one from the TTL and may mark the ECN field; the checksum follows,
/// and stays wrong if it was wrong; nothing else changes.
fn routed(before: &[u8], after: &[u8]) -> Result<(), String> {
    let (Some(old), Some(new)) = (before.first_chunk::<20>(), after.first_chunk::<20>()) else {
        return Err("no IP header".to_owned());
    };
    if old[8] < 2 || new[8] != old[8] - 1 {
        return Err(format!("TTL {} became {}", old[8], new[8]));
    }
    let not_capable = old[1].trailing_zeros() >= 2;
    if old[1] & !3 != new[1] & !3 || (not_capable && old[1] != new[1]) {
        return Err(format!("type of service {:#x} became {:#x}", old[1], new[1]));
    }
    if valid(old) != valid(new) {
        return Err("the header checksum was right and is wrong, or the other way round".to_owned());
    }
    let mut expected = before.to_vec();
    for at in [1, 8, 10, 11] {
        expected[at] = new[at];
    }
    if let Some(at) = segment_size(before) {
        let size =
            |packet: &[u8]| packet.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
        if size(after) < size(before) {
            for byte in [at, at + 1, CHECKSUM, CHECKSUM + 1] {
                expected[byte] = after[byte];
            }
            let sum = |packet: &[u8]| Sum16BitWords::new().add_slice(&packet[20..]).ones_complement();
            if sum(before) != sum(after) {
                return Err("the MSS was lowered, but not the TCP checksum by as much".to_owned());
            }
        }
    }
    same(&expected, after, "more than TTL, ECN, MSS and checksums of the packet")
}

/// RFC 3022 section 4: one address of the packet changes, with its port or identifier, and the checksums as much; of an
/// ICMP error also the opposite end of the packet that it quotes. A checksum that was wrong stays wrong, and of UDP one
/// that was absent stays absent.
fn translated(outcome: Outcome, before: &[u8], after: &[u8]) -> Result<(), String> {
    const SOURCE: Range<usize> = 12..16;
    const DESTINATION: Range<usize> = 16..20;
    let is_error = matches!(outcome, Outcome::SnatErrorForward | Outcome::SnatErrorReply);
    let forward = !matches!(outcome, Outcome::SnatReply | Outcome::SnatErrorReply);
    let (end, opposite) = if forward { (SOURCE, DESTINATION) } else { (DESTINATION, SOURCE) };
    if before.len() != after.len() || before.len() < 28 {
        return Err(format!("{} bytes became {}", before.len(), after.len()));
    }
    if after[8] + 1 != before[8] {
        return Err(format!("TTL {} became {}", before[8], after[8]));
    }
    let ours = if forward { &after[end.clone()] } else { &before[end.clone()] };
    let is_snat = |address: &[u8]| {
        [SNAT, SNAT_TAGGED, SNAT_CILIUM].iter().chain(&POOL).any(|snat| snat.as_slice() == address)
    };
    if !is_snat(ours) {
        return Err(format!("{ours:?} is no SNAT address"));
    }
    let whole = usize::from(u16::from_be_bytes([before[2], before[3]]));
    let mut sums = vec![("IP header", sum(&before[..20]), sum(&after[..20]))];
    let mut edited: Vec<Range<usize>> = vec![1..2, 8..9, 10..12, end];
    let port = |at: usize, protocol: u8, source: bool| match protocol {
        1 => at + 4..at + 6,
        _ if source => at..at + 2,
        _ => at + 2..at + 4,
    };
    let checksum = |at: usize, protocol: u8| match protocol {
        1 => at + 2..at + 4,
        6 => at + 16..at + 18,
        _ => at + 6..at + 8,
    };
    let protocol = before[9];
    edited.push(checksum(20, protocol));
    if is_error {
        let quoted = 28;
        let inner = before[quoted + 9];
        edited.extend([
            quoted + 10..quoted + 12,
            quoted + opposite.start..quoted + opposite.end,
            port(quoted + 20, inner, !forward),
        ]);
        if inner != 6 {
            edited.push(checksum(quoted + 20, inner));
        }
        sums.push(("quoted IP header", sum(&before[quoted..48]), sum(&after[quoted..48])));
        sums.push(("ICMP", sum(&before[20..whole]), sum(&after[20..whole])));
    } else {
        edited.push(port(20, protocol, forward));
        if let Some(at) = segment_size(before) {
            edited.push(at..at + 2);
        }
        let absent = protocol == 17 && before[26..28] == [0, 0];
        if absent != (protocol == 17 && after[26..28] == [0, 0]) {
            return Err("a UDP checksum came or went".to_owned());
        }
        if !absent {
            let pseudo = |packet: &[u8]| {
                let addresses = if protocol == 1 { &[] } else { &packet[12..20] };
                sum(&[addresses, &packet[20..whole]].concat())
            };
            sums.push(("transport", pseudo(before), pseudo(after)));
        }
    }
    for (what, old, new) in sums {
        if old != new {
            return Err(format!("the {what} summed up to {old:#06x}, and then to {new:#06x}"));
        }
    }
    let mut expected = before.to_vec();
    for range in edited {
        expected[range.clone()].copy_from_slice(&after[range]);
    }
    same(&expected, after, "more than one end of the packet, its TTL, ECN and checksums")
}

/// One's-complement sum, of which 0 has two forms.
fn sum(bytes: &[u8]) -> u16 {
    match Sum16BitWords::new().add_slice(bytes).ones_complement() {
        u16::MAX => 0,
        sum => sum,
    }
}

/// Offset of the TCP checksum in a packet without IP options.
const CHECKSUM: usize = 20 + 16;

/// Offset of the value of the first MSS option of a SYN (RFC 9293 section 3.1).
fn segment_size(packet: &[u8]) -> Option<usize> {
    let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff != 0;
    let tcp = packet.get(20..40)?;
    if packet[0] != 0x45 || packet[9] != 6 || fragment || tcp[13] & 2 == 0 {
        return None;
    }
    let end = 20 + usize::from(tcp[12] >> 4) * 4;
    let mut at = 40;
    while at + 4 <= end.min(packet.len()) {
        match (packet[at], packet[at + 1]) {
            (0, _) | (_, 0) => return None,
            (1, _) => at += 1,
            (2, 4) => return Some(at + 2),
            (_, size) => at += usize::from(size),
        }
    }
    None
}

fn valid(header: &[u8; 20]) -> bool {
    Sum16BitWords::new().add_slice(header).ones_complement() == 0
}

/// RFC 1191 section 4: the beginning of the packet comes back to its sender, with a size that it exceeds.
fn too_big(before: &[u8], answer: &[u8]) -> Result<(), String> {
    let packet = SlicedPacket::from_ip(answer).map_err(|error| error.to_string())?;
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Icmpv4(icmp))) = (&packet.net, &packet.transport)
    else {
        return Err("no ICMP error".to_owned());
    };
    let Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded { next_hop_mtu }) =
        icmp.icmp_type()
    else {
        return Err(format!("{:?}", icmp.icmp_type()));
    };
    let right = ip.header().destination() == before[12..16]
        && !icmp.payload().is_empty()
        && icmp.payload() == &before[..icmp.payload().len()]
        && usize::from(next_hop_mtu) < before.len()
        && icmp.icmp_type().calc_checksum(icmp.payload()) == icmp.checksum();
    if right { Ok(()) } else { Err("not the error about this packet".to_owned()) }
}

/// RFC 826: sender and target change places, the sender is now the target that was asked for.
fn arp_answer(before: &[u8], after: &[u8]) -> Result<(), String> {
    let (Some(asked), Some(told)) = (before.first_chunk::<28>(), after.first_chunk::<28>()) else {
        return Err("no ARP packet".to_owned());
    };
    let right = told[..6] == asked[..6]
        && told[6..8] == [0, 2]
        && told[14..18] == asked[24..28]
        && told[18..28] == asked[8..18]
        && told[8] & 1 == 0;
    if right { Ok(()) } else { Err("not the answer to the request".to_owned()) }
}
