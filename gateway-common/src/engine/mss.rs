//! MSS clamping: a TCP SYN may not announce segments that do not fit the path behind the tunnel.
//!
//! Clients on a LAN of 1500 bytes would otherwise send every full segment too large. Only the value of the option and
//! the checksum change, never the length. This is the last edit, on the frame as it leaves: the search for the option
//! has many ways, and the verifier follows whatever comes after for each of them.

use network_types::ip::Ipv4Hdr;

use super::{
    Frame, Tables, Verdict,
    classify::{Packet, TCP},
};
use crate::{
    abi::{Overlay, OverlayFlags},
    checksum,
    wire::{Be16, EtherType, Ethernet, TaggedEthernet, TunnelHeaders},
};

const HEADER: usize = 20;
const FLAGS: usize = 13;
const CHECKSUM: usize = 16;
const SYN: u8 = 2;
const END: u8 = 0;
const NOP: u8 = 1;
const MAXIMUM_SEGMENT_SIZE: u8 = 2;
/// Every known stack puts the MSS first; so many options are looked at.
const OPTIONS: usize = 4;
/// IPv4 and TCP headers without options, which the MSS does not count (RFC 6691).
const HEADERS: u16 = 40;

/// Whether `packet` is a SYN that is held to the MTU of its path: [`clamp`] looks only at those. What has IP options is
/// left to the kernel.
#[inline(always)]
pub(super) fn applies<F: Frame>(frame: &F, packet: Packet, overlay: &Overlay) -> bool {
    overlay.flags.has(OverlayFlags::CLAMP_MSS)
        && packet.protocol == TCP
        && !packet.is_fragment()
        && frame.read::<[u8; HEADER]>(packet.transport()).is_some_and(|header| header[FLAGS] & SYN != 0)
}

/// Lowers the MSS option of a SYN that leaves by `verdict`, if it announces more than fits [`Verdict::mtu`]. `None` if
/// there is nothing to lower.
#[inline(always)]
pub(super) fn clamp<F: Frame, T: Tables>(frame: &mut F, tables: &T, verdict: &mut Verdict) -> Option<()> {
    let mtu = verdict.mtu();
    let link = match frame.read::<Ethernet>(0)?.kind {
        EtherType::VLAN => TaggedEthernet::LEN,
        _ => Ethernet::LEN,
    };
    let at = if verdict.is_tunnelled() { link + size_of::<Ipv4Hdr>() + TunnelHeaders::LEN } else { link };
    let tcp = at + size_of::<Ipv4Hdr>();
    let header = frame.read::<[u8; HEADER]>(tcp)?;
    // From here on one way serves all outcomes.
    *verdict = tables.forget(*verdict);
    let end = usize::from(header[12] >> 4) * 4;
    let mut at = HEADER;
    for _ in 0..OPTIONS {
        if at + 4 > end {
            return None;
        }
        let &[kind, size, high, low] = frame.read::<[u8; 4]>(tcp + at)?;
        match kind {
            END => return None,
            MAXIMUM_SEGMENT_SIZE => {
                let limit = mtu.saturating_sub(HEADERS);
                if size != 4 || u16::from_be_bytes([high, low]) <= limit {
                    return None;
                }
                return replace(frame, tcp, at + 2, [high, low], Be16::new(limit).bytes);
            }
            NOP => at += 1,
            _ if size < 2 => return None,
            _ => at += usize::from(size),
        }
    }
    None
}

/// Replaces the bytes at offset `value` of the TCP header, and mends its checksum.
#[inline(always)]
fn replace<F: Frame>(frame: &mut F, tcp: usize, value: usize, old: [u8; 2], new: [u8; 2]) -> Option<()> {
    *frame.write::<[u8; 2]>(tcp + value)? = new;
    // At an odd offset the value's bytes belong to two words: the high byte is the low one of the first
    // (RFC 1071 section 2 B).
    let odd = value & 1 != 0;
    let word = |[high, low]: [u8; 2]| if odd { [low, high] } else { [high, low] };
    let check = frame.write::<[u8; 2]>(tcp + CHECKSUM)?;
    *check = checksum::update(*check, word(old), word(new));
    Some(())
}
