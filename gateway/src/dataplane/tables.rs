//! Typed handles to the pinned maps.
//!
//! A handle is opened from its pin, so `show` reads tables while no daemon runs. Opening compares the map with what
//! these types expect: the kernel copies as many bytes as the map says, whatever the types here are.

use std::{collections::BTreeMap, io};

use aya::maps::{self, MapData, PerCpuArray};
use bytemuck::Pod;
use gateway_common::{
    abi::{Counter, Egress, LocalAddress, Outcome, OutcomeInfo, OverlayAddress, PrefixKey, Route, Vtep, map},
    wire::Ipv4,
};

use super::{
    batch,
    pins::{MapSpec, PinError, Pins, spec},
    sessions::{Events, SessionTables},
};

/// Key of the prefix trie as the kernel has it (`struct bpf_lpm_trie_key`): length in bits, then data.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, bytemuck::Pod, bytemuck::Zeroable)]
pub struct TrieKey {
    /// Prefix length in bits, counted from the first bit of `data`; host byte order.
    pub length: u32,
    /// Overlay and network address.
    pub data: PrefixKey,
}

/// A table could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} table {table}: {}", reason(table, source))]
pub struct TableError {
    /// `read`, `write to` or `delete from`.
    verb: &'static str,
    /// Name of the map.
    table: &'static str,
    /// What the kernel said.
    source: io::Error,
}

impl TableError {
    pub(super) fn new(verb: &'static str, table: &'static str, source: io::Error) -> Self {
        Self { verb, table, source }
    }

    /// The table has no room, or the kernel no memory, so no other entry will do better.
    pub fn is_full(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM))
    }
}

fn reason(table: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        // The kernel's own words for it are "Argument list too long".
        Some(libc::E2BIG | libc::ENOSPC) => match size_key(table) {
            Some(key) => format!("it is full: raise {key} under [datapath]"),
            None => "it is full".to_owned(),
        },
        Some(libc::EPERM) => format!("{error} (root, or CAP_BPF and CAP_NET_ADMIN, is needed)"),
        _ => error.to_string(),
    }
}

/// The key under `[datapath]` that sets a table's size, if one does.
fn size_key(table: &str) -> Option<&'static str> {
    match table {
        map::PODS => Some("max_pods"),
        map::PREFIXES => Some("max_prefixes"),
        map::VTEPS => Some("max_vteps"),
        map::SOURCES => Some("max_sources"),
        _ => None,
    }
}

/// A table cannot be moved to another size.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// A pin is wrong.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The table cannot be read or written.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The new size is too small for what the table holds.
    #[error(
        "table {table} needs room for {needed} entries, but the configuration has room for {capacity}: raise its size \
         under [datapath], or let the daemon remove entries first; nothing was changed"
    )]
    TooSmall {
        /// Name of the map.
        table: &'static str,
        /// Entries in use; for arrays, up to the last one in use.
        needed: usize,
        /// The capacity that is asked for.
        capacity: u32,
    },
}

/// Copies a table that is staged into its successor, which is empty; gives the number of entries. Nobody but the caller
/// may write to either.
///
/// # Errors
///
/// See [`MoveError`].
pub fn fill_successor(pins: &Pins, name: &str) -> Result<usize, MoveError> {
    match name {
        map::PODS => fill::<OverlayAddress, Route>(pins, &spec::pods()),
        map::PREFIXES => fill::<TrieKey, Route>(pins, &spec::prefixes()),
        map::VTEPS => fill_array::<Vtep>(pins, &spec::vteps()),
        map::SOURCES => fill::<OverlayAddress, Route>(pins, &spec::sources()),
        map::ADDRESSES => fill::<Ipv4, LocalAddress>(pins, &spec::addresses()),
        map::EGRESS => fill::<u32, Egress>(pins, &spec::egress()),
        // `Pins::check` stages no other.
        other => unreachable!("table {other} has one size"),
    }
}

