//! Makes the tables equal to the plan, entry by entry, and never by clearing them.
//!
//! Each table has a copy of what was last read or written. A pass computes the difference between that copy and the
//! goal, and applies it; what fails stays different, so the next pass tries it again. Every now and then the copies
//! are read anew, which finds what somebody else changed.
//!
//! Order: VTEPs before the routes that name them; routes before the VTEPs that they named. An id is given away again
//! only when no table refers to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use bytemuck::{Pod, Zeroable as _};
use gateway_common::{
    abi::{Egress, LocalAddress, OverlayAddress, PrefixKey, Route, Vtep, VtepFlags, VtepSlot},
    wire::Ipv4,
};
use ipnet::Ipv4Net;

use super::{
    tables::{Table, TableError, Tables, TrieKey},
    template::{belongs, identity},
};
use crate::plan::{Changes, Desired, OverlayId, VtepKey};

/// Pause between two changes of one VTEP entry: a program that still reads the slot that is written next has long
/// finished (a packet takes microseconds).
const SLOT_PAUSE: Duration = Duration::from_millis(1);

/// What differs between a table and its goal.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference<K, V> {
    /// Entries with another value. They need no room, so they are written before [`Self::added`].
    pub changed: Vec<(K, V)>,
    /// Entries that are absent.
    pub added: Vec<(K, V)>,
    /// Entries that should not be there.
    pub gone: Vec<K>,
}

impl<K, V> Difference<K, V> {
    /// Every key that is written or deleted.
    fn keys(&self) -> impl Iterator<Item = &K> {
        self.changed.iter().chain(&self.added).map(|(key, _)| key).chain(&self.gone)
    }
}

impl<K, V> Default for Difference<K, V> {
    fn default() -> Self {
        Self { changed: Vec::new(), added: Vec::new(), gone: Vec::new() }
    }
}

/// Compares a table with its goal.
pub fn difference<K: Copy + Ord, V: Copy + PartialEq>(
    have: &BTreeMap<K, V>,
    want: &BTreeMap<K, V>,
) -> Difference<K, V> {
    let mut difference = Difference::default();
    for (key, value) in want {
        match have.get(key) {
            Some(present) if present == value => {}
            Some(_) => difference.changed.push((*key, *value)),
            None => difference.added.push((*key, *value)),
        }
    }
    difference.gone.extend(have.keys().filter(|key| !want.contains_key(key)));
    difference
}

/// A table and what is known to be in it.
#[derive(Debug)]
struct Mirror<K, V> {
    table: Table<K, V>,
    entries: BTreeMap<K, V>,
}

impl<K: Pod + Ord, V: Pod + PartialEq> Mirror<K, V> {
    fn read(table: Table<K, V>) -> Result<Self, TableError> {
        let entries = table.read()?;
        Ok(Self { table, entries })
    }

    fn reread(&mut self) -> Result<(), TableError> {
        self.entries = self.table.read()?;
        Ok(())
    }

    fn write(&mut self, entries: &[(K, V)], faults: &mut Faults) {
        past_faults(
            entries,
            |rest| self.table.write(rest),
            faults,
            |done| {
                self.entries.extend(done.iter().copied());
            },
        );
    }

    fn delete(&mut self, keys: &[K], faults: &mut Faults) {
        past_faults(
            keys,
            |rest| self.table.delete(rest),
            faults,
            |done| {
                for key in done {
                    self.entries.remove(key);
                }
            },
        );
    }
}

/// Single entries that may fail in one go before the rest waits as well.
const MOST_FAULTS: usize = 16;

/// Does what can be done: an entry that fails does not hold up those behind it, unless none of them can succeed.
fn past_faults<T>(
    mut rest: &[T],
    mut attempt: impl FnMut(&[T]) -> Result<(), (usize, TableError)>,
    faults: &mut Faults,
    mut note: impl FnMut(&[T]),
) {
    for faulty in 1.. {
        let Err((done, error)) = attempt(rest) else { break };
        note(&rest[..done]);
        if error.is_full() || faulty == MOST_FAULTS {
            faults.add(&error, rest.len() - done);
            return;
        }
        faults.add(&error, 1);
        rest = &rest[done + 1..];
    }
    note(rest);
}

/// Writes that failed in a pass; they are tried again in the next.
#[derive(Debug, Default)]
struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, error: &TableError, entries: usize) {
        self.0.push(format!("{error}; {entries} entries wait for the next attempt"));
    }
}

