//! From a pod to the outside: the kernel's FIB says where.

use super::{
    Fib, FibQuery, Frame, Tables, Verdict, WayOut,
    classify::Packet,
    emit::{self, Outward},
};
use crate::{
    abi::{Egress, Outcome, Ticks},
    wire::{EtherType, Ethernet},
};

/// Routes `packet`, which lies anywhere in the frame, out of the gateway; counts success as `outcome`. `limit` is the
/// MTU to which a SYN is held, 0 for anything else.
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
    let query = FibQuery {
        source: packet.source,
        destination: packet.destination,
        tos: packet.tos,
        protocol: packet.protocol,
        total_length: packet.total_len,
    };
    let sent = tables.with_way_out(&query, |way| {
        let now = tables.ticks();
        if !way.serves(&query, now) {
            ask(tables, &query, now, way)?;
        }
        // Only now: a packet for the gateway itself may arrive with its last TTL.
        if packet.ttl <= 1 {
            return Err(Verdict::pass(Outcome::OutTtlExpired));
        }
        emit::to_outside(frame, packet.at, Outward { link: &way.link, vlan: way.vlan, ecn })?;
        Ok(Verdict::send(outcome, way.ifindex, tables.config()).clamping(limit))
    });
    sent.unwrap_or(Err(Verdict::drop(Outcome::ResizeFailed)))
}

/// Asks the FIB, and remembers its answer in `way`.
#[inline(always)]
fn ask<T: Tables>(tables: &T, query: &FibQuery, now: Ticks, way: &mut WayOut) -> Result<(), Verdict> {
    let (ifindex, source, next_hop, mtu) = match tables.fib(query) {
        Fib::Forward { ifindex, source, next_hop, mtu } => (ifindex, source, next_hop, mtu),
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
    *way = WayOut {
        found: now,
        source: query.source,
        destination: query.destination,
        tos: query.tos,
        protocol: query.protocol,
        mtu,
        ifindex: egress.ifindex,
        vlan: egress.vlan,
        link: Ethernet { dst: next_hop, src: source, kind: EtherType::IPV4 },
    };
    Ok(())
}