fn fill<K: Pod + Ord, V: Pod>(pins: &Pins, spec: &MapSpec) -> Result<usize, MoveError> {
    let entries = Table::<K, V>::open(&pins.without_staging(), spec)?.read()?;
    copy(&Table::open(pins, spec)?, &entries.into_iter().collect::<Vec<_>>(), <[_]>::len)
}

/// An array has every entry from the start: those that are in use are copied.
fn fill_array<V: Pod + PartialEq>(pins: &Pins, spec: &MapSpec) -> Result<usize, MoveError> {
    let entries = Table::<u32, V>::open(&pins.without_staging(), spec)?.read()?;
    let used: Vec<_> = entries.into_iter().filter(|(_, value)| *value != V::zeroed()).collect();
    let needed = |entries: &[(u32, V)]| entries.last().map_or(0, |(index, _)| *index as usize + 1);
    copy(&Table::open(pins, spec)?, &used, needed)
}

fn copy<K: Pod + Ord, V: Pod>(
    successor: &Table<K, V>,
    entries: &[(K, V)],
    needed: impl Fn(&[(K, V)]) -> usize,
) -> Result<usize, MoveError> {
    let (needed, capacity) = (needed(entries), successor.capacity());
    if needed > capacity as usize {
        return Err(MoveError::TooSmall { table: successor.name(), needed, capacity });
    }
    successor.write(entries).map_err(|(_, error)| error)?;
    Ok(entries.len())
}

/// A table of `V` by `K`.
#[derive(Debug)]
pub struct Table<K, V> {
    name: &'static str,
    capacity: u32,
    map: batch::Map<K, V>,
}

impl<K: Pod + Ord, V: Pod> Table<K, V> {
    pub(super) fn open(pins: &Pins, spec: &MapSpec) -> Result<Self, PinError> {
        let path = pins.map(spec.name);
        let data = pins.open_map(spec)?;
        let capacity =
            data.info().map_err(|source| PinError::Map { path: path.clone(), source })?.max_entries();
        let map = batch::Map::new(data).map_err(|source| PinError::Io { verb: "use", path, source })?;
        Ok(Self { name: spec.name, capacity, map })
    }

    /// Name of the map.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// How many entries it can hold.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// All entries. For arrays this includes those that were never written.
    pub fn read(&self) -> Result<BTreeMap<K, V>, TableError> {
        let entries = self.map.read().map_err(|source| self.error("read", source))?;
        Ok(entries.into_iter().collect())
    }

    /// How many entries there are; of an array all.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn count(&self) -> Result<u64, TableError> {
        let mut count = 0;
        self.each_batch(|keys, _| {
            count += keys.len() as u64;
            Ok::<_, TableError>(())
        })?;
        Ok(count)
    }

    /// Writes entries, in order; each is replaced whole.
    ///
    /// # Errors
    ///
    /// How many entries were written, and why the next one was not.
    pub fn write(&self, entries: &[(K, V)]) -> Result<(), (usize, TableError)> {
        self.map.update(entries).map_err(|(done, source)| (done, self.error("write to", source)))
    }

    /// Deletes entries; absent ones are no error.
    ///
    /// # Errors
    ///
    /// How many entries were deleted, and why the next one was not.
    pub fn delete(&self, keys: &[K]) -> Result<(), (usize, TableError)> {
        self.map.delete(keys).map_err(|(done, source)| (done, self.error("delete from", source)))
    }

    /// The value of a key.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn get(&self, key: &K) -> Result<Option<V>, TableError> {
        self.map.lookup(key).map_err(|source| self.error("read", source))
    }

    /// Adds an entry, unless there is one; whether it did.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn insert(&self, key: &K, value: &V) -> Result<bool, TableError> {
        self.map.insert(key, value).map_err(|source| self.error("write to", source))
    }

    /// Overwrites an entry, if there is one; whether it did.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn replace(&self, key: &K, value: &V) -> Result<bool, TableError> {
        self.map.replace(key, value).map_err(|source| self.error("write to", source))
    }

    /// Walks over all entries in batches, in constant memory; see [`batch::Map::batches`].
    ///
    /// # Errors
    ///
    /// What the kernel said, or what `visit` says.
    pub fn each_batch<E: From<TableError>>(
        &self,
        mut visit: impl FnMut(&[K], &[V]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut batches = self.map.batches();
        while let Some((keys, values)) = batches.next().map_err(|source| self.error("read", source))? {
            visit(keys, values)?;
        }
        Ok(())
    }

    fn error(&self, verb: &'static str, source: io::Error) -> TableError {
        TableError { verb, table: self.name, source }
    }
}