/// Result of a pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Entries written.
    pub written: usize,
    /// Entries deleted.
    pub deleted: usize,
    /// Pods that were deleted: their sessions end.
    pub gone_pods: Vec<OverlayAddress>,
    /// What could not be done, for people.
    pub problems: Vec<String>,
}

/// Keys to look at.
#[derive(Clone, Copy, Debug)]
pub enum Scope<'a> {
    /// Every key.
    Everything,
    /// These keys only.
    Only(&'a Changes),
}

/// The daemon's side of the tables.
#[derive(Debug)]
pub struct Reconciler {
    pods: Mirror<OverlayAddress, Route>,
    prefixes: Mirror<TrieKey, Route>,
    sources: Mirror<OverlayAddress, Route>,
    addresses: Mirror<Ipv4, LocalAddress>,
    egress: Mirror<u32, Egress>,
    vteps: Vteps,
    /// Some entry waits to be freed.
    orphans: bool,
    /// What the plan does not name may exist.
    holding: bool,
    /// What the plan says about pods is not the whole yet.
    holding_pods: bool,
}

impl Reconciler {
    /// Adopts the tables as they are.
    ///
    /// # Errors
    ///
    /// A table cannot be read.
    pub fn adopt(tables: Tables) -> Result<Self, TableError> {
        Ok(Self {
            pods: Mirror::read(tables.pods)?,
            prefixes: Mirror::read(tables.prefixes)?,
            sources: Mirror::read(tables.sources)?,
            addresses: Mirror::read(tables.addresses)?,
            egress: Mirror::read(tables.egress)?,
            vteps: Vteps::adopt(tables.vteps)?,
            orphans: false,
            holding: false,
            holding_pods: false,
        })
    }

    /// Reads all tables anew.
    ///
    /// # Errors
    ///
    /// A table cannot be read.
    pub fn reread(&mut self) -> Result<(), TableError> {
        self.pods.reread()?;
        self.prefixes.reread()?;
        self.sources.reread()?;
        self.addresses.reread()?;
        self.egress.reread()?;
        self.vteps.reread()
    }

    /// While the plan may lack something that exists, entries that it does not ask for are left as they are, unless
    /// a scope names them.
    pub fn hold_removals(&mut self, hold: bool) {
        self.holding = hold;
    }

    /// While the plan has only some of the pods, their entries are left as they are.
    pub fn hold_pods(&mut self, hold: bool) {
        self.holding_pods = hold;
    }

    /// Entries of an earlier run that no node has claimed yet.
    pub fn adopted(&self) -> impl Iterator<Item = (u32, &VtepSlot)> {
        let taken: BTreeSet<u32> = self.vteps.owners.values().copied().collect();
        self.vteps.used().filter(move |(id, _)| !taken.contains(id))
    }

    /// Gives entries of an earlier run another slot.
    pub fn refresh(&mut self, changes: &[(u32, VtepSlot)]) -> Pass {
        let mut faults = Faults::default();
        self.vteps.replace(changes, &mut faults);
        Pass { written: changes.len(), problems: faults.0, ..Pass::default() }
    }

    /// The slot by which a node is reached now: that of its entry, else that of the entry of an earlier run which is
    /// the node's. `slot` says what node it is.
    pub fn standing(&self, key: &VtepKey, slot: &VtepSlot) -> Option<&VtepSlot> {
        let found = match self.vteps.owners.get(key) {
            Some(id) => self.vteps.entries.get(id).map(Vtep::slot),
            None => self.vteps.inherited(slot),
        };
        found.filter(|found| found.flags.has(VtepFlags::READY) && belongs(found, slot))
    }

    /// The id of a node's VTEP.
    pub fn vtep_id(&self, key: &VtepKey) -> Option<u32> {
        self.vteps.owners.get(key).copied()
    }

    /// Makes addresses and ways out what they should be.
    pub fn apply_host(
        &mut self,
        addresses: &BTreeMap<Ipv4, LocalAddress>,
        egress: &BTreeMap<u32, Egress>,
    ) -> Pass {
        let mut pass = Pass::default();
        let mut faults = Faults::default();
        let addresses = difference(&self.addresses.entries, addresses);
        let egress = difference(&self.egress.entries, egress);
        apply(&mut self.addresses, addresses, &mut pass, &mut faults);
        apply(&mut self.egress, egress, &mut pass, &mut faults);
        pass.problems = faults.0;
        pass
    }

