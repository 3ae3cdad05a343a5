//! From a pod to a SNAT address.

use super::{
    Shared, track,
    translate::{self, End, Rewrite},
    tuple::{self, Kind, Side},
};
use crate::{
    abi::{LocalAddress, Outcome, Overlay, OverlayFlags, Phase, Reverse},
    engine::{
        Frame, Tables, Verdict,
        classify::Packet,
        emit::{self, Outward},
        mss,
    },
    wire::{EtherType, Ethernet, Ipv4},
};

/// Which node a packet of a pod came from.
#[derive(Clone, Copy)]
pub(in crate::engine) struct Sender<'a> {
    /// Overlay id.
    pub id: u32,
    pub overlay: &'a Overlay,
    /// The node's VTEP id; `None` if the outer source is no node's, which only an overlay without source check admits.
    pub vtep: Option<u32>,
    /// New ECN bits.
    pub ecn: Option<u8>,
}

/// Translates a pod's packet back and sends it to its client; `Ok` if its destination is no SNAT address.
#[inline(always)]
pub(in crate::engine) fn from_pod<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: Packet,
    sender: Sender<'_>,
) -> Result<(), Verdict> {
    let kind = tuple::kind(frame, packet, Side::Pod);
    let reason = match kind {
        Kind::Flow(tuple, segment) => {
            let key = tuple.reverse_key(sender.id);
            if let Some(entry) = tables.reverse(&key)
                && entry.tag() == key.tag()
                && entry.state().phase() != Phase::Dead
            {
                check_sender(tables, &entry, packet.source, sender)?;
                let way = way(tables, &entry, packet)?;
                let now = tables.ticks();
                if super::is_stale(entry.seen(), now) {
                    entry.set_seen(now);
                }
                let state = entry.state();
                let new = track::by_pod(state, key.protocol, &segment);
                if new != state && !tables.exchange(&entry, state, new) {
                    // Lost against a packet of the client; once more, because an answer may come only once.
                    let state = entry.state();
                    tables.exchange(&entry, state, track::by_pod(state, key.protocol, &segment));
                }
                let rewrite = Rewrite::reverse(&entry, key.protocol);
                return Err(send(frame, tables, packet, sender, way, rewrite, Outcome::SnatReply));
            }
            Outcome::SnatNoSession
        }
        Kind::Error(quoted) => {
            let key = quoted.reversed().reverse_key(sender.id);
            if let Some(entry) = tables.reverse(&key)
                && entry.tag() == key.tag()
                && entry.state().phase() != Phase::Dead
            {
                check_source(tables, packet.source, sender)?;
                let way = way(tables, &entry, packet)?;
                let rewrite = Rewrite::reverse(&entry, key.protocol);
                return Err(send(frame, tables, packet, sender, way, rewrite, Outcome::SnatErrorReply));
            }
            Outcome::SnatErrorUnrelated
        }
        Kind::Fragment => Outcome::SnatFragment,
        Kind::Other => Outcome::SnatProtocol,
        Kind::Malformed => Outcome::SnatMalformed,
        Kind::Options => Outcome::SnatOptions,
    };
    match tables.address(packet.destination) {
        Some(address) if address.kind & LocalAddress::SNAT != 0 => Err(Verdict::drop(reason)),
        _ => Ok(()),
    }
}

/// A session's packets come from the node of its pod. If that moved, the pod's table knows.
#[inline(always)]
fn check_sender<T: Tables>(
    tables: &T,
    entry: &Shared<Reverse>,
    pod: Ipv4,
    sender: Sender<'_>,
) -> Result<(), Verdict> {
    if !sender.overlay.flags.has(OverlayFlags::SOURCE_CHECK) {
        return Ok(());
    }
    let Some(vtep) = sender.vtep else {
        return Err(Verdict::drop(Outcome::SnatReplySource));
    };
    if entry.vtep() == vtep {
        return Ok(());
    }
    match tables.route(sender.id, pod) {
        Some(route) if route.vtep == vtep => {
            entry.set_vtep(vtep);
            Ok(())
        }
        _ => Err(Verdict::drop(Outcome::SnatReplySource)),
    }
}

/// An error may come from a node or a router on the way, but from within what the node routes.
#[inline(always)]
fn check_source<T: Tables>(tables: &T, source: Ipv4, sender: Sender<'_>) -> Result<(), Verdict> {
    if !sender.overlay.flags.has(OverlayFlags::SOURCE_CHECK) {
        return Ok(());
    }
    match (tables.route(sender.id, source), sender.vtep) {
        (Some(route), Some(vtep)) if route.vtep == vtep => Ok(()),
        _ => Err(Verdict::drop(Outcome::InnerSource)),
    }
}

/// How to leave to the session's client.
#[derive(Clone, Copy)]
struct Way {
    ifindex: u32,
    outward: Outward,
}

#[inline(always)]
fn way<T: Tables>(tables: &T, entry: &Shared<Reverse>, packet: Packet) -> Result<Way, Verdict> {
    if packet.ttl <= 1 {
        return Err(Verdict::pass(Outcome::OutTtlExpired));
    }
    let hop = entry.last_hop();
    let port = tables.config().port_at(hop.port());
    if port.ifindex == 0 {
        return Err(Verdict::drop(Outcome::SnatNoPort));
    }
    if packet.total_len > port.mtu {
        return Err(Verdict::drop(Outcome::SnatReplyOversize));
    }
    let link = Ethernet { dst: hop.mac, src: port.mac, kind: EtherType::IPV4 };
    Ok(Way { ifindex: port.ifindex, outward: Outward { link, vlan: hop.vlan(), ecn: None } })
}

#[inline(always)]
fn send<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: Packet,
    sender: Sender<'_>,
    way: Way,
    rewrite: Rewrite,
    outcome: Outcome,
) -> Verdict {
    // The path back to the pod: 0 while it is not known.
    let limit = match sender.vtep.and_then(|vtep| tables.vtep(vtep)) {
        Some(vtep) => mss::limit(sender.overlay, vtep.slot().mtu),
        None => 0,
    };
    let outward = Outward { ecn: sender.ecn, ..way.outward };
    let edited = emit::to_outside(frame, packet.at, outward).and_then(|at| {
        match outcome {
            Outcome::SnatErrorReply => translate::error(frame, at, End::Destination, rewrite),
            _ => translate::packet(frame, at, End::Destination, rewrite),
        }
        .ok_or(Verdict::drop(Outcome::ResizeFailed))
    });
    match edited {
        Ok(()) => Verdict::send(outcome, way.ifindex, tables.config()).clamping(limit),
        Err(verdict) => verdict.never_pass(),
    }
}
