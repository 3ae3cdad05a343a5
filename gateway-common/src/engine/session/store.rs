//! Opening and ending sessions, without locks: every step is one atomic operation on one table.
//!
//! - Inserting the reverse entry, which must not exist yet, claims the port. Then the forward entry is inserted; who
//!   finds one there gives the port back and uses that session.
//! - Who sets the phase to dead, by compare-and-swap from what it judged, removes the session: forward entry first,
//!   reverse entry last. Nobody removes a session that another one claims or removes.
//! - A slot is taken before the port, from its former occupant if need be.

use super::{ICMP, Inserted, Shared, UDP};
use crate::{
    abi::{
        Config, Forward, ForwardKey, LastHop, Outcome, Phase, Reverse, ReverseKey, SessionEvent, SnatRule,
        State, Ticks,
    },
    checksum::Sum,
    engine::Tables,
    wire::{Be16, Ipv4},
};

/// How many ports are tried after the client's own.
pub(super) const PROBES: u32 = 16;
/// Slots are looked at in windows that no other CPU looks at.
const WINDOW: u32 = 7;
/// Steps of a window: a last one takes the slot of its victim.
const STEPS: u32 = WINDOW + 1;
/// Steps of the whole search.
const SEARCH: u32 = 4 * STEPS;
/// Ports that may stand in for a client's: all but the system ports (RFC 6335 section 6).
const PORT_MIN: u16 = 1024;
const PORT_COUNT: u64 = 65_536 - PORT_MIN as u64;
/// For 2^6 ticks (1.07 s) the same ports are tried.
const EPOCH_SHIFT: u32 = 6;

/// Room for opening a session. The kernel keeps it outside the stack.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Opening {
    pub(super) key: ForwardKey,
    pub(super) last_hop: LastHop,
    pub(super) tag: u32,
    pub(super) overlay: u32,
    pub(super) vtep: u32,
    pub(super) generation: u32,
    /// The candidate, in the end what is claimed.
    reverse: ReverseKey,
    /// The forward key of the session that holds the candidate.
    peer: ForwardKey,
    now: Ticks,
    /// The slot, once it is found.
    slot: u32,
    /// First slot of the window.
    window: u32,
    victim: Victim,
    /// 0 while searching, [`FOUND`], or an outcome's number.
    result: u32,
}

/// No outcome has this number.
const FOUND: u32 = u32::MAX;

/// Opens a session, or finds that another CPU opened it at the same time. The number of the outcome if it cannot be
/// opened, else 0.
#[inline(always)]
pub(super) fn open<T: Tables>(tables: &T, rule: &SnatRule, opening: &mut Opening) -> u64 {
    opening.now = tables.ticks();
    take_slot(tables, opening);
    if opening.result != FOUND {
        return u64::from(opening.result);
    }
    claim(tables, rule, opening);
    if opening.result != FOUND {
        return u64::from(opening.result);
    }
    let key = &opening.reverse;
    let forward = || Forward {
        tag: opening.tag,
        seen: opening.now,
        vtep: opening.vtep,
        generation: opening.generation,
        last_hop: opening.last_hop,
        source: key.address,
        source_port: key.port,
        confirmed: 0,
        destination: key.pod,
        destination_port: key.pod_port,
        overlay: key.overlay,
        header_delta: header_delta(opening.key.client, key.address),
        transport_delta: transport_delta(opening, key),
        created: opening.now,
        protocol: key.protocol,
        pad: [0; 3],
        reserved: 0,
    };
    match tables.insert_forward(&opening.key, forward) {
        Inserted::Done => {}
        Inserted::Exists => {
            tables.remove_reverse(key);
            return 0;
        }
        Inserted::Full => {
            tables.remove_reverse(key);
            return u64::from(Outcome::SnatTableFull.number());
        }
    }
    tables.set_slot(opening.slot, key);
    if let Some(claimed) = tables.reverse(key) {
        tables.exchange(
            &claimed,
            State::of_flow(Phase::Claimed, opening.tag),
            State::of_flow(Phase::Opening, opening.tag),
        );
    }
    tables.note(SessionEvent::Opened);
    0
}

/// The sum of the addresses in the IP header, after minus before.
#[inline(always)]
fn header_delta(old: Ipv4, new: Ipv4) -> u16 {
    let [[a, b, c, d], [e, f, g, h]] = [old.octets, new.octets];
    Sum::default().remove([a, b]).remove([c, d]).add([e, f]).add([g, h]).fold()
}

/// The same of everything that the transport checksum covers. ICMP has no pseudo header (RFC 792).
#[inline(always)]
fn transport_delta(opening: &Opening, key: &ReverseKey) -> u16 {
    let addresses =
        if opening.key.protocol == ICMP { 0 } else { header_delta(opening.key.client, key.address) };
    Sum::new(addresses).remove(opening.key.client_port.bytes).add(key.port.bytes).fold()
}