    /// Makes VTEPs and routes what they should be. `slots` has the entry of every node in `desired.vteps`; a scope names
    /// the nodes whose slot differs from the last pass.
    pub fn apply(
        &mut self,
        desired: &Desired,
        slots: &BTreeMap<VtepKey, VtepSlot>,
        scope: Scope<'_>,
    ) -> Pass {
        let mut pass = Pass::default();
        let mut faults = Faults::default();

        let keys: Vec<&VtepKey> = match scope {
            Scope::Everything => slots.keys().collect(),
            Scope::Only(changes) => changes.vteps.iter().filter(|key| slots.contains_key(key)).collect(),
        };
        let newcomers: Vec<_> =
            keys.iter().copied().filter(|key| !self.vteps.owners.contains_key(key)).collect();
        if !newcomers.is_empty() {
            let referenced = self.referenced();
            self.vteps.claim(&newcomers, slots, &referenced, &mut faults);
        }
        pass.written += self.vteps.write(&keys, slots, &mut faults);

        let ids = &self.vteps.owners;
        let route = |key: &VtepKey| ids.get(key).copied().map(Route::to);
        let mut pods = part(scope, &self.pods.entries, |c| &c.pods, &desired.pods, |k| exact(*k), route);
        let mut prefixes =
            part(scope, &self.prefixes.entries, |c| &c.prefixes, &desired.prefixes, |k| trie(*k), route);
        let mut sources =
            part(scope, &self.sources.entries, |c| &c.sources, &desired.sources, |k| exact(*k), route);
        if self.holding && matches!(scope, Scope::Everything) {
            pods.gone.clear();
            prefixes.gone.clear();
            sources.gone.clear();
        }
        if self.holding_pods {
            pods = Difference::default();
        }
        let gone = pods.gone.clone();
        let before = self.destinations(&pods, &prefixes);
        apply(&mut self.pods, pods, &mut pass, &mut faults);
        apply(&mut self.prefixes, prefixes, &mut pass, &mut faults);
        apply(&mut self.sources, sources, &mut pass, &mut faults);
        let left: BTreeSet<u32> = before
            .into_iter()
            .filter(|(at, vtep)| self.leads(*at) != Some(*vtep))
            .map(|(_, vtep)| vtep)
            .collect();
        self.vteps.disturb(&left, &mut faults);
        pass.gone_pods = gone.into_iter().filter(|pod| !self.pods.entries.contains_key(pod)).collect();

        self.orphans |= match scope {
            Scope::Everything => self.vteps.has_orphans(slots, self.holding),
            Scope::Only(changes) => changes.vteps.iter().any(|key| !slots.contains_key(key)),
        };
        if self.orphans {
            let referenced = self.referenced();
            pass.deleted += self.vteps.release(slots, &referenced, self.holding, &mut faults);
            self.orphans = self.vteps.has_orphans(slots, self.holding);
        }
        pass.problems = faults.0;
        pass
    }

    /// Where the keys that are about to change lead now.
    fn destinations(
        &self,
        pods: &Difference<OverlayAddress, Route>,
        prefixes: &Difference<TrieKey, Route>,
    ) -> Vec<(TrieKey, u32)> {
        let pods = pods.keys().map(|pod| exact_prefix(*pod));
        pods.chain(prefixes.keys().copied()).filter_map(|at| Some((at, self.leads(at)?))).collect()
    }

    /// The VTEP that an address or a whole prefix is reached by: by its own entry, else by the longest prefix that has an
    /// entry and holds it.
    fn leads(&self, at: TrieKey) -> Option<u32> {
        let address = OverlayAddress { overlay: at.data.overlay, address: at.data.address };
        let host = at.length == PrefixKey::OVERLAY_BITS + Ipv4::BITS;
        if let Some(route) = host.then(|| self.pods.entries.get(&address)).flatten() {
            return Some(route.vtep);
        }
        let mut longest = None;
        let mut length = 0;
        // From one length that occurs to the next: a cluster has one or two.
        while let Some((key, _)) =
            self.prefixes.entries.range(TrieKey { length, data: PrefixKey::zeroed() }..).next()
        {
            if key.length > at.length {
                break;
            }
            let data = PrefixKey { address: masked(at.data.address, key.length), ..at.data };
            longest = self.prefixes.entries.get(&TrieKey { length: key.length, data }).or(longest);
            length = key.length + 1;
        }
        longest.map(|route| route.vtep)
    }

    /// Ids that some route names.
    fn referenced(&self) -> BTreeSet<u32> {
        let routes = self
            .pods
            .entries
            .values()
            .chain(self.prefixes.entries.values())
            .chain(self.sources.entries.values());
        routes.map(|route| route.vtep).collect()
    }
}

