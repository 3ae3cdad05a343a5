//! The tables of sessions. The program writes them; userspace reads them, and writes only while they move.

use std::io;

use aya::maps::{self, MapData, PerCpuArray};
use gateway_common::abi::{
    Forward, ForwardKey, Phase, Reverse, ReverseKey, SessionEvent, Slot, State, TICK_SHIFT, Ticks, map,
};
use rustix::time::{ClockId, clock_gettime};

use super::{
    pins::{PinError, Pins, spec},
    tables::{Table, TableError},
};

/// Session time of now.
pub fn now() -> Ticks {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    let nanoseconds = now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned();
    #[expect(clippy::cast_possible_truncation, reason = "only differences are used")]
    {
        (nanoseconds >> TICK_SHIFT) as Ticks
    }
}

/// How long ago a session's time stamp was; 0 if it is newer than `now`, which may have been taken before.
pub fn elapsed(stamp: Ticks, now: Ticks) -> Ticks {
    let passed = now.wrapping_sub(stamp);
    if passed > Ticks::MAX / 2 { 0 } else { passed }
}

/// Ticks in seconds, rounded down.
pub fn seconds(ticks: Ticks) -> u64 {
    (u64::from(ticks) << TICK_SHIFT) / 1_000_000_000
}

/// Typed handles to the tables.
#[derive(Debug)]
pub struct SessionTables {
    /// Sessions by the client's side.
    pub forward: Table<ForwardKey, Forward>,
    /// Sessions by the pod's side.
    pub reverse: Table<ReverseKey, Reverse>,
    /// Which session holds which slot.
    pub slots: Table<u32, Slot>,
}

impl SessionTables {
    /// Opens the pinned tables.
    ///
    /// # Errors
    ///
    /// A pin is absent, or is not what is expected there.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        Ok(Self {
            forward: Table::open(pins, &spec::forward())?,
            reverse: Table::open(pins, &spec::reverse())?,
            slots: Table::open(pins, &spec::slots())?,
        })
    }

    /// Shows every session.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn each(&self, mut visit: impl FnMut(&ReverseKey, &Reverse)) -> Result<(), TableError> {
        self.reverse.each_batch(|keys, values| {
            keys.iter().zip(values).for_each(|(key, value)| visit(key, value));
            Ok(())
        })
    }

    /// How many sessions there are.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn count(&self) -> Result<usize, TableError> {
        let mut count = 0;
        self.each(|_, _| count += 1)?;
        Ok(count)
    }
}

/// What became of sessions since the tables were made.
pub struct Events {
    map: PerCpuArray<MapData, u64>,
}

impl Events {
    pub(super) fn open(pins: &Pins) -> Result<Self, PinError> {
        let spec = spec::events();
        let map = maps::Map::from_map_data(pins.open_map(&spec)?)
            .and_then(PerCpuArray::try_from)
            .map_err(|source| PinError::Map { path: pins.map(spec.name), source })?;
        Ok(Self { map })
    }

    /// Every event with its name and how often it happened, on all CPUs.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn read(&self) -> Result<Vec<(&'static str, u64)>, TableError> {
        SessionEvent::ALL
            .iter()
            .map(|(event, name)| {
                let cpus = self
                    .map
                    .get(&(*event as u32), 0)
                    .map_err(|error| TableError::new("read", map::EVENTS, io::Error::other(error)))?;
                Ok((*name, cpus.iter().fold(0, |sum: u64, cpu| sum.wrapping_add(*cpu))))
            })
            .collect()
    }
}

/// What became of sessions that were taken over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Added.
    pub added: usize,
    /// Brought up to date.
    pub updated: usize,
    /// Left behind, because there was no room or their port was taken.
    pub lost: usize,
}

