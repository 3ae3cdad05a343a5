//! Opening and ending sessions, without locks: every step is one atomic operation on one table.
//!
//! - Inserting the reverse entry, which must not exist yet, claims the port. Then the forward entry is inserted; who
//!   finds one there gives the port back and uses that session.
//! - Who sets the phase to dead, by compare-and-swap from what it judged, removes the session: forward entry first,
//!   reverse entry last. Nobody removes a session that another one claims or removes.
//! - A slot is taken before the port, from its former occupant if need be.

use super::{Inserted, Shared};
use crate::{
    abi::{
        Config, Forward, ForwardKey, LastHop, Outcome, Phase, Reverse, ReverseKey, SessionEvent, SnatRule,
        State, Ticks,
    },
    checksum::Sum,
    engine::{Tables, Verdict, classify::ICMP},
    wire::{Be16, Ipv4},
};

/// How many ports are tried after the client's own.
pub(super) const PROBES: u32 = 16;
/// How many slots are looked at, in windows that no other CPU looks at.
const SEARCH: u32 = 32;
const WINDOW: u32 = 8;
/// Ports that may stand in for a client's: all but the system ports (RFC 6335 section 6).
const PORT_MIN: u16 = 1024;
const PORT_COUNT: u64 = 65_536 - PORT_MIN as u64;

/// A session to open.
#[derive(Clone, Copy, Default)]
pub(super) struct Opening {
    pub key: ForwardKey,
    pub last_hop: LastHop,
    pub tag: u32,
    pub overlay: u32,
    pub vtep: u32,
    pub generation: u32,
}

/// Whether a session was opened, in one register.
#[derive(Clone, Copy)]
pub(super) struct Opened(u64);

impl Opened {
    const DONE: Self = Self(0);

    #[inline(always)]
    const fn refused(outcome: Outcome) -> Self {
        Self(outcome.number() as u64)
    }

    /// The verdict if it was not.
    #[inline(always)]
    pub(super) const fn refusal(self) -> Option<Verdict> {
        if self.0 == 0 { None } else { Some(Verdict::drop_numbered(self.0)) }
    }
}

/// Opens a session, or finds that another CPU opened it at the same time.
///
/// Not inlined: it has a stack frame of its own, and the way of all other packets stays short.
#[inline(never)]
pub(super) fn open<T: Tables>(tables: &T, rule: &SnatRule, opening: &Opening) -> Opened {
    match try_open(tables, rule, opening) {
        Ok(()) => Opened::DONE,
        Err(outcome) => Opened::refused(outcome),
    }
}

#[inline(always)]
fn try_open<T: Tables>(tables: &T, rule: &SnatRule, opening: &Opening) -> Result<(), Outcome> {
    let now = tables.ticks();
    let slot = take_slot(tables, now)?;
    let key = claim(tables, rule, opening, slot, now)?;
    let forward = || Forward {
        tag: opening.tag,
        seen: now,
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
        transport_delta: transport_delta(opening, &key),
        created: now,
        reserved: [0; 2],
    };
    match tables.insert_forward(&opening.key, forward) {
        Inserted::Done => {}
        Inserted::Exists => {
            tables.remove_reverse(&key);
            return Ok(());
        }
        Inserted::Full => {
            tables.remove_reverse(&key);
            return Err(Outcome::SnatTableFull);
        }
    }
    tables.set_slot(slot, &key);
    if let Some(claimed) = tables.reverse(&key) {
        tables.exchange(&claimed, State::new(Phase::Claimed), State::new(Phase::Opening));
    }
    tables.note(SessionEvent::Opened);
    Ok(())
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
    let addresses = if opening.key.protocol == ICMP as u16 { 0 } else { header_delta(opening.key.client, key.address) };
    Sum::new(addresses).remove(opening.key.client_port.bytes).add(key.port.bytes).fold()
}