/// The difference between a route table and its goal, within a scope.
fn part<P: Ord, K: Copy + Ord>(
    scope: Scope<'_>,
    have: &BTreeMap<K, Route>,
    changes: impl Fn(&Changes) -> &BTreeSet<P>,
    goal: &BTreeMap<P, VtepKey>,
    key: impl Fn(&P) -> K,
    route: impl Fn(&VtepKey) -> Option<Route>,
) -> Difference<K, Route> {
    // A goal that names a node without an entry (the table is full) cannot be met yet.
    let wanted = |name: &P| goal.get(name).and_then(&route).map(|route| (key(name), route));
    match scope {
        Scope::Everything => difference(have, &goal.keys().filter_map(wanted).collect()),
        Scope::Only(scope) => {
            let names = changes(scope);
            let present: BTreeMap<K, Route> = names
                .iter()
                .filter_map(|name| have.get_key_value(&key(name)))
                .map(|(k, v)| (*k, *v))
                .collect();
            difference(&present, &names.iter().filter_map(wanted).collect())
        }
    }
}

fn apply<K: Pod + Ord, V: Pod + PartialEq>(
    mirror: &mut Mirror<K, V>,
    difference: Difference<K, V>,
    pass: &mut Pass,
    faults: &mut Faults,
) {
    let Difference { changed, added, gone } = difference;
    pass.written += changed.len() + added.len();
    pass.deleted += gone.len();
    mirror.write(&changed, faults);
    // Entries that go make room for those that come; where both fit, the new ones come first.
    let room = (mirror.table.capacity() as usize).saturating_sub(mirror.entries.len());
    if added.len() <= room {
        mirror.write(&added, faults);
        mirror.delete(&gone, faults);
    } else {
        mirror.delete(&gone, faults);
        mirror.write(&added, faults);
    }
}

/// The address as a prefix.
fn exact_prefix(pod: OverlayAddress) -> TrieKey {
    let data = PrefixKey { overlay: pod.overlay, address: pod.address };
    TrieKey { length: PrefixKey::OVERLAY_BITS + Ipv4::BITS, data }
}

/// The network of an address in a prefix whose length counts the overlay too.
fn masked(address: Ipv4, length: u32) -> Ipv4 {
    let bits = length.saturating_sub(PrefixKey::OVERLAY_BITS);
    let mask = u32::MAX.checked_shl(Ipv4::BITS - bits.min(Ipv4::BITS)).unwrap_or(0);
    Ipv4::new((u32::from_be_bytes(address.octets) & mask).to_be_bytes())
}

fn exact((overlay, address): (OverlayId, Ipv4Addr)) -> OverlayAddress {
    OverlayAddress { overlay, address: address.into() }
}

fn trie((overlay, net): (OverlayId, Ipv4Net)) -> TrieKey {
    TrieKey {
        length: PrefixKey::OVERLAY_BITS + u32::from(net.prefix_len()),
        data: PrefixKey { overlay, address: net.network().into() },
    }
}

/// The VTEP table: an array whose indices are given to nodes.
#[derive(Debug)]
struct Vteps {
    table: Table<u32, Vtep>,
    entries: BTreeMap<u32, Vtep>,
    owners: BTreeMap<VtepKey, u32>,
    /// Entries that an earlier run left, as they were found. One that has been given away since is found by what it
    /// holds now, not by this.
    found: BTreeMap<(u16, Ipv4), Vec<u32>>,
    last_change: Option<Instant>,
}

impl Vteps {
    fn adopt(table: Table<u32, Vtep>) -> Result<Self, TableError> {
        let entries = table.read()?;
        let mut vteps =
            Self { table, entries, owners: BTreeMap::new(), found: BTreeMap::new(), last_change: None };
        let mut found: BTreeMap<_, Vec<u32>> = BTreeMap::new();
        for (id, slot) in vteps.used() {
            found.entry(identity(slot)).or_default().push(id);
        }
        vteps.found = found;
        Ok(vteps)
    }

    /// The entry of an earlier run for the node that `slot` is meant for.
    fn inherited(&self, slot: &VtepSlot) -> Option<&VtepSlot> {
        let ids = self.found.get(&identity(slot))?;
        ids.iter().filter_map(|id| self.entries.get(id)).map(Vtep::slot).find(|found| {
            found.flags.has(VtepFlags::USED) && identity(found) == identity(slot) && belongs(found, slot)
        })
    }

