//! The edits of a translated packet. All checksums are updated, never computed (RFC 1624).

use network_types::ip::Ipv4Hdr;

use super::{
    ICMP, Shared, TCP,
    tuple::{QUOTE, SHORT_HEADER},
};
use crate::{
    abi::{Forward, Reverse},
    checksum::Sum,
    engine::Frame,
    wire::{Be16, Ipv4},
};

/// Which end of a packet changes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum End {
    /// On the way to a pod.
    Source,
    /// On the way to a client.
    Destination,
}

/// Address and port to put into a packet, and what that adds to its sums.
#[derive(Clone, Copy)]
pub(in crate::engine) struct Rewrite {
    pub(super) address: Ipv4,
    pub(super) port: Be16,
    pub(super) header_delta: u16,
    pub(super) transport_delta: u16,
    pub(super) protocol: u16,
}

impl Rewrite {
    /// From the client to the SNAT address.
    #[inline(always)]
    pub(super) fn forward(entry: &Shared<Forward>) -> Self {
        Self {
            address: entry.source(),
            port: entry.source_port(),
            header_delta: entry.header_delta(),
            transport_delta: entry.transport_delta(),
            protocol: entry.protocol(),
        }
    }

    /// From the SNAT address to the client.
    #[inline(always)]
    pub(super) fn reverse(entry: &Shared<Reverse>) -> Self {
        Self {
            address: entry.client(),
            port: entry.client_port(),
            header_delta: entry.header_delta(),
            transport_delta: entry.transport_delta(),
            protocol: entry.protocol(),
        }
    }
}

/// Translates `end` of the packet at `at`; of an ICMP error also the packet that it quotes. `None` if the frame ends too
/// early, which was ruled out before.
#[inline(always)]
pub(in crate::engine) fn apply<F: Frame>(
    frame: &mut F,
    at: usize,
    end: End,
    rewrite: Rewrite,
    is_error: bool,
) -> Option<()> {
    if is_error { error(frame, at, end, rewrite) } else { packet(frame, at, end, rewrite) }
}

const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;
const ICMP_CHECKSUM: usize = 2;
const ICMP_IDENTIFIER: usize = 4;

/// Rewrites one end of the packet at `at`.
#[inline(always)]
fn packet<F: Frame>(frame: &mut F, at: usize, end: End, rewrite: Rewrite) -> Option<()> {
    let ip = frame.write::<Ipv4Hdr>(at)?;
    match end {
        End::Source => ip.src_addr = rewrite.address.octets,
        End::Destination => ip.dst_addr = rewrite.address.octets,
    }
    ip.check = updated(ip.check, rewrite.header_delta);
    let at = at + size_of::<Ipv4Hdr>();
    if rewrite.protocol == TCP {
        let tcp = frame.write::<[u8; TCP_CHECKSUM + 2]>(at)?;
        put_port(tcp, end, rewrite.port);
        put(tcp, TCP_CHECKSUM, updated(get(tcp, TCP_CHECKSUM), rewrite.transport_delta));
    } else {
        short(frame.write::<[u8; SHORT_HEADER]>(at)?, end, rewrite);
    }
    Some(())
}

/// Rewrites one end of the ICMP error at `at`, and the opposite end of the packet that it quotes, so that its receiver
/// recognises what it sent (RFC 5508 section 4.2). The error itself may come from a router on the way.
#[inline(always)]
fn error<F: Frame>(frame: &mut F, at: usize, end: End, rewrite: Rewrite) -> Option<()> {
    let ip = frame.write::<Ipv4Hdr>(at)?;
    let new = rewrite.address.octets;
    let (old, opposite) = match end {
        End::Source => (core::mem::replace(&mut ip.src_addr, new), End::Destination),
        End::Destination => (core::mem::replace(&mut ip.dst_addr, new), End::Source),
    };
    ip.check = replaced(Sum::default().remove(ip.check), old, new).checksum();

    let icmp_at = at + size_of::<Ipv4Hdr>();
    let quoted_at = icmp_at + QUOTE;
    let quoted = frame.write::<Ipv4Hdr>(quoted_at)?;
    let check = quoted.check;
    let old = match opposite {
        End::Source => core::mem::replace(&mut quoted.src_addr, new),
        End::Destination => core::mem::replace(&mut quoted.dst_addr, new),
    };
    quoted.check = updated(check, rewrite.header_delta);
    let sum = replaced(Sum::default(), old, new).remove(check).add(quoted.check);

    let header = frame.write::<[u8; SHORT_HEADER]>(quoted_at + size_of::<Ipv4Hdr>())?;
    let old = *header;
    if rewrite.protocol == TCP {
        // The quotation need not reach as far as the checksum, and nobody looks at it.
        put_port(header, opposite, rewrite.port);
    } else {
        short(header, opposite, rewrite);
    }
    let mut sum = sum;
    for (old, new) in old.as_chunks::<2>().0.iter().zip(header.as_chunks::<2>().0) {
        sum = sum.remove(*old).add(*new);
    }
    let icmp = frame.write::<[u8; SHORT_HEADER]>(icmp_at)?;
    put(icmp, ICMP_CHECKSUM, updated(get(icmp, ICMP_CHECKSUM), sum.fold()));
    Some(())
}

/// A UDP header or an ICMP echo's.
#[inline(always)]
fn short(header: &mut [u8; SHORT_HEADER], end: End, rewrite: Rewrite) {
    if rewrite.protocol == ICMP {
        put(header, ICMP_IDENTIFIER, rewrite.port.bytes);
        put(header, ICMP_CHECKSUM, updated(get(header, ICMP_CHECKSUM), rewrite.transport_delta));
        return;
    }
    put_port(header, end, rewrite.port);
    let check = get(header, UDP_CHECKSUM);
    // 0 is no checksum (RFC 768); one that comes out as 0 is sent in its other form.
    if check != [0, 0] {
        let check = match updated(check, rewrite.transport_delta) {
            [0, 0] => [0xff, 0xff],
            check => check,
        };
        put(header, UDP_CHECKSUM, check);
    }
}

#[inline(always)]
fn put_port<const N: usize>(header: &mut [u8; N], end: End, port: Be16) {
    match end {
        End::Source => put(header, 0, port.bytes),
        End::Destination => put(header, 2, port.bytes),
    }
}

/// Two bytes at a constant offset.
#[inline(always)]
fn get<const N: usize>(header: &[u8; N], at: usize) -> [u8; 2] {
    [header[at], header[at + 1]]
}

#[inline(always)]
fn put<const N: usize>(header: &mut [u8; N], at: usize, word: [u8; 2]) {
    [header[at], header[at + 1]] = word;
}

#[inline(always)]
fn updated(check: [u8; 2], delta: u16) -> [u8; 2] {
    Sum::new(delta).remove(check).checksum()
}

#[inline(always)]
fn replaced(sum: Sum, old: [u8; 4], new: [u8; 4]) -> Sum {
    sum.remove([old[0], old[1]]).remove([old[2], old[3]]).add([new[0], new[1]]).add([new[2], new[3]])
}
