//! From a pod to a SNAT address.

use super::{
    Shared, track,
    translate::{self, End, Rewrite},
    tuple::{self, Kind, Segment, Side},
};
use crate::{
    abi::{Outcome, OverlayFlags, Phase, Reverse},
    engine::{
        Frame, Tables, Verdict,
        emit::{self, Outward},
        ingress::Arrived,
        too_big,
    },
    wire::{EtherType, Ethernet},
};

/// Translates a pod's packet back and sends it to its client; `Ok` if its destination is no SNAT address. `limit` is the MTU
/// to which a SYN is held, 0 for anything else.
#[inline(always)]
pub(in crate::engine) fn from_pod<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    arrived: Arrived<'_>,
    limit: u16,
) -> Result<(), Verdict> {
    let packet = arrived.packet;
    let (tuple, segment, outcome, missing) = match tuple::kind(frame, packet, Side::Pod) {
        Kind::Flow(tuple, segment) => (tuple, segment, Outcome::SnatReply, Outcome::SnatNoSession),
        Kind::Error(quoted) => {
            (quoted.reversed(), Segment::default(), Outcome::SnatErrorReply, Outcome::SnatErrorUnrelated)
        }
        Kind::Fragment => return refuse(tables, arrived, Outcome::SnatFragment),
        Kind::Other => return refuse(tables, arrived, Outcome::SnatProtocol),
        Kind::Malformed => return refuse(tables, arrived, Outcome::SnatMalformed),
        Kind::Options => return refuse(tables, arrived, Outcome::SnatOptions),
    };
    let key = tuple.reverse_key(arrived.origin.id);
    let Some(entry) = tables.reverse(&key).filter(|entry| entry.tag() == key.tag()) else {
        return refuse(tables, arrived, missing);
    };
    let state = entry.state();
    if state.phase() == Phase::Dead {
        return refuse(tables, arrived, missing);
    }
    check_sender(tables, &entry, arrived, outcome)?;
    if packet.ttl <= 1 {
        return Err(Verdict::pass(Outcome::OutTtlExpired));
    }
    let hop = entry.last_hop();
    let port = tables.config().port_at(hop.port());
    if port.ifindex == 0 {
        return Err(Verdict::drop(Outcome::SnatNoPort));
    }
    if packet.total_len > port.mtu {
        let is_error = outcome == Outcome::SnatErrorReply;
        return Err(too_big::answer_pod(frame, tables, arrived, port.mtu, is_error));
    }
    if outcome == Outcome::SnatReply {
        note(tables, &entry, &segment);
    }
    let rewrite = Rewrite::reverse(&entry);
    if entry.tag() != key.tag() {
        return Err(Verdict::drop(Outcome::SnatRace));
    }
    let link = Ethernet { dst: hop.mac, src: port.mac, kind: EtherType::IPV4 };
    let outward = Outward { link: &link, vlan: hop.vlan(), ecn: arrived.ecn };
    let at = emit::to_outside(frame, packet.at, outward)
        .map_err(|verdict| verdict.or_drop(Outcome::ResizeFailed))?;
    translate::apply(frame, at, End::Destination, rewrite, outcome == Outcome::SnatErrorReply)
        .ok_or(Verdict::drop(Outcome::ResizeFailed))?;
    Err(Verdict::send(outcome, port.ifindex, tables.config()).clamping(limit))
}

/// Notes a packet of a session: when, and what it says of the connection.
#[inline(always)]
fn note<T: Tables>(tables: &T, entry: &Shared<Reverse>, segment: &Segment) {
    let now = tables.ticks();
    if super::is_stale(entry.seen(), now) {
        entry.set_seen(now);
    }
    let protocol = entry.protocol();
    let state = entry.state();
    let new = track::by_pod(state, protocol, segment);
    if new != state && !tables.exchange(entry, state, new) {
        // Lost against a packet of the client; once more, because an answer may come only once.
        let state = entry.state();
        tables.exchange(entry, state, track::by_pod(state, protocol, segment));
    }
}

/// A packet of no session: dropped if it is to a SNAT address, else none of ours.
#[inline(always)]
fn refuse<T: Tables>(tables: &T, arrived: Arrived<'_>, reason: Outcome) -> Result<(), Verdict> {
    if tables.is_snat(arrived.packet.destination) {
        Err(arrived.origin.refused(tables, reason))
    } else {
        Ok(())
    }
}

/// A session's packets come from the node of its pod; if that moved, the pod's table knows. An ICMP error may come from
/// a router on that node too, but not from what another node routes: its pods could reset whatever they guess.
#[inline(always)]
fn check_sender<T: Tables>(
    tables: &T,
    entry: &Shared<Reverse>,
    arrived: Arrived<'_>,
    outcome: Outcome,
) -> Result<(), Verdict> {
    if !arrived.origin.overlay.flags.has(OverlayFlags::SOURCE_CHECK) {
        return Ok(());
    }
    let is_packet = outcome == Outcome::SnatReply;
    let refused = || Err(arrived.origin.refused(tables, Outcome::SnatReplySource));
    let known = entry.vtep();
    let vtep = if arrived.origin.is_from(tables, known) {
        known
    } else {
        let Some(vtep) = arrived.origin.vtep(tables) else {
            return refused();
        };
        vtep
    };
    match (vtep == known, is_packet) {
        (true, true) => return Ok(()),
        (false, false) => return refused(),
        _ => {}
    }
    match tables.route(arrived.origin.id, arrived.packet.source) {
        Some(route) if route.vtep == vtep => {
            if is_packet {
                entry.set_vtep(vtep);
            }
            Ok(())
        }
        _ => refused(),
    }
}