/// Claims a port: the client's own if it is free, else one of [`PROBES`] others. Expired sessions in the way are
/// removed; if all ports are taken, so is the oldest session that may be evicted.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "overlay ids are below MAX_OVERLAYS")]
fn claim<T: Tables>(tables: &T, rule: &SnatRule, opening: &mut Opening) {
    opening.reverse = ReverseKey {
        pod: opening.key.destination,
        address: Ipv4::UNSPECIFIED,
        pod_port: opening.key.destination_port,
        port: Be16::default(),
        protocol: opening.key.protocol,
        overlay: opening.overlay as u16,
    };
    opening.result = 0;
    opening.victim = Victim::NONE;
    // The last step takes the victim's port.
    tables.repeat(PROBES + 2, |probe| probe_port(tables, rule, opening, probe));
    if opening.result == 0 {
        opening.result = Outcome::SnatPortsExhausted.number();
    }
}

/// Tries one port; `true` ends the search.
#[inline(always)]
fn probe_port<T: Tables>(tables: &T, rule: &SnatRule, opening: &mut Opening, step: u32) -> bool {
    let last = step > PROBES;
    let probe = if last { opening.victim.index } else { step };
    if last && !opening.victim.is_some() {
        return true;
    }
    (opening.reverse.address, opening.reverse.port) = candidate(tables.config(), rule, opening, probe);
    if let Some(occupant) = tables.reverse(&opening.reverse)
        && !clear(tables, opening, &occupant, last, probe)
    {
        return false;
    }
    match insert(tables, opening) {
        Inserted::Done => opening.result = FOUND,
        Inserted::Exists => return false,
        Inserted::Full => opening.result = Outcome::SnatTableFull.number(),
    }
    true
}

/// Inserts the reverse entry.
#[inline(always)]
fn insert<T: Tables>(tables: &T, opening: &Opening) -> Inserted {
    let key = &opening.reverse;
    // The answers change the other way round.
    let addresses = header_delta(key.address, opening.key.client);
    let pseudo_header = if key.protocol == ICMP { 0 } else { addresses };
    let reverse = || Reverse {
        state: State::of_flow(Phase::Claimed, opening.tag),
        last_hop: opening.last_hop,
        tag: key.tag(),
        seen: opening.now,
        vtep: opening.vtep,
        slot: opening.slot,
        client: opening.key.client,
        client_port: opening.key.client_port,
        destination_port: opening.key.destination_port,
        destination: opening.key.destination,
        header_delta: addresses,
        transport_delta: Sum::new(pseudo_header)
            .remove(key.port.bytes)
            .add(opening.key.client_port.bytes)
            .fold(),
        created: opening.now,
        protocol: key.protocol,
        pad: 0,
        reserved: 0,
    };
    tables.insert_reverse(key, reverse)
}

/// The address and port to try. A client keeps its address as long as that has ports (RFC 4787 REQ-2); half of the
/// probes stay there, the others go round the pool.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "scaled to the range")]
fn candidate(config: &Config, rule: &SnatRule, opening: &Opening, probe: u32) -> (Ipv4, Be16) {
    let spread =
        (u64::from(opening.key.client.word()) ^ 0x9e37_79b9).wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32;
    let home = (spread * u64::from(rule.count)) >> 32;
    let away = if probe > PROBES / 2 { u64::from(probe) - u64::from(PROBES / 2) } else { 0 };
    let mut index = home + away % u64::from(rule.count.max(1));
    if index >= u64::from(rule.count) {
        index -= u64::from(rule.count);
    }
    let address = config.snat_address(u32::from(rule.first) + index as u32);
    if probe == 0 && opening.key.client_port != Be16::default() {
        return (address, opening.key.client_port);
    }
    // Others a second later: who finds none free, or finds them held on purpose, sends again.
    let seed = opening.tag ^ opening.now >> EPOCH_SHIFT;
    let mixed = (u64::from(seed) ^ u64::from(probe) << 32).wrapping_mul(0xa076_1d64_78bd_642f);
    let port = (((mixed >> 32) * PORT_COUNT) >> 32) as u16 + PORT_MIN;
    (address, Be16::new(port))
}