/// Takes the sessions of `from` over into `to`. The program may work on both meanwhile: on `from` by a load that is being
/// replaced, on `to` by the load that replaces it.
///
/// A session that `to` lacks is added if it was opened at or after `since`: an older one was taken over before, and has
/// ended in `to` since. One that both have is brought up to date: what a connection has been through does not get undone,
/// so the union of both is its state.
///
/// Userspace cannot compare-and-swap, so a packet that comes in the microseconds between reading and writing one entry may
/// be forgotten. It costs no session: the next packet sets what it would have set. (The last FIN has no next packet; such a
/// session ends by the timeout of established ones.)
///
/// # Errors
///
/// A table that cannot be read or written.
pub fn merge(from: &SessionTables, to: &SessionTables, since: Option<Ticks>) -> Result<Merged, TableError> {
    let mut merged = Merged::default();
    let mut free = FreeSlots::of(to)?;
    from.reverse.each_batch(|keys, values| {
        for (key, theirs) in keys.iter().zip(values) {
            let forward_key = theirs.forward_key(key);
            // Without a forward entry it is being opened or removed.
            let Some(their_forward) = from.forward.get(&forward_key)? else { continue };
            if their_forward.reverse_key(&forward_key) != *key {
                continue;
            }
            match to.reverse.get(key)? {
                Some(ours) if is_same(theirs, &ours) => {
                    if update(to, key, theirs, &ours, &their_forward)? {
                        merged.updated += 1;
                    }
                }
                Some(ours) if is_before(ours.created, theirs.created) => {
                    // The port was given to another client meanwhile. What held it before has ended.
                    to.forward.delete(&[ours.forward_key(key)]).map_err(|(_, error)| error)?;
                    to.reverse.replace(key, &Reverse { slot: ours.slot, ..*theirs })?;
                    put_forward(to, &forward_key, &their_forward)?;
                    merged.updated += 1;
                }
                None if since.is_some_and(|since| is_before(theirs.created, since)) => {}
                None if add(to, key, theirs, &forward_key, &their_forward, &mut free)? => merged.added += 1,
                Some(_) | None => merged.lost += 1,
            }
        }
        Ok::<_, TableError>(())
    })?;
    Ok(merged)
}

/// Whether `a` is earlier than `b`.
fn is_before(a: Ticks, b: Ticks) -> bool {
    a != b && b.wrapping_sub(a) <= Ticks::MAX / 2
}

fn is_same(a: &Reverse, b: &Reverse) -> bool {
    let identity = |entry: &Reverse| {
        (entry.client, entry.client_port, entry.destination, entry.destination_port, entry.created)
    };
    identity(a) == identity(b)
}

fn later(a: Ticks, b: Ticks) -> Ticks {
    if is_before(a, b) { b } else { a }
}

/// The state of a session of which two copies have gone on, `b` for longer.
fn union(a: &Reverse, b: &Reverse) -> State {
    let flags = [State::REPLIED, State::FIN_CLIENT, State::FIN_POD];
    let phase = match (a.state.phase(), b.state.phase()) {
        (Phase::Live, Phase::Opening | Phase::Claimed) => Phase::Live,
        (Phase::Opening, Phase::Claimed) => Phase::Opening,
        (_, phase) => phase,
    };
    let mut state = b.state.in_phase(phase);
    if a.state.any(State::REPLIED) && !b.state.any(State::REPLIED) {
        state = state.expecting(a.state.acknowledgement());
    }
    for flag in flags.into_iter().filter(|flag| a.state.any(*flag)) {
        state = state.with(flag);
    }
    // A reset counts until something else is heard of the connection.
    if is_before(b.seen, a.seen) || a.seen == b.seen {
        for flag in [State::RESET_CLIENT, State::RESET_POD].into_iter().filter(|flag| a.state.any(*flag)) {
            state = state.with(flag);
        }
    }
    state
}

/// What a forward entry says of a session in `state`: packets do not look at the state of what is confirmed, so nothing may
/// be confirmed that still has to be established.
fn confirmed(state: State, said: u16) -> u16 {
    if state.phase() == Phase::Live && !state.any(State::RESET_CLIENT) { said } else { 0 }
}

fn update(
    to: &SessionTables,
    key: &ReverseKey,
    theirs: &Reverse,
    ours: &Reverse,
    their_forward: &Forward,
) -> Result<bool, TableError> {
    let state = union(theirs, ours);
    let reverse = Reverse { state, seen: later(theirs.seen, ours.seen), ..*ours };
    let mut changed = false;
    if reverse != *ours {
        changed |= to.reverse.replace(key, &reverse)?;
    }
    let forward_key = ours.forward_key(key);
    if let Some(our_forward) = to.forward.get(&forward_key)?
        && our_forward.reverse_key(&forward_key) == *key
    {
        let forward = Forward {
            confirmed: confirmed(state, our_forward.confirmed | their_forward.confirmed),
            seen: later(our_forward.seen, their_forward.seen),
            ..our_forward
        };
        if forward != our_forward {
            changed |= to.forward.replace(&forward_key, &forward)?;
        }
    }
    Ok(changed)
}

