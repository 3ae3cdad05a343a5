//! From a client that pods cannot answer.

use bytemuck::Zeroable as _;

use super::{
    Shared, store, track,
    translate::Rewrite,
    tuple::{self, Kind, Segment, Side},
};
use crate::{
    abi::{Forward, ForwardKey, LastHop, Outcome, Phase, Reverse, ReverseKey, SessionEvent, Ticks, ticks},
    engine::{
        Frame, Tables, Verdict,
        classify::{self, Packet},
        pod::{self, Target},
    },
    wire::Ipv4,
};

/// The way of a client's packet, translated if a rule says so; `None` if its destination is no pod.
#[inline(always)]
pub(in crate::engine) fn from_client<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    packet: Packet,
) -> Result<Option<Target<'t>>, Verdict> {
    let config = tables.config();
    let last_hop = classify::last_hop(frame, config);
    // Answers go there.
    if last_hop.mac.is_group() {
        return Err(Verdict::drop(Outcome::SnatSource));
    }
    let mut segment = Segment::default();
    let mut key = ForwardKey::zeroed();
    let refused = match tuple::kind(frame, packet, Side::Client) {
        Kind::Flow(tuple, found) => {
            segment = found;
            key = tuple.forward_key();
            let tag = key.tag();
            if let Some(entry) = session(tables, &key, tag) {
                refresh(tables, &entry, &key, tag, &segment, last_hop)?;
                return target(tables, &entry, &key, tag, Outcome::SnatForward).map(Some);
            }
            None
        }
        Kind::Error(quoted) => {
            key = quoted.reversed().forward_key();
            let tag = key.tag();
            if let Some(entry) = session(tables, &key, tag) {
                return target(tables, &entry, &key, tag, Outcome::SnatErrorForward).map(Some);
            }
            Some(Outcome::SnatErrorUnrelated)
        }
        Kind::Fragment => Some(Outcome::SnatFragment),
        Kind::Other => Some(Outcome::SnatProtocol),
        Kind::Malformed => Some(Outcome::SnatMalformed),
        Kind::Options => Some(Outcome::SnatOptions),
    };
    let Some(found) = pod::find(tables, packet.destination) else {
        return Ok(None);
    };
    let Some(rule) = config.snat_rule(found.overlay, packet.source, packet.destination) else {
        return Err(Verdict::drop(Outcome::ClientForeign));
    };
    if rule.count == 0 {
        return pod::route(frame, tables, packet, &found).map(Some);
    }
    if let Some(reason) = refused {
        return Err(Verdict::drop(reason));
    }
    // Answers would reach others than who sent this.
    if !packet.source.is_source() {
        return Err(Verdict::drop(Outcome::SnatSource));
    }
    // The end of a connection that is forgotten opens no session.
    if segment.any(Segment::RST) {
        return Err(Verdict::drop(Outcome::SnatNoSession));
    }
    let (vtep, generation) = resolve(tables, found.overlay, packet.destination, found.vtep)
        .ok_or(Verdict::drop(Outcome::SnatPodGone))?;
    let tag = key.tag();
    let result = tables.with_opening(|opening| {
        opening.key = key;
        opening.tag = tag;
        opening.overlay = found.overlay;
        opening.vtep = vtep;
        opening.generation = generation;
        opening.last_hop = last_hop;
        store::open(tables, rule, opening)
    });
    if result != 0 {
        return Err(Verdict::drop_numbered(result));
    }
    match session(tables, &key, tag) {
        Some(entry) => target(tables, &entry, &key, tag, Outcome::SnatNew).map(Some),
        None => Err(Verdict::drop(Outcome::SnatRace)),
    }
}

/// The session under a key.
#[inline(always)]
fn session<'t, T: Tables>(tables: &'t T, key: &ForwardKey, tag: u32) -> Option<T::Forward<'t>> {
    tables.forward(key).filter(|entry| entry.tag() == tag)
}

