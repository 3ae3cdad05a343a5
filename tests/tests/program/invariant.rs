//! What must hold for every frame, whatever it is: an oracle for random frames that knows nothing of the engine.

use etherparse::{EtherType, NetSlice, SlicedPacket, TransportSlice, checksum::Sum16BitWords};
use gateway_common::abi::{Class, Outcome};

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
        Outcome::ArpReply => {
            let (before, after) = (&input[link_len(input)?..], &output[link_len(output)?..]);
            arp_answer(before, after)
        }
        Outcome::ArpReplyTunnel => arp_answer(tunnelled(input)?, &inner_of(output)?),
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
    same(&expected, after, "more than TTL, ECN and checksum of the packet")
}

fn valid(header: &[u8; 20]) -> bool {
    Sum16BitWords::new().add_slice(header).ones_complement() == 0
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