    fn reread(&mut self) -> Result<(), TableError> {
        self.entries = self.table.read()?;
        Ok(())
    }

    fn used(&self) -> impl Iterator<Item = (u32, &VtepSlot)> {
        self.entries
            .iter()
            .map(|(id, entry)| (*id, entry.slot()))
            .filter(|(_, slot)| slot.flags.has(VtepFlags::USED))
    }

    /// Gives nodes an id: the entry that is its own from an earlier run, else a free one.
    fn claim(
        &mut self,
        newcomers: &[&VtepKey],
        slots: &BTreeMap<VtepKey, VtepSlot>,
        referenced: &BTreeSet<u32>,
        faults: &mut Faults,
    ) {
        let taken: BTreeSet<u32> = self.owners.values().copied().collect();
        let mut free: BTreeSet<u32> = self.entries.keys().copied().collect();
        let mut adoptable: BTreeMap<(u16, Ipv4), Vec<u32>> = BTreeMap::new();
        for (id, slot) in self.used() {
            free.remove(&id);
            if !taken.contains(&id) {
                adoptable.entry(identity(slot)).or_default().push(id);
            }
        }
        free.retain(|id| !taken.contains(id) && !referenced.contains(id));

        let mut homeless = 0;
        for (key, slot) in newcomers.iter().filter_map(|key| Some((*key, slots.get(key)?))) {
            let candidates = adoptable.entry(identity(slot)).or_default();
            let own = candidates.iter().position(|id| belongs(self.entries[id].slot(), slot));
            match own.map(|at| candidates.swap_remove(at)).or_else(|| free.pop_first()) {
                Some(id) => {
                    self.owners.insert(key.clone(), id);
                }
                None => homeless += 1,
            }
        }
        if homeless > 0 {
            faults.0.push(format!(
                "table {} is full: {homeless} nodes have no entry and cannot be reached: raise max_vteps under [datapath]",
                self.table.name()
            ));
        }
    }

    /// Writes the entries of these nodes that differ, and tells how many.
    fn write(
        &mut self,
        keys: &[&VtepKey],
        slots: &BTreeMap<VtepKey, VtepSlot>,
        faults: &mut Faults,
    ) -> usize {
        let changes: Vec<(u32, VtepSlot)> = keys
            .iter()
            .filter_map(|key| Some((*self.owners.get(key)?, *slots.get(key)?)))
            .filter(|(id, slot)| self.entries.get(id).is_some_and(|entry| entry.slot() != slot))
            .collect();
        self.replace(&changes, faults);
        changes.len()
    }

    /// Whether an entry is used by a node that is not wanted any more; with `holding`, by one that was wanted.
    fn has_orphans(&self, slots: &BTreeMap<VtepKey, VtepSlot>, holding: bool) -> bool {
        self.owners.keys().any(|key| !slots.contains_key(key))
            || (!holding && self.used().count() > self.owners.len())
    }

    /// Frees the entries of nodes that are gone, unless a route that could not be deleted still names them; with
    /// `holding`, only those of nodes that this run has known.
    fn release(
        &mut self,
        slots: &BTreeMap<VtepKey, VtepSlot>,
        referenced: &BTreeSet<u32>,
        holding: bool,
        faults: &mut Faults,
    ) -> usize {
        let (kept, known): (BTreeSet<u32>, BTreeSet<u32>) = (
            self.owners.iter().filter(|(key, _)| slots.contains_key(key)).map(|(_, id)| *id).collect(),
            self.owners.values().copied().collect(),
        );
        let gone: Vec<(u32, VtepSlot)> = self
            .used()
            .map(|(id, _)| id)
            .filter(|id| !kept.contains(id) && !referenced.contains(id) && (!holding || known.contains(id)))
            .map(|id| (id, VtepSlot::zeroed()))
            .collect();
        self.replace(&gone, faults);
        let entries = &self.entries;
        self.owners.retain(|key, id| {
            slots.contains_key(key)
                || entries.get(id).is_some_and(|entry| entry.slot().flags.has(VtepFlags::USED))
        });
        gone.len()
    }

    /// Raises the generation of entries from which pods went away: sessions look for their pod again.
    fn disturb(&mut self, ids: &BTreeSet<u32>, faults: &mut Faults) {
        let raised: Vec<(u32, Vtep)> = ids
            .iter()
            .filter_map(|id| {
                let entry = self.entries.get(id).filter(|entry| entry.slot().flags.has(VtepFlags::USED))?;
                Some((*id, Vtep { generation: entry.generation.wrapping_add(1), ..*entry }))
            })
            .collect();
        if !raised.is_empty() {
            self.write_entries(&raised, faults);
        }
    }

