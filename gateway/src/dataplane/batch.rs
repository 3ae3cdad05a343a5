//! Map operations in batches, by bpf(2).
//!
//! aya has one system call per entry; a table of 150,000 pods wants batches (`BPF_MAP_*_BATCH`, Linux 5.6). Not every
//! map type has every batch operation (arrays cannot delete, tries came later), so each function falls back to single
//! operations where the kernel says that it has none.
//!
//! Keys and values are [`Pod`]: their bytes are what the kernel copies. A [`Map`] is made only if the kernel's map has
//! keys and values of the same sizes, so no copy can pass the end of a buffer.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::maps::MapData;
use bytemuck::Pod;

use super::bpf::{BatchAttr, Command, ElementAttr, bpf};

/// `BPF_NOEXIST`: the entry must not be there yet.
const NOEXIST: u64 = 1;
/// `BPF_EXIST`: the entry must be there.
const EXIST: u64 = 2;

/// Not in libc: what some map types answer instead of EOPNOTSUPP (`ENOTSUPP` in `linux/errno.h`).
const ENOTSUPP: i32 = 524;

/// Entries of one system call: bounds the memory that the kernel and we hold at a time.
const CHUNK: usize = 4096;

fn input<T>(slice: &[T]) -> u64 {
    slice.as_ptr().expose_provenance() as u64
}

fn output<T>(slice: &mut [T]) -> u64 {
    slice.as_mut_ptr().expose_provenance() as u64
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(ENOTSUPP | libc::EOPNOTSUPP | libc::EINVAL))
}

fn count(entries: usize) -> u32 {
    u32::try_from(entries).expect("a chunk has far fewer than 2^32 entries")
}