/// Removes the session under `opening.reverse`, whose slot or port is needed, if that is allowed: it is expired, or
/// `evicts` and it is not established. Otherwise notes it as a victim called `index`, if it might be evicted.
///
/// Established UDP that has been quiet for longer than UDP may be before it is established counts as the youngest of
/// those that are not: two forged packets and one answer establish it. (Opening and removing a session take no such time.)
#[inline(always)]
fn clear<T: Tables>(
    tables: &T,
    opening: &mut Opening,
    occupant: &Shared<Reverse>,
    evicts: bool,
    index: u32,
) -> bool {
    let state = occupant.state();
    opening.peer = occupant.forward_key(&opening.reverse);
    let idle = idle(tables, occupant, state, &opening.peer, opening.now);
    let (protocol, timeouts) = (opening.reverse.protocol, &tables.config().timeouts);
    let is_opening = state.phase() == Phase::Opening;
    let event = if idle > timeouts.of(protocol, state) {
        SessionEvent::Reclaimed
    } else if !is_opening && (protocol != UDP || idle <= timeouts.udp_opening) {
        return false;
    } else if evicts {
        SessionEvent::Evicted
    } else {
        opening.victim.consider(index, if is_opening { idle } else { 0 });
        return false;
    };
    remove(tables, &opening.reverse, &opening.peer, occupant, state, event)
}

/// How long a session in `state` has had no packet of either side; of a dead one, for how long it has been dead, because
/// whoever removes it needs its time however old the session was.
#[inline(always)]
pub(super) fn idle<T: Tables>(
    tables: &T,
    session: &Shared<Reverse>,
    state: State,
    peer: &ForwardKey,
    now: Ticks,
) -> Ticks {
    if state.phase() == Phase::Dead {
        return since(state.acknowledgement(), now);
    }
    let idle = since(session.seen(), now);
    match tables.forward(peer) {
        Some(forward) => idle.min(since(forward.seen(), now)),
        None => idle,
    }
}

/// How long ago `seen` was; 0 if another CPU's clock was a tick ahead.
#[inline(always)]
fn since(seen: Ticks, now: Ticks) -> Ticks {
    let passed = now.wrapping_sub(seen);
    if passed > Ticks::MAX / 2 { 0 } else { passed }
}

/// The evictable session that has been idle for longest.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Victim {
    is_some: u32,
    /// Its probe, or its slot.
    index: u32,
    age: Ticks,
}

impl Victim {
    const NONE: Self = Self { is_some: 0, index: 0, age: 0 };

    #[inline(always)]
    const fn is_some(&self) -> bool {
        self.is_some != 0
    }

    #[inline(always)]
    fn consider(&mut self, index: u32, age: Ticks) {
        if !self.is_some() || age > self.age {
            *self = Self { is_some: 1, index, age };
        }
    }
}

/// Removes a session if it still is in `state`; `false` if it is not. `peer` is its forward key.
#[inline(always)]
pub(super) fn remove<T: Tables>(
    tables: &T,
    key: &ReverseKey,
    peer: &ForwardKey,
    session: &Shared<Reverse>,
    state: State,
    event: SessionEvent,
) -> bool {
    // The moment makes the word differ from that of a removal which got stuck.
    let dead = State::new(Phase::Dead).expecting(tables.ticks());
    if !tables.exchange(session, state, dead) {
        return false;
    }
    if session.tag() != key.tag() {
        // The entry was recycled in the meantime; its session looked the same.
        tables.exchange(session, dead, state);
        return false;
    }
    tables.remove_forward(peer);
    tables.remove_reverse(key);
    tables.note(event);
    true
}

/// Finds a slot that is free, or frees one.
#[inline(always)]
fn take_slot<T: Tables>(tables: &T, opening: &mut Opening) {
    opening.result = 0;
    opening.victim = Victim::NONE;
    tables.repeat(SEARCH, |step| probe_slot(tables, opening, step));
    if opening.result == 0 {
        opening.result = Outcome::SnatTableFull.number();
    }
}

/// Looks at one slot, and at the end of a window takes that of its victim; `true` ends the search.
#[inline(always)]
fn probe_slot<T: Tables>(tables: &T, opening: &mut Opening, step: u32) -> bool {
    let in_window = step % STEPS;
    if in_window == 0 {
        opening.window = tables.advance_hand(WINDOW);
    }
    let at_end = in_window == WINDOW;
    let index = if at_end {
        if !opening.victim.is_some() {
            return false;
        }
        opening.victim.index
    } else {
        wrapped(opening.window.wrapping_add(in_window), tables.config().session_slots)
    };
    opening.reverse = tables.slot(index);
    let is_free = match tables.reverse(&opening.reverse) {
        Some(occupant) if occupant.slot() == index => clear(tables, opening, &occupant, at_end, index),
        _ => true,
    };
    if is_free {
        opening.slot = index;
        opening.result = FOUND;
    } else if at_end {
        opening.victim = Victim::NONE;
    }
    is_free
}

#[inline(always)]
const fn wrapped(index: u32, slots: u32) -> u32 {
    if slots == 0 { 0 } else { index % slots }
}
