//! From a pod to the outside: the kernel's FIB says where.

use super::{
    Fib, FibQuery, Frame, Tables, Verdict,
    classify::Packet,
    emit::{self, Outward},
};
use crate::{
    abi::{Egress, Outcome},
    wire::{EtherType, Ethernet},
};

/// Routes `packet`, which lies anywhere in the frame, out of the gateway; counts success as `outcome`. `limit` is
/// [`mss::limit`](super::mss::limit).
#[inline(always)]
pub(super) fn route<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: Packet,
    ecn: Option<u8>,
    limit: u16,
    outcome: Outcome,
) -> Result<Verdict, Verdict> {
    if packet.has_options() {
        return Err(Verdict::pass(Outcome::OutIpOptions));
    }
    let answer = tables.fib(&FibQuery {
        source: packet.source,
        destination: packet.destination,
        tos: packet.tos,
        protocol: packet.protocol,
        total_length: packet.total_len,
    });
    let (ifindex, source, next_hop) = match answer {
        Fib::Forward { ifindex, source, next_hop } => (ifindex, source, next_hop),
        Fib::NotForwarded => return Err(Verdict::pass(Outcome::OutLocal)),
        Fib::NoNeighbour => return Err(Verdict::pass(Outcome::OutNoNeighbour)),
        Fib::TooBig => return Err(Verdict::pass(Outcome::OutOversize)),
        Fib::Refused => return Err(Verdict::pass(Outcome::OutRefused)),
    };
    let Some(egress) = tables.egress(ifindex) else {
        return Err(Verdict::pass(Outcome::OutOtherInterface));
    };
    if egress.kind & Egress::TUNNEL != 0 {
        return Err(Verdict::drop(Outcome::TunnelToTunnel));
    }
    if egress.kind & Egress::EXTERNAL == 0 {
        return Err(Verdict::pass(Outcome::OutOtherInterface));
    }
    // Only now: a packet for the gateway itself may arrive with its last TTL.
    if packet.ttl <= 1 {
        return Err(Verdict::pass(Outcome::OutTtlExpired));
    }
    let link = Ethernet { dst: next_hop, src: source, kind: EtherType::IPV4 };
    emit::to_outside(frame, packet.at, Outward { link, vlan: egress.vlan, ecn })?;
    Ok(Verdict::send(outcome, egress.ifindex, tables.config()).clamping(limit))
}