/// A map whose keys have the size of `K` and whose values have the size of `V`. Not for per-CPU maps: those give one
/// value for each CPU.
#[derive(Debug)]
pub struct Map<K, V> {
    data: MapData,
    types: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Map<K, V> {
    /// Takes a map.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if key or value size differ, or what bpf(2) says about the map.
    pub fn new(data: MapData) -> io::Result<Self> {
        let info = data.info().map_err(io::Error::other)?;
        let found = (info.key_size() as usize, info.value_size() as usize);
        let expected = (size_of::<K>(), size_of::<V>());
        if found == expected {
            Ok(Self { data, types: PhantomData })
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the map has keys and values of {found:?} bytes, not {expected:?}"),
            ))
        }
    }

    /// The map itself.
    pub fn data(&self) -> &MapData {
        &self.data
    }

    fn fd(&self) -> u32 {
        self.data.fd().as_fd().as_raw_fd().cast_unsigned()
    }

    /// Creates or overwrites entries, in order.
    ///
    /// # Errors
    ///
    /// What bpf(2) says (E2BIG: the map is full), and how many entries were written before.
    pub fn update(&self, entries: &[(K, V)]) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        for chunk in entries.chunks(CHUNK) {
            if chunk.len() > 1 {
                let (keys, values): (Vec<K>, Vec<V>) = chunk.iter().copied().unzip();
                let mut attr = BatchAttr {
                    keys: input(&keys),
                    values: input(&values),
                    count: count(chunk.len()),
                    map_fd: self.fd(),
                    ..BatchAttr::default()
                };
                match bpf(Command::UpdateBatch, &mut attr) {
                    Ok(_) => {
                        done += chunk.len();
                        continue;
                    }
                    Err(error) if !unsupported(&error) => return Err((done + attr.count as usize, error)),
                    Err(_) => {}
                }
            }
            for (key, value) in chunk {
                self.update_one(key, value).map_err(|error| (done, error))?;
                done += 1;
            }
        }
        Ok(())
    }

    fn update_one(&self, key: &K, value: &V) -> io::Result<()> {
        self.put(key, value, 0)
    }

    fn put(&self, key: &K, value: &V, flags: u64) -> io::Result<()> {
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            key: input(std::slice::from_ref(key)),
            value: input(std::slice::from_ref(value)),
            flags,
            ..ElementAttr::default()
        };
        bpf(Command::Update, &mut attr).map(drop)
    }

    /// Creates an entry, unless there is one; whether it did.
    ///
    /// # Errors
    ///
    /// What bpf(2) says (E2BIG: the map is full).
    pub fn insert(&self, key: &K, value: &V) -> io::Result<bool> {
        match self.put(key, value, NOEXIST) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Overwrites an entry, if there is one; whether it did.
    ///
    /// # Errors
    ///
    /// What bpf(2) says.
    pub fn replace(&self, key: &K, value: &V) -> io::Result<bool> {
        match self.put(key, value, EXIST) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// The value of a key.
    ///
    /// # Errors
    ///
    /// What bpf(2) says.
    pub fn lookup(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = V::zeroed();
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            key: input(std::slice::from_ref(key)),
            value: output(std::slice::from_mut(&mut value)),
            ..ElementAttr::default()
        };
        match bpf(Command::Lookup, &mut attr) {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes entries; those that are not there count as removed.
    ///
    /// # Errors
    ///
    /// What bpf(2) says (EINVAL: arrays have no removal), and how many entries were removed before.
    pub fn delete(&self, keys: &[K]) -> Result<(), (usize, io::Error)> {
        let mut done = 0;
        for chunk in keys.chunks(CHUNK) {
            let mut rest = chunk;
            if chunk.len() > 1 {
                let mut attr = BatchAttr {
                    keys: input(chunk),
                    count: count(chunk.len()),
                    map_fd: self.fd(),
                    ..BatchAttr::default()
                };
                match bpf(Command::DeleteBatch, &mut attr) {
                    Ok(_) => rest = &[],
                    // A batch ends at the first absent key; the rest goes one by one.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                        rest = &chunk[attr.count as usize..];
                    }
                    Err(error) if !unsupported(&error) => return Err((done + attr.count as usize, error)),
                    Err(_) => {}
                }
            }
            done += chunk.len() - rest.len();
            for key in rest {
                self.delete_one(key).map_err(|error| (done, error))?;
                done += 1;
            }
        }
        Ok(())
    }

    fn delete_one(&self, key: &K) -> io::Result<()> {
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            key: input(std::slice::from_ref(key)),
            ..ElementAttr::default()
        };
        match bpf(Command::Delete, &mut attr) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Reads all entries of a map that nobody else writes meanwhile; of an array, all there are.
    ///
    /// # Errors
    ///
    /// What bpf(2) says.
    pub fn read(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut batches = self.batches();
        while let Some((keys, values)) = batches.next()? {
            entries.extend(keys.iter().copied().zip(values.iter().copied()));
        }
        Ok(entries)
    }

    /// All entries, in batches. Of a hash table that others write meanwhile, every entry that is there all the time is
    /// among them once: the kernel goes from bucket to bucket.
    pub fn batches(&self) -> Batches<'_, K, V> {
        // The kernel's cursor is a bucket number (hash tables) or a key (all others).
        let cursor = vec![0_u8; size_of::<K>().max(size_of::<u32>())];
        Batches {
            map: self,
            next: cursor.clone(),
            cursor,
            started: false,
            ended: false,
            keys: vec![K::zeroed(); CHUNK],
            values: vec![V::zeroed(); CHUNK],
        }
    }
}

/// A walk over a map in batches, in constant memory.
#[derive(Debug)]
pub struct Batches<'m, K, V> {
    map: &'m Map<K, V>,
    cursor: Vec<u8>,
    next: Vec<u8>,
    started: bool,
    ended: bool,
    keys: Vec<K>,
    values: Vec<V>,
}

impl<K: Pod, V: Pod> Batches<'_, K, V> {
    /// The next entries; `None` at the end. A batch may be empty.
    ///
    /// # Errors
    ///
    /// What bpf(2) says.
    #[expect(clippy::should_implement_trait, reason = "it lends its buffers, which no iterator can")]
    pub fn next(&mut self) -> io::Result<Option<(&[K], &[V])>> {
        while !self.ended {
            let mut attr = BatchAttr {
                in_batch: if self.started { input(&self.cursor) } else { 0 },
                out_batch: output(&mut self.next),
                keys: output(&mut self.keys),
                values: output(&mut self.values),
                count: count(self.keys.len()),
                map_fd: self.map.fd(),
                ..BatchAttr::default()
            };
            match bpf(Command::LookupBatch, &mut attr) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => self.ended = true,
                // One hash bucket holds more entries than there is room for.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    self.keys.resize(self.keys.len() * 2, K::zeroed());
                    self.values.resize(self.keys.len(), V::zeroed());
                    continue;
                }
                Err(error) => return Err(error),
            }
            std::mem::swap(&mut self.cursor, &mut self.next);
            self.started = true;
            let read = attr.count as usize;
            return Ok(Some((&self.keys[..read], &self.values[..read])));
        }
        Ok(None)
    }
}
