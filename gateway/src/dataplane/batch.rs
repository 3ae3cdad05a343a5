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
        let mut attr = ElementAttr {
            map_fd: self.fd(),
            key: input(std::slice::from_ref(key)),
            value: input(std::slice::from_ref(value)),
            ..ElementAttr::default()
        };
        bpf(Command::Update, &mut attr).map(drop)
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
        // The kernel's cursor is a bucket number (hash tables) or a key (all others).
        let mut cursor = vec![0_u8; size_of::<K>().max(size_of::<u32>())];
        let mut next = cursor.clone();
        let mut started = false;
        let mut keys = vec![K::zeroed(); CHUNK];
        let mut values = vec![V::zeroed(); CHUNK];
        let mut entries = Vec::new();
        loop {
            let mut attr = BatchAttr {
                in_batch: if started { input(&cursor) } else { 0 },
                out_batch: output(&mut next),
                keys: output(&mut keys),
                values: output(&mut values),
                count: count(keys.len()),
                map_fd: self.fd(),
                ..BatchAttr::default()
            };
            let end = match bpf(Command::LookupBatch, &mut attr) {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                // One hash bucket holds more entries than there is room for.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    keys.resize(keys.len() * 2, K::zeroed());
                    values.resize(keys.len(), V::zeroed());
                    continue;
                }
                Err(error) => return Err(error),
            };
            let read = attr.count as usize;
            entries.extend(keys.iter().copied().zip(values.iter().copied()).take(read));
            if end {
                return Ok(entries);
            }
            std::mem::swap(&mut cursor, &mut next);
            started = true;
        }
    }
}