/// Notes a packet of a session: when, whence, and what it says of the connection.
#[inline(always)]
fn refresh<T: Tables>(
    tables: &T,
    entry: &Shared<Forward>,
    key: &ForwardKey,
    tag: u32,
    segment: &Segment,
    last_hop: LastHop,
) -> Result<(), Verdict> {
    let now = tables.ticks();
    if super::is_stale(entry.seen(), now) {
        entry.set_seen(now);
    }
    let moved = entry.last_hop() != last_hop;
    let telling = segment.any(Segment::SYN | Segment::FIN | Segment::RST);
    if entry.confirmed() != 0 && !moved && !telling {
        return Ok(());
    }
    let reverse_key = entry.reverse_key(key);
    let Some(reverse) = tables.reverse(&reverse_key) else {
        // Another CPU ended the session at this moment, and its forward entry may be a new session's by now; or the
        // tables lost the other half long ago. The client sends again.
        if session(tables, key, tag).is_some_and(|entry| now.wrapping_sub(entry.created()) >= LEFT_OVER) {
            tables.remove_forward(key);
        }
        return Err(Verdict::drop(Outcome::SnatRace));
    };
    if !is_half_of(&reverse, &reverse_key, key) {
        return Err(Verdict::drop(Outcome::SnatRace));
    }
    if moved {
        entry.set_last_hop(last_hop);
    }
    // By itself: an entry that is recycled at this moment gets another's, and its own back from its next packet.
    if reverse.last_hop() != last_hop {
        reverse.set_last_hop(last_hop);
    }
    let state = reverse.state();
    match state.phase() {
        Phase::Dead => return Err(Verdict::drop(Outcome::SnatRace)),
        // The packet that opens the session is still on its way, on another CPU.
        Phase::Claimed => return Ok(()),
        Phase::Opening | Phase::Live => {}
    }
    let new = track::by_client(state, entry.protocol(), segment);
    if new != state {
        // Who loses against a packet of the pod tries again with the next packet.
        if tables.exchange(&reverse, state, new) {
            if state.phase() == Phase::Opening && new.phase() == Phase::Live {
                tables.note(SessionEvent::Confirmed);
            }
        } else {
            return Ok(());
        }
    }
    entry.set_confirmed(u16::from(track::is_settled(new)));
    if entry.tag() != tag {
        // Recycled: its own packets look at the state again.
        entry.set_confirmed(0);
    }
    Ok(())
}

/// How old a forward entry without its other half is at least when it is taken for left over: far longer than any CPU
/// takes to open a session.
const LEFT_OVER: Ticks = ticks(5);

/// Whether a reverse entry is still the other half of the session under `key`: its port may be another flow's by now.
#[inline(always)]
fn is_half_of(reverse: &Shared<Reverse>, reverse_key: &ReverseKey, key: &ForwardKey) -> bool {
    reverse.tag() == reverse_key.tag()
        && reverse.client() == key.client
        && reverse.client_port() == key.client_port
}

/// The way to the session's pod; looked up again when the VTEP's generation says that pods moved.
#[inline(always)]
fn target<'t, T: Tables>(
    tables: &'t T,
    entry: &Shared<Forward>,
    key: &ForwardKey,
    tag: u32,
    outcome: Outcome,
) -> Result<Target<'t>, Verdict> {
    let overlay = u32::from(entry.overlay());
    let mut vtep = tables.vtep(entry.vtep()).ok_or(Verdict::drop(Outcome::VtepMissing))?;
    if vtep.generation != entry.generation() {
        let Some((id, generation)) = resolve(tables, overlay, entry.destination(), entry.vtep()) else {
            end(tables, entry, key);
            return Err(Verdict::drop(Outcome::SnatPodGone));
        };
        if id != entry.vtep() {
            let reverse_key = entry.reverse_key(key);
            if let Some(reverse) = tables.reverse(&reverse_key)
                && is_half_of(&reverse, &reverse_key, key)
            {
                // A reply puts it right if the entry is recycled at this moment.
                reverse.set_vtep(id);
            }
            entry.set_vtep(id);
        }
        entry.set_generation(generation);
        vtep = tables.vtep(id).ok_or(Verdict::drop(Outcome::VtepMissing))?;
        if entry.tag() != tag {
            // Recycled: its own packets look for their pod again.
            entry.set_generation(vtep.generation.wrapping_sub(1));
        }
    }
    let rewrite = Rewrite::forward(entry);
    if entry.tag() != tag {
        return Err(Verdict::drop(Outcome::SnatRace));
    }
    Ok(Target { overlay, vtep, hash: tag, outcome, translation: Some(rewrite) })
}

/// The VTEP of a pod, which was `known` last, and its generation. The generation is from before the look-up that counts: a
/// pod that moves meanwhile raises it, and the next packet looks again.
#[inline(always)]
fn resolve<T: Tables>(tables: &T, overlay: u32, pod: Ipv4, known: u32) -> Option<(u32, u32)> {
    let generation = tables.vtep(known).map(|vtep| vtep.generation);
    let first = tables.route(overlay, pod)?.vtep;
    if let Some(generation) = generation
        && first == known
    {
        return Some((first, generation));
    }
    let generation = tables.vtep(first)?.generation;
    let found = tables.route(overlay, pod)?.vtep;
    Some((found, if found == first { generation } else { generation.wrapping_sub(1) }))
}

/// Ends a session whose pod is gone.
#[inline(always)]
fn end<T: Tables>(tables: &T, entry: &Shared<Forward>, key: &ForwardKey) {
    let reverse_key = entry.reverse_key(key);
    if let Some(reverse) = tables.reverse(&reverse_key) {
        let state = reverse.state();
        if matches!(state.phase(), Phase::Opening | Phase::Live) && is_half_of(&reverse, &reverse_key, key) {
            store::remove(tables, &reverse_key, key, &reverse, state, SessionEvent::Flushed);
        }
    }
}