fn put_forward(to: &SessionTables, key: &ForwardKey, value: &Forward) -> Result<bool, TableError> {
    if to.forward.insert(key, value)? {
        return Ok(true);
    }
    // The client's connection was opened anew in both: the later one counts.
    let Some(present) = to.forward.get(key)? else { return to.forward.insert(key, value) };
    if is_before(present.created, value.created) { to.forward.replace(key, value) } else { Ok(false) }
}

/// Adds a session; `false` if there is no room.
fn add(
    to: &SessionTables,
    key: &ReverseKey,
    reverse: &Reverse,
    forward_key: &ForwardKey,
    forward: &Forward,
    free: &mut FreeSlots,
) -> Result<bool, TableError> {
    let Some(slot) = free.take() else { return Ok(false) };
    let inserted = match to.reverse.insert(key, &Reverse { slot, ..*reverse }) {
        Err(error) if error.is_full() => false,
        result => result?,
    };
    if !inserted {
        return Ok(false);
    }
    to.slots.replace(&slot, &Slot { session: *key })?;
    let complete = match put_forward(to, forward_key, forward) {
        Err(error) if error.is_full() => false,
        result => result?,
    };
    if !complete {
        to.reverse.delete(std::slice::from_ref(key)).map_err(|(_, error)| error)?;
    }
    Ok(complete)
}

/// Slots that no session holds, from the last one down: the program's hand is likely to be elsewhere.
struct FreeSlots {
    used: Vec<bool>,
}

impl FreeSlots {
    fn of(tables: &SessionTables) -> Result<Self, TableError> {
        let mut used = vec![false; tables.slots.capacity() as usize];
        tables.reverse.each_batch(|_, values| {
            for value in values {
                if let Some(slot) = used.get_mut(value.slot as usize) {
                    *slot = true;
                }
            }
            Ok::<_, TableError>(())
        })?;
        Ok(Self { used })
    }

    fn take(&mut self) -> Option<u32> {
        while self.used.pop()? {}
        u32::try_from(self.used.len()).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(phase: Phase, flags: u32, seen: Ticks) -> Reverse {
        Reverse { state: State::new(phase).with(flags).expecting(7), seen, ..Reverse::default() }
    }

    #[test]
    fn what_a_connection_went_through_is_not_undone() {
        let old = entry(Phase::Live, State::REPLIED | State::FIN_CLIENT, 5);
        let new = State { word: State::new(Phase::Opening).word };
        let copy = Reverse { state: new, ..old };
        assert_eq!(union(&old, &copy), old.state);
        // The copy went on after the old one: nothing of it is lost either.
        let ahead = entry(Phase::Live, State::REPLIED | State::FIN_POD, 6);
        let both = union(&old, &ahead);
        assert!(both.all(State::FIN_CLIENT | State::FIN_POD) && both.phase() == Phase::Live);
        // Being removed in the copy is for good.
        assert_eq!(union(&old, &entry(Phase::Dead, 0, 6)).phase(), Phase::Dead);
    }

    #[test]
    fn a_reset_counts_until_something_else_is_heard() {
        let reset = entry(Phase::Live, State::RESET_POD, 9);
        assert!(union(&reset, &entry(Phase::Live, 0, 8)).any(State::RESET_POD));
        assert!(!union(&reset, &entry(Phase::Live, 0, 10)).any(State::RESET_POD));
    }

    #[test]
    fn only_what_is_established_is_confirmed() {
        assert_eq!(confirmed(State::new(Phase::Live), 1), 1);
        assert_eq!(confirmed(State::new(Phase::Live), 0), 0);
        assert_eq!(confirmed(State::new(Phase::Live).with(State::RESET_CLIENT), 1), 0);
        assert_eq!(confirmed(State::new(Phase::Opening), 1), 0, "its promotion was overwritten");
    }

    #[test]
    fn time_wraps() {
        assert!(is_before(u32::MAX, 3) && !is_before(3, u32::MAX) && !is_before(3, 3));
        assert_eq!((elapsed(u32::MAX, 3), elapsed(3, u32::MAX)), (4, 0));
        assert_eq!((later(u32::MAX, 3), later(3, u32::MAX)), (3, 3));
        assert_eq!(seconds(gateway_common::abi::ticks(60)), 60);
    }

    #[test]
    fn slots_are_taken_from_the_end() {
        let mut free = FreeSlots { used: vec![false, true, false, true] };
        assert_eq!([free.take(), free.take(), free.take()], [Some(2), Some(0), None]);
    }
}
