//! The flow hash behind the UDP source port of the tunnel.
//!
//! It only has to spread: receive queues and equal-cost paths choose by it. All packets of a flow get the same
//! value, and so do all fragments of a datagram, because they are hashed without ports.

use crate::wire::{Be16, Ipv4};

/// First port of the range that RFC 7348 section 5 recommends.
pub const PORT_MIN: u16 = 0xc000;
const PORT_MASK: u32 = 0x3fff;

/// What a flow is told apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Source address.
    pub source: Ipv4,
    /// Destination address.
    pub destination: Ipv4,
    /// The four bytes of source and destination port as they lie in memory; for ICMP queries the identifier; 0 where
    /// there are none, as in fragments.
    pub ports: u32,
    /// IP protocol number.
    pub protocol: u8,
}

impl Flow {
    /// Of packets with ports.
    #[inline(always)]
    pub const fn new(source: Ipv4, destination: Ipv4, ports: (Be16, Be16), protocol: u8) -> Self {
        let ([a, b], [c, d]) = (ports.0.bytes, ports.1.bytes);
        Self { source, destination, ports: u32::from_ne_bytes([a, b, c, d]), protocol }
    }

    /// A 32-bit hash. Multiply and fold of 64-bit words, the shape of wyhash: two multiplications.
    #[inline(always)]
    pub const fn hash(&self) -> u32 {
        let addresses = ((self.source.word() as u64) << 32) | self.destination.word() as u64;
        let rest = ((self.ports as u64) << 8) | self.protocol as u64;
        let mixed = (addresses ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd6e8_feb8_6659_fd93);
        let mixed = ((mixed ^ (mixed >> 32)) ^ rest).wrapping_mul(0xa076_1d64_78bd_642f);
        (mixed >> 32) as u32
    }
}

/// The UDP source port for a hash: 49152 to 65535 (RFC 7348 section 5).
#[inline(always)]
pub const fn source_port(hash: u32) -> Be16 {
    Be16::new(PORT_MIN | (hash & PORT_MASK) as u16)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn flow(client: u8, port: u16) -> Flow {
        Flow {
            source: Ipv4::new([10, 244, 30, client]),
            destination: Ipv4::new([10, 244, 1, 2]),
            ports: u32::from_ne_bytes([Be16::new(port).bytes[0], Be16::new(port).bytes[1], 0, 80]),
            protocol: 6,
        }
    }

    #[test]
    fn ports_stay_in_the_recommended_range() {
        for hash in [0, 1, 0x3fff, 0x4000, u32::MAX] {
            assert!(source_port(hash).get() >= PORT_MIN);
        }
    }

    /// Balls into bins: 16,384 distinct ports for 4,096 flows leave about 3,624 distinct ones; sequential client
    /// ports, the common case, must not do much worse.
    #[test]
    fn neighbouring_flows_spread() {
        let ports: BTreeSet<u16> =
            (0..4096).map(|i| source_port(flow((i % 16) as u8, 40_000 + i / 16).hash()).get()).collect();
        assert!(ports.len() > 3500, "{} distinct ports", ports.len());
    }

    /// Eight receive queues that choose by the low or by the high bits of the port get an even share.
    #[test]
    fn both_ends_of_the_port_are_even() {
        let mut low = [0u32; 8];
        let mut high = [0u32; 8];
        for i in 0..8000u16 {
            let port = source_port(flow((i % 50) as u8, 32_768 + i).hash()).get();
            low[usize::from(port & 7)] += 1;
            high[usize::from((port >> 11) & 7)] += 1;
        }
        for share in low.into_iter().chain(high) {
            assert!((850..1150).contains(&share), "{low:?} {high:?}");
        }
    }
}