/// Claims a port: the client's own if it is free, else one of [`PROBES`] others. Expired sessions in the way are
/// removed; if all ports are taken, so is the oldest session that is not established.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "overlay ids are below MAX_OVERLAYS")]
fn claim<T: Tables>(
    tables: &T,
    rule: &SnatRule,
    opening: &Opening,
    slot: u32,
    now: Ticks,
) -> Result<ReverseKey, Outcome> {
    let session = &opening.key;
    let mut key = ReverseKey {
        pod: session.destination,
        address: Ipv4::UNSPECIFIED,
        pod_port: session.destination_port,
        port: Be16::default(),
        protocol: session.protocol,
        overlay: opening.overlay as u16,
    };
    let mut victim = Victim::NONE;
    for probe in 0..=PROBES {
        (key.address, key.port) = candidate(tables.config(), rule, opening, probe);
        if let Some(occupant) = tables.reverse(&key) {
            match judge(tables, &key, &occupant, now) {
                Judgement::Kept => continue,
                Judgement::Evictable(age) => {
                    victim.consider(probe, age);
                    continue;
                }
                Judgement::Expired(state) => {
                    if !remove(tables, &key, &occupant, state, SessionEvent::Reclaimed) {
                        continue;
                    }
                }
            }
        }
        if insert(tables, opening, &key, slot, now)? {
            return Ok(key);
        }
    }
    if let Some(probe) = victim.index() {
        (key.address, key.port) = candidate(tables.config(), rule, opening, probe);
        if let Some(occupant) = tables.reverse(&key)
            && !evict(tables, &key, &occupant)
        {
            return Err(Outcome::SnatRace);
        }
        if insert(tables, opening, &key, slot, now)? {
            return Ok(key);
        }
        return Err(Outcome::SnatRace);
    }
    Err(Outcome::SnatPortsExhausted)
}

/// Inserts the reverse entry; `false` if another CPU was faster.
#[inline(always)]
fn insert<T: Tables>(
    tables: &T,
    opening: &Opening,
    key: &ReverseKey,
    slot: u32,
    now: Ticks,
) -> Result<bool, Outcome> {
    let (client, destination) = (opening.key.client, opening.key.destination);
    // The answers change the other way round.
    let addresses = header_delta(key.address, client);
    let pseudo_header = if key.protocol == ICMP as u16 { 0 } else { addresses };
    let reverse = || Reverse {
        state: State::new(Phase::Claimed),
        last_hop: opening.last_hop,
        tag: key.tag(),
        seen: now,
        vtep: opening.vtep,
        slot,
        client,
        client_port: opening.key.client_port,
        destination_port: opening.key.destination_port,
        destination,
        header_delta: addresses,
        transport_delta: Sum::new(pseudo_header)
            .remove(key.port.bytes)
            .add(opening.key.client_port.bytes)
            .fold(),
        created: now,
        pad: 0,
        reserved: 0,
    };
    match tables.insert_reverse(key, reverse) {
        Inserted::Done => Ok(true),
        Inserted::Exists => Ok(false),
        Inserted::Full => Err(Outcome::SnatTableFull),
    }
}

/// The address and port to try. A client keeps its address as long as that has ports (RFC 4787 REQ-2); half of the
/// probes stay there, the others go round the pool.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "scaled to the range")]
fn candidate(config: &Config, rule: &SnatRule, opening: &Opening, probe: u32) -> (Ipv4, Be16) {
    let spread = (u64::from(opening.key.client.word()) ^ 0x9e37_79b9).wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32;
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
    let mixed = (u64::from(opening.tag) ^ u64::from(probe) << 32).wrapping_mul(0xa076_1d64_78bd_642f);
    let port = (((mixed >> 32) * PORT_COUNT) >> 32) as u16 + PORT_MIN;
    (address, Be16::new(port))
}

/// What may be done with a session whose slot or port is needed.
pub(super) enum Judgement {
    /// Established, or somebody is at work on it.
    Kept,
    /// Not established; idle for so long.
    Evictable(Ticks),
    /// Idle for longer than its timeout, in this state.
    Expired(State),
}