    /// Replaces slots: first the ones that nobody reads, then the number that says which one is read.
    fn replace(&mut self, changes: &[(u32, VtepSlot)], faults: &mut Faults) {
        if changes.is_empty() {
            return;
        }
        if let Some(pause) = self.last_change.and_then(|last| SLOT_PAUSE.checked_sub(last.elapsed())) {
            std::thread::sleep(pause);
        }
        let prepared: Vec<(u32, Vtep)> = changes
            .iter()
            .filter_map(|(id, slot)| Some((*id, prepare(self.entries.get(id)?, slot))))
            .collect();
        let done = self.write_entries(&prepared, faults);
        let flipped: Vec<(u32, Vtep)> =
            prepared.iter().take(done).map(|(id, entry)| (*id, flip(entry))).collect();
        self.write_entries(&flipped, faults);
        self.last_change = Some(Instant::now());
    }

    fn write_entries(&mut self, entries: &[(u32, Vtep)], faults: &mut Faults) -> usize {
        let done = match self.table.write(entries) {
            Ok(()) => entries.len(),
            Err((done, error)) => {
                faults.add(&error, entries.len() - done);
                done
            }
        };
        self.entries.extend(entries.iter().take(done).copied());
        done
    }
}

/// The entry with `slot` in the place that is not active.
fn prepare(entry: &Vtep, slot: &VtepSlot) -> Vtep {
    let mut prepared = *entry;
    prepared.slots[usize::from(entry.active & 1 == 0)] = *slot;
    prepared
}

/// The entry with its other slot active. The generation rises if that slot has another owner.
fn flip(entry: &Vtep) -> Vtep {
    let mut flipped = *entry;
    flipped.active = u32::from(entry.active & 1 == 0);
    let same_owner = flipped.slot().flags.has(VtepFlags::USED)
        && entry.slot().flags.has(VtepFlags::USED)
        && belongs(flipped.slot(), entry.slot());
    if !same_owner {
        flipped.generation = flipped.generation.wrapping_add(1);
    }
    flipped
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Applying a difference reaches the goal, and touches only what differs.
        #[test]
        fn difference_reaches_the_goal(
            have in proptest::collection::btree_map(0..20_u32, 0..4_u32, 0..15),
            want in proptest::collection::btree_map(0..20_u32, 0..4_u32, 0..15),
        ) {
            let Difference { changed, added, gone } = difference(&have, &want);
            prop_assert!(changed.iter().all(|(key, value)| have.get(key).is_some_and(|old| old != value)));
            prop_assert!(added.iter().all(|(key, _)| !have.contains_key(key)));
            let mut result = have;
            for key in &gone {
                prop_assert!(result.remove(key).is_some());
            }
            result.extend(changed.into_iter().chain(added));
            prop_assert_eq!(result, want);
        }
    }

    fn used(octet: u8) -> VtepSlot {
        VtepSlot { flags: VtepFlags::USED, endpoint: Ipv4::new([192, 0, 2, octet]), ..VtepSlot::zeroed() }
    }

    #[test]
    fn a_reader_sees_the_old_slot_until_the_flip() {
        let start = Vtep { active: 1, generation: 5, slots: [VtepSlot::zeroed(), used(1)] };
        let prepared = prepare(&start, &used(2));
        assert_eq!((prepared.active, *prepared.slot()), (1, used(1)));
        let flipped = flip(&prepared);
        assert_eq!((flipped.active, *flipped.slot()), (0, used(2)));
        assert_eq!(flipped.slots[1], used(1), "the slot that may still be read is untouched");
    }

    #[test]
    fn the_generation_tells_owners_apart() {
        let free = Vtep { active: 0, generation: 5, slots: [VtepSlot::zeroed(); 2] };
        let taken = flip(&prepare(&free, &used(1)));
        assert_eq!(taken.generation, 6);
        let resolved = VtepSlot { flags: VtepFlags::USED.with(VtepFlags::READY), mtu: 1450, ..used(1) };
        assert_eq!(flip(&prepare(&taken, &resolved)).generation, 6);
        assert_eq!(flip(&prepare(&taken, &used(2))).generation, 7);
        assert_eq!(flip(&prepare(&taken, &VtepSlot::zeroed())).generation, 7);
    }
}