/// The counter table.
pub struct Counters {
    map: PerCpuArray<MapData, Counter>,
}

impl Counters {
    fn open(pins: &Pins) -> Result<Self, PinError> {
        let spec = spec::counters();
        let data = pins.open_map(&spec)?;
        let map = maps::Map::from_map_data(data)
            .and_then(PerCpuArray::try_from)
            .map_err(|source| PinError::Map { path: pins.map(spec.name), source })?;
        Ok(Self { map })
    }

    /// Every outcome with its counter, summed over all CPUs; by outcome number.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn read(&self) -> Result<Vec<(&'static OutcomeInfo, Counter)>, TableError> {
        Outcome::TABLE
            .iter()
            .map(|info| {
                let cpus = self.map.get(&info.outcome.number(), 0).map_err(|error| TableError {
                    verb: "read",
                    table: map::COUNTERS,
                    source: io::Error::other(error),
                })?;
                let mut sum = Counter::default();
                for cpu in cpus.iter() {
                    sum.packets = sum.packets.wrapping_add(cpu.packets);
                    sum.bytes = sum.bytes.wrapping_add(cpu.bytes);
                }
                Ok((info, sum))
            })
            .collect()
    }
}

/// Every table of an instance.
pub struct Tables {
    /// Exact pods.
    pub pods: Table<OverlayAddress, Route>,
    /// Pod CIDRs.
    pub prefixes: Table<TrieKey, Route>,
    /// VTEPs by id.
    pub vteps: Table<u32, Vtep>,
    /// Outer sources.
    pub sources: Table<OverlayAddress, Route>,
    /// Addresses of this host.
    pub addresses: Table<Ipv4, LocalAddress>,
    /// Ways out, by interface index.
    pub egress: Table<u32, Egress>,
    /// Outcomes.
    pub counters: Counters,
    /// Sessions.
    pub sessions: SessionTables,
    /// What became of sessions.
    pub events: Events,
}

impl Tables {
    /// Opens the pinned tables, whatever their capacities are.
    ///
    /// # Errors
    ///
    /// A pin is absent, or is not what is expected there.
    pub fn open(pins: &Pins) -> Result<Self, PinError> {
        Ok(Self {
            pods: Table::open(pins, &spec::pods())?,
            prefixes: Table::open(pins, &spec::prefixes())?,
            vteps: Table::open(pins, &spec::vteps())?,
            sources: Table::open(pins, &spec::sources())?,
            addresses: Table::open(pins, &spec::addresses())?,
            egress: Table::open(pins, &spec::egress())?,
            counters: Counters::open(pins)?,
            sessions: SessionTables::open(pins)?,
            events: Events::open(pins)?,
        })
    }
}

const _: () = assert!(size_of::<TrieKey>() == 12);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_names_its_setting() {
        let full =
            |table| TableError::new("write to", table, io::Error::from_raw_os_error(libc::E2BIG)).to_string();
        assert_eq!(
            full(map::PODS),
            "cannot write to table PODS: it is full: raise max_pods under [datapath]"
        );
        assert_eq!(full(map::EGRESS), "cannot write to table EGRESS: it is full");
    }
}