/// Judges a session by the later packet of both directions.
#[inline(always)]
pub(super) fn judge<T: Tables>(tables: &T, key: &ReverseKey, occupant: &Shared<Reverse>, now: Ticks) -> Judgement {
    let state = occupant.state();
    let limit = tables.config().timeouts.of(key.protocol, state);
    let mut idle = since(occupant.seen(), now);
    if let Some(forward) = tables.forward(&occupant.forward_key(key)) {
        idle = idle.min(since(forward.seen(), now));
    }
    if occupant.tag() != key.tag() {
        return Judgement::Kept;
    }
    if idle > limit {
        return Judgement::Expired(state);
    }
    match state.phase() {
        Phase::Opening => Judgement::Evictable(idle),
        _ => Judgement::Kept,
    }
}

/// How long ago `seen` was; 0 if another CPU's clock was a tick ahead.
#[inline(always)]
fn since(seen: Ticks, now: Ticks) -> Ticks {
    let passed = now.wrapping_sub(seen);
    if passed > Ticks::MAX / 2 { 0 } else { passed }
}

/// The evictable session that has been idle for longest.
#[derive(Clone, Copy)]
struct Victim {
    /// Its number plus one; 0 for none.
    number: u32,
    age: Ticks,
}

impl Victim {
    const NONE: Self = Self { number: 0, age: 0 };

    #[inline(always)]
    fn consider(&mut self, index: u32, age: Ticks) {
        if self.number == 0 || age > self.age {
            *self = Self { number: index + 1, age };
        }
    }

    #[inline(always)]
    const fn index(self) -> Option<u32> {
        self.number.checked_sub(1)
    }
}

/// Removes a session that is not established; `false` if it is by now, or another removes it.
#[inline(always)]
fn evict<T: Tables>(tables: &T, key: &ReverseKey, occupant: &Shared<Reverse>) -> bool {
    let state = occupant.state();
    matches!(state.phase(), Phase::Opening) && remove(tables, key, occupant, state, SessionEvent::Evicted)
}

/// Removes a session if it still is in `state`; `false` if it is not.
#[inline(always)]
pub(super) fn remove<T: Tables>(
    tables: &T,
    key: &ReverseKey,
    occupant: &Shared<Reverse>,
    state: State,
    event: SessionEvent,
) -> bool {
    // The moment makes the word differ from that of a removal which got stuck.
    let dead = State::new(Phase::Dead).expecting(tables.ticks());
    if !tables.exchange(occupant, state, dead) {
        return false;
    }
    if occupant.tag() != key.tag() {
        // The entry was recycled in the meantime; its session looked the same.
        tables.exchange(occupant, dead, state);
        return false;
    }
    let forward_key = occupant.forward_key(key);
    tables.remove_forward(&forward_key);
    tables.remove_reverse(key);
    tables.note(event);
    true
}

/// A free slot: its index.
#[inline(always)]
fn take_slot<T: Tables>(tables: &T, now: Ticks) -> Result<u32, Outcome> {
    let slots = tables.config().session_slots;
    let mut base = 0;
    let mut victim = Victim::NONE;
    for step in 0..SEARCH {
        if step % WINDOW == 0 {
            base = tables.advance_hand(WINDOW);
        }
        let index = wrapped(base.wrapping_add(step % WINDOW), slots);
        let key = tables.slot(index);
        if key.protocol == 0 {
            return Ok(index);
        }
        let Some(occupant) = tables.reverse(&key) else {
            return Ok(index);
        };
        if occupant.slot() != index {
            return Ok(index);
        }
        match judge(tables, &key, &occupant, now) {
            Judgement::Kept => {}
            Judgement::Evictable(age) => victim.consider(index, age),
            Judgement::Expired(state) => {
                if remove(tables, &key, &occupant, state, SessionEvent::Reclaimed) {
                    return Ok(index);
                }
            }
        }
        if step % WINDOW == WINDOW - 1
            && let Some(index) = victim.index()
        {
            let key = tables.slot(index);
            match tables.reverse(&key) {
                Some(occupant) if occupant.slot() == index && !evict(tables, &key, &occupant) => {}
                _ => return Ok(index),
            }
            victim = Victim::NONE;
        }
    }
    Err(Outcome::SnatTableFull)
}

#[inline(always)]
const fn wrapped(index: u32, slots: u32) -> u32 {
    if slots == 0 { 0 } else { index % slots }
}
