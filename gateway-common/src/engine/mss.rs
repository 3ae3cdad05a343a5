//! MSS clamping: a TCP SYN may not announce segments that do not fit the path behind the tunnel.
//!
//! Clients on a LAN of 1500 bytes would otherwise send every full segment too large. Only the value of the option and
//! the checksum change, never the length.

use super::{
    Frame,
    classify::{Packet, TCP},
};
use crate::{checksum, wire::Be16};

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

/// An MSS option that must be lowered, or nothing to do.
///
/// One machine word, for the reason that [`Verdict`](super::Verdict) is one: of an `Option`, the compiler moves the
/// parts that were never written as well, which the verifier refuses.
#[derive(Clone, Copy)]
pub(super) struct Clamp {
    /// New value and old value as they lie in memory, offset of the value behind the TCP header's start, length of
    /// the IP header: 16 bits each. 0 is nothing to do.
    word: u64,
}

/// Looks for an MSS option above what `mtu` allows, in bytes.
#[inline(always)]
pub(super) fn find<F: Frame>(frame: &F, packet: Packet, mtu: u16) -> Clamp {
    look(frame, packet, mtu).unwrap_or(Clamp::NONE)
}

#[inline(always)]
fn look<F: Frame>(frame: &F, packet: Packet, mtu: u16) -> Option<Clamp> {
    if packet.protocol != TCP || packet.is_fragment() {
        return None;
    }
    let tcp = packet.transport();
    let header = frame.read::<[u8; HEADER]>(tcp)?;
    if header[FLAGS] & SYN == 0 {
        return None;
    }
    let length = usize::from(header[12] >> 4) * 4;
    let mut at = HEADER;
    for _ in 0..OPTIONS {
        if at + 4 > length {
            return None;
        }
        let &[kind, size, high, low] = frame.read::<[u8; 4]>(tcp + at)?;
        match kind {
            END => return None,
            NOP => at += 1,
            MAXIMUM_SEGMENT_SIZE => {
                let limit = mtu.saturating_sub(HEADERS);
                let lower = size == 4 && u16::from_be_bytes([high, low]) > limit;
                let clamp = Clamp::new(packet.header_len, at + 2, [high, low], Be16::new(limit).bytes);
                return if lower { Some(clamp) } else { None };
            }
            _ if size < 2 => return None,
            _ => at += usize::from(size),
        }
    }
    None
}

impl Clamp {
    /// Nothing to do.
    pub(super) const NONE: Self = Self { word: 0 };

    #[inline(always)]
    const fn new(ip_header: usize, value: usize, old: [u8; 2], new: [u8; 2]) -> Self {
        let (old, new) = (u16::from_ne_bytes(old) as u64, u16::from_ne_bytes(new) as u64);
        Self { word: new << 48 | old << 32 | (value as u64) << 16 | ip_header as u64 }
    }

    /// Writes the lower value into the packet whose IP header starts at `ip`; `None` if the frame ends before.
    #[inline(always)]
    pub(super) fn apply<F: Frame>(self, frame: &mut F, ip: usize) -> Option<()> {
        if self.word == Self::NONE.word {
            return Some(());
        }
        let (new, old) = (((self.word >> 48) as u16).to_ne_bytes(), ((self.word >> 32) as u16).to_ne_bytes());
        let value = (self.word >> 16) as usize & 0x3f;
        let tcp = ip + (self.word as usize & 0x3f);
        *frame.write::<[u8; 2]>(tcp + value)? = new;
        let check = frame.write::<[u8; 2]>(tcp + CHECKSUM)?;
        // At an odd offset the value's bytes belong to two words: the high byte is the low one of the first
        // (RFC 1071 section 2 B).
        let odd = value & 1 != 0;
        let word = |[high, low]: [u8; 2]| if odd { [low, high] } else { [high, low] };
        *check = checksum::update(*check, word(old), word(new));
        Some(())
    }
}
