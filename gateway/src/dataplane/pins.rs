//! Where the maps and links of an instance lie in the bpffs, and who may use them.
//!
//! ```text
//! <bpffs>/gateway/<instance>/v<abi>/maps/<MAP>      the tables, shared by all loads of the program
//! <bpffs>/gateway/<instance>/v<abi>/links/<ifname>  the attachment of each interface
//! /run/gateway/<instance>/lock                      held by the daemon while it runs
//! ```
//!
//! A pin is never trusted: the loader would take a map of another type or size without complaint, and the kernel would
//! then copy as many bytes as *that* map has.
//!
//! ```text
//! <bpffs>/gateway/<instance>/v<abi>/links/<interface>   attachments
//! <bpffs>/gateway/<instance>/v<abi>/maps/<table>        tables
//! <bpffs>/gateway/<instance>/v<abi>/staging/<table>     tables of another size, until every program uses them
//! ```
//!
//! A table whose capacity is not the configured one is made anew in `staging`, filled there, and takes the old one's
//! place when every program has been swapped: the two directories are exchanged in one step. Until then only the daemon
//! writes to the tables of the plan, so a start that is cut off leaves the old ones as true as the new ones, and the next
//! start begins again from the old ones. Sessions are written by the program: what a start that was cut off left in
//! `staging` (or what the exchange left there) may hold sessions of its own, which the next start takes over.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use aya::{
    maps::{MapData, MapError, MapInfo, MapType},
    programs::links::{FdLink, PinnedLink},
};
use gateway_common::abi::{VERSION, map};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::geteuid,
};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::bpf::reason;

/// Directory for runtime files; one subdirectory for each instance.
pub const RUN_DIRECTORY: &str = "/run/gateway";

/// How often the lock is tried: somebody who only asks whether it is held holds it for a moment.
const ATTEMPTS: u32 = 5;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);

/// Something is wrong with a pin or with the bpffs.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// A file operation failed.
    #[error("cannot {verb} {}: {source}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Others could change what is trusted.
    #[error("{} {flaw}: {remedy}, then start again", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        flaw: String,
        /// What to do.
        remedy: String,
    },
    /// Something that is no map is pinned in a map's place.
    #[error("{} is no map: remove what is pinned there with `gateway detach`, and start again", .0.display())]
    NotAMap(PathBuf),
    /// A pinned map cannot be opened.
    #[error(
        "cannot open the pinned map {}: {}; if somebody else put it there, `gateway detach` removes it", path.display(), reason(source)
    )]
    Map {
        /// The pin.
        path: PathBuf,
        /// What aya said.
        source: MapError,
    },
    /// There are no tables.
    #[error("nothing is pinned at {}: `gateway run` makes the tables, `gateway detach` removes them", .0.display())]
    Absent(PathBuf),
    /// Something else is pinned there.
    #[error(
        "the pinned map {} is not what this version expects ({found}, expected {expected}), and cannot be adopted: \
         start the version that made it, or interrupt the traffic: remove the pins with `gateway detach`, and start again",
        path.display()
    )]
    Mismatch {
        /// The pin.
        path: PathBuf,
        /// What is there.
        found: Shape,
        /// What should be there.
        expected: Shape,
    },
    /// Another daemon runs.
    #[error(
        "instance {instance} is already running{}: stop that process first",
        holder.map_or_else(String::new, |pid| format!(" as process {pid}"))
    )]
    Locked {
        /// Name of the instance.
        instance: String,
        /// Process that holds the lock, if it said so.
        holder: Option<u32>,
    },
}

/// What must agree before a pinned map is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Type of map.
    pub kind: Option<MapType>,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// `BPF_F_*` flags of its creation.
    pub flags: u32,
    /// Capacity.
    pub max_entries: u32,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Some(kind) => write!(f, "{kind:?}")?,
            None => f.write_str("a map of unknown type")?,
        }
        write!(
            f,
            " with keys of {} bytes, values of {} bytes, flags {:#x}, {} entries",
            self.key_size, self.value_size, self.flags, self.max_entries
        )
    }
}

/// A map that is expected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MapSpec {
    /// Name of the map and of its pin.
    pub name: &'static str,
    /// Type of map.
    pub kind: MapType,
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// `BPF_F_*` flags of its creation.
    pub flags: u32,
    /// Capacity, if the map comes from the configuration at hand.
    pub max_entries: u32,
}

impl MapSpec {
    fn shape(&self) -> Shape {
        let Self { name: _, kind, key_size, value_size, flags, max_entries } = *self;
        Shape { kind: Some(kind), key_size, value_size, flags, max_entries }
    }

    /// Whether the daemon can move the table to another capacity. The program counts while we would copy, so the capacity
    /// of counters belongs to the ABI.
    fn can_move(&self) -> bool {
        self.kind != MapType::PerCpuArray && self.name != map::HAND
    }
}

/// Tables of one size: they move together.
pub const SESSION_TABLES: [&str; 3] = [map::FORWARD, map::REVERSE, map::SLOTS];

/// What each table is expected to be.
pub mod spec {
    use aya::maps::MapType;
    use gateway_common::{
        abi::{
            Counter, Egress, Forward, ForwardKey, LocalAddress, OUTCOME_CAPACITY, OverlayAddress, Reverse,
            ReverseKey, Route, SessionEvent, Slot, Vtep, map,
        },
        wire::Ipv4,
    };

    use super::MapSpec;
    use crate::{
        config::{Datapath, snat::SPARE_SESSIONS},
        dataplane::tables::TrieKey,
    };

    /// Capacity of the table of this host's addresses.
    pub const MAX_ADDRESSES: u32 = 4096;
    /// Capacity of the table of ways out.
    pub const MAX_EGRESS: u32 = 1024;

    const BPF_F_NO_PREALLOC: u32 = 1;

    #[expect(clippy::cast_possible_truncation, reason = "sizes of table types are far below 4 GiB")]
    const fn of<K, V>(name: &'static str, kind: MapType, flags: u32, max_entries: u32) -> MapSpec {
        MapSpec {
            name,
            kind,
            key_size: size_of::<K>() as u32,
            value_size: size_of::<V>() as u32,
            flags,
            max_entries,
        }
    }

    pub(crate) const fn pods() -> MapSpec {
        of::<OverlayAddress, Route>(map::PODS, MapType::Hash, 0, 0)
    }

    pub(crate) const fn prefixes() -> MapSpec {
        of::<TrieKey, Route>(map::PREFIXES, MapType::LpmTrie, BPF_F_NO_PREALLOC, 0)
    }

    pub(crate) const fn vteps() -> MapSpec {
        of::<u32, Vtep>(map::VTEPS, MapType::Array, 0, 0)
    }

    pub(crate) const fn sources() -> MapSpec {
        of::<OverlayAddress, Route>(map::SOURCES, MapType::Hash, 0, 0)
    }

    pub(crate) const fn addresses() -> MapSpec {
        of::<Ipv4, LocalAddress>(map::ADDRESSES, MapType::Hash, 0, MAX_ADDRESSES)
    }

    pub(crate) const fn egress() -> MapSpec {
        of::<u32, Egress>(map::EGRESS, MapType::Hash, 0, MAX_EGRESS)
    }

    pub(crate) const fn counters() -> MapSpec {
        of::<u32, Counter>(map::COUNTERS, MapType::PerCpuArray, 0, OUTCOME_CAPACITY)
    }

    pub(crate) const fn forward() -> MapSpec {
        of::<ForwardKey, Forward>(map::FORWARD, MapType::Hash, 0, 0)
    }

    pub(crate) const fn reverse() -> MapSpec {
        of::<ReverseKey, Reverse>(map::REVERSE, MapType::Hash, 0, 0)
    }

    pub(crate) const fn slots() -> MapSpec {
        of::<u32, Slot>(map::SLOTS, MapType::Array, 0, 0)
    }

    pub(crate) const fn hand() -> MapSpec {
        of::<u32, u64>(map::HAND, MapType::Array, 0, 1)
    }

    #[expect(clippy::cast_possible_truncation, reason = "a handful of events")]
    pub(crate) const fn events() -> MapSpec {
        of::<u32, u64>(map::EVENTS, MapType::PerCpuArray, 0, SessionEvent::ALL.len() as u32)
    }

    /// Every table with the capacities of a configuration, and room for so many sessions, in the order of [`map::ALL`].
    pub fn all(datapath: &Datapath, sessions: u32) -> [MapSpec; map::ALL.len()] {
        [
            MapSpec { max_entries: datapath.max_pods, ..pods() },
            MapSpec { max_entries: datapath.max_prefixes, ..prefixes() },
            MapSpec { max_entries: datapath.max_vteps, ..vteps() },
            MapSpec { max_entries: datapath.max_sources, ..sources() },
            addresses(),
            egress(),
            counters(),
            MapSpec { max_entries: sessions.saturating_add(SPARE_SESSIONS), ..forward() },
            MapSpec { max_entries: sessions.saturating_add(SPARE_SESSIONS), ..reverse() },
            MapSpec { max_entries: sessions, ..slots() },
            hand(),
            events(),
        ]
    }
}

/// Paths of an instance.
#[derive(Clone, Debug)]
pub struct Pins {
    bpffs: PathBuf,
    instance: String,
    /// Tables whose successor is in the staging directory.
    staged: BTreeSet<&'static str>,
}

impl Pins {
    /// Paths under `bpffs`; touches nothing.
    pub fn new(bpffs: &Path, instance: &str) -> Self {
        Self { bpffs: bpffs.to_owned(), instance: instance.to_owned(), staged: BTreeSet::new() }
    }

    /// Name of the instance.
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Directory of the instance, all ABI versions.
    pub fn directory(&self) -> PathBuf {
        self.bpffs.join("gateway").join(&self.instance)
    }

    fn version(&self) -> PathBuf {
        self.directory().join(format!("v{VERSION}"))
    }

    /// Path of a map; of the new one while a table moves.
    pub fn map(&self, name: &str) -> PathBuf {
        if self.staged.contains(name) { self.staging().join(name) } else { self.settled(name) }
    }

    fn settled(&self, name: &str) -> PathBuf {
        self.version().join("maps").join(name)
    }

    fn staging(&self) -> PathBuf {
        self.version().join("staging")
    }

    /// Directories of the instance that belong to other versions of the ABI.
    ///
    /// # Errors
    ///
    /// The directory of the instance cannot be listed.
    pub fn other_versions(&self) -> Result<Vec<PathBuf>, PinError> {
        let own = self.version();
        let mut others = list(&self.directory())?;
        others.retain(|path| *path != own);
        Ok(others)
    }

    /// Directory of the links.
    pub fn links(&self) -> PathBuf {
        self.version().join("links")
    }

    /// Path of the link of an interface.
    pub fn link(&self, interface: &str) -> PathBuf {
        // bpffs refuses dots in names; interface names may have them, but no `%`-escapes of their own.
        self.links().join(interface.replace('%', "%25").replace('.', "%2e"))
    }

    /// Whether the program is on the interface by the pinned link.
    pub(super) fn holds(&self, interface: &str, program: u32) -> bool {
        let pinned = PinnedLink::from_pin(self.link(interface)).map(FdLink::from);
        pinned.and_then(|link| link.info()).is_ok_and(|info| info.program_id() == program)
    }

    /// Another instance that has a pinned link of the interface.
    pub(super) fn other_instance(&self, interface: &str) -> Option<String> {
        let name = self.link(interface);
        let name = name.file_name()?;
        let has_link = |instance: &Path| {
            list(instance).is_ok_and(|versions| {
                versions.iter().any(|version| version.join("links").join(name).exists())
            })
        };
        list(&self.bpffs.join("gateway"))
            .ok()?
            .into_iter()
            .filter(|instance| *instance != self.directory() && has_link(instance))
            .find_map(|instance| Some(instance.file_name()?.to_string_lossy().into_owned()))
    }

    /// Interfaces that have a pinned link.
    pub fn linked_interfaces(&self) -> Result<Vec<String>, PinError> {
        let mut names: Vec<String> = list(&self.links())?
            .iter()
            .filter_map(|path| path.file_name())
            .map(|name| name.to_string_lossy().replace("%2e", ".").replace("%25", "%"))
            .collect();
        names.sort();
        Ok(names)
    }

    /// Makes the directories, and mounts the bpffs if nobody did.
    pub fn prepare(&self) -> Result<(), PinError> {
        let bpffs = &self.bpffs;
        fs::create_dir_all(bpffs).map_err(|source| PinError::Io {
            verb: "create",
            path: bpffs.clone(),
            source,
        })?;
        let found = statfs(bpffs).map_err(|error| PinError::Io {
            verb: "look at",
            path: bpffs.clone(),
            source: error.into(),
        })?;
        if found.filesystem_type() != BPF_FS_MAGIC {
            // As systemd mounts it.
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("bpf"), bpffs, Some("bpf"), flags, Some("mode=0700")).map_err(|error| {
                PinError::Io { verb: "mount a bpffs on", path: bpffs.clone(), source: error.into() }
            })?;
        }
        let own = [
            bpffs.join("gateway"),
            self.directory(),
            self.version(),
            self.version().join("maps"),
            self.links(),
        ];
        own.iter().try_for_each(|path| make_directory(path))
    }

    /// The paths of what a start that was cut off left in the staging directory.
    pub(super) fn left_over(&self) -> Self {
        Self { staged: SESSION_TABLES.into(), ..self.clone() }
    }

    /// Clears away what a start that was cut off left.
    ///
    /// # Errors
    ///
    /// A file that cannot be removed.
    pub(super) fn clear_staging(&self) -> Result<(), PinError> {
        remove_tree(&self.staging()).map(drop)
    }

    /// Compares every pinned map that is there with what is expected. From then on those that differ in capacity alone
    /// have their successor in the staging directory: see [`Self::staged`].
    ///
    /// # Errors
    ///
    /// The first pin that differs otherwise, with the remedy.
    pub fn check(&mut self, specs: &[MapSpec]) -> Result<(), PinError> {
        for spec in specs {
            let path = self.settled(spec.name);
            if !path.exists() {
                continue;
            }
            let (_, info) = open(&path)?;
            let any_size = MapSpec { max_entries: info.max_entries(), ..*spec };
            if info.max_entries() != spec.max_entries && spec.can_move() {
                compare(&path, &info, &any_size)?;
                self.staged.insert(spec.name);
            } else {
                compare(&path, &info, spec)?;
            }
        }
        if self.staged.iter().any(|name| SESSION_TABLES.contains(name)) {
            self.staged.extend(SESSION_TABLES);
        }
        if !self.staged.is_empty() {
            make_directory(&self.staging())?;
        }
        Ok(())
    }

    /// Names of the tables that move.
    pub fn staged(&self) -> &BTreeSet<&'static str> {
        &self.staged
    }

    /// The paths as they are for somebody who does not move tables.
    pub(super) fn without_staging(&self) -> Self {
        Self { staged: BTreeSet::new(), ..self.clone() }
    }

    /// Puts the successors of moved tables in their places, all in one step: the staging directory gets a second pin of
    /// every table that did not move, and is exchanged with the directory of the tables.
    ///
    /// # Errors
    ///
    /// What cannot be pinned, exchanged or removed.
    pub fn settle(&mut self) -> Result<(), PinError> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let (maps, staging) = (self.version().join("maps"), self.staging());
        for path in list(&maps)? {
            let Some(name) = path.file_name() else { continue };
            let twin = staging.join(name);
            if !twin.exists() {
                let data = MapData::from_pin(&path)
                    .map_err(|source| PinError::Map { path: path.clone(), source })?;
                data.pin(&twin).map_err(|error| PinError::Io {
                    verb: "pin",
                    path: twin,
                    source: io::Error::other(error),
                })?;
            }
        }
        renameat_with(CWD, &staging, CWD, &maps, RenameFlags::EXCHANGE).map_err(|error| PinError::Io {
            verb: "put the new tables in place of",
            path: maps,
            source: error.into(),
        })?;
        self.staged.clear();
        self.clear_staging()
    }

    /// Opens a pinned map after comparing it; its capacity may be any.
    pub(super) fn open_map(&self, spec: &MapSpec) -> Result<MapData, PinError> {
        let path = self.map(spec.name);
        if !path.exists() {
            return Err(PinError::Absent(path));
        }
        let (data, info) = open(&path)?;
        compare(&path, &info, &MapSpec { max_entries: info.max_entries(), ..*spec })?;
        Ok(data)
    }

    /// Removes every pin of the instance, of all ABI versions. Links that lose their pin detach.
    ///
    /// # Errors
    ///
    /// The first file that cannot be removed.
    pub fn remove(&self) -> Result<bool, PinError> {
        remove_tree(&self.directory())
    }
}

/// Opens a pinned map. The kernel hands out whatever is pinned, and tells of a program as if it were a map.
fn open(path: &Path) -> Result<(MapData, MapInfo), PinError> {
    let fault = |source| PinError::Map { path: path.to_owned(), source };
    let data = MapData::from_pin(path).map_err(fault)?;
    let descriptor = format!("/proc/self/fd/{}", data.fd().as_fd().as_raw_fd());
    if fs::read_link(descriptor).is_ok_and(|kind| kind != Path::new("anon_inode:bpf-map")) {
        return Err(PinError::NotAMap(path.to_owned()));
    }
    let info = data.info().map_err(fault)?;
    Ok((data, info))
}

fn compare(path: &Path, info: &MapInfo, spec: &MapSpec) -> Result<(), PinError> {
    let found = Shape {
        kind: info.map_type().ok(),
        key_size: info.key_size(),
        value_size: info.value_size(),
        flags: info.map_flags(),
        max_entries: info.max_entries(),
    };
    let expected = spec.shape();
    if found == expected {
        Ok(())
    } else {
        Err(PinError::Mismatch { path: path.to_owned(), found, expected })
    }
}

/// What is in a directory, sorted; nothing if there is none.
fn list(directory: &Path) -> Result<Vec<PathBuf>, PinError> {
    let fault = |source| PinError::Io { verb: "list", path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fault(error)),
    };
    let mut paths =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>().map_err(fault)?;
    paths.sort();
    Ok(paths)
}

/// Makes a directory that nobody else can write to, in one that is there. Whoever could would decide what is taken for
/// ours, and where our files lead.
fn make_directory(path: &Path) -> Result<(), PinError> {
    let fault = |verb, source| PinError::Io { verb, path: path.to_owned(), source };
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(fault("create", error)),
        _ => {}
    }
    let found = fs::symlink_metadata(path).map_err(|error| fault("look at", error))?;
    let shown = path.display();
    let (flaw, remedy) = if !found.is_dir() {
        ("is no directory".to_owned(), format!("remove it (rm {shown})"))
    } else if ![0, geteuid().as_raw()].contains(&found.uid()) {
        (format!("belongs to user {}", found.uid()), format!("look what is in it, and chown root {shown}"))
    } else if found.mode() & 0o022 != 0 {
        let mode = found.mode() & 0o7777;
        (
            format!("may be written by others (mode {mode:o})"),
            format!("look what is in it, and chmod 755 {shown}"),
        )
    } else {
        return Ok(());
    };
    Err(PinError::Unsafe { path: path.to_owned(), flaw, remedy })
}

/// Removes links before maps (`links` sorts before `maps`): no packet meets a program without its tables.
fn remove_tree(directory: &Path) -> Result<bool, PinError> {
    let fault = |verb, path: &Path, source| PinError::Io { verb, path: path.to_owned(), source };
    let mut entries = match fs::read_dir(directory) {
        Ok(entries) => {
            entries.collect::<Result<Vec<_>, _>>().map_err(|error| fault("list", directory, error))?
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(fault("list", directory, error)),
    };
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if entry.file_type().map_err(|error| fault("look at", &path, error))?.is_dir() {
            remove_tree(&path)?;
        } else {
            fs::remove_file(&path).map_err(|error| fault("remove", &path, error))?;
        }
    }
    fs::remove_dir(directory).map_err(|error| fault("remove", directory, error))?;
    Ok(true)
}

/// The process id that stands in a lock file.
fn process_in(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Whether the open file is the one that the path leads to.
fn is_at(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let there = fs::metadata(path).map(identity);
    file.metadata().map(identity).is_ok_and(|open| there.is_ok_and(|there| there == open))
}

/// Directory of an instance's runtime files.
pub fn run_directory(instance: &str) -> PathBuf {
    Path::new(RUN_DIRECTORY).join(instance)
}

/// The right to change an instance. Released when dropped, and by the kernel when the process ends.
#[derive(Debug)]
pub struct InstanceLock {
    path: PathBuf,
    _file: Flock<File>,
}

impl InstanceLock {
    /// Takes the lock.
    ///
    /// # Errors
    ///
    /// [`PinError::Locked`] if another process has it.
    pub fn take(instance: &str) -> Result<Self, PinError> {
        let directory = run_directory(instance);
        make_directory(Path::new(RUN_DIRECTORY))?;
        make_directory(&directory)?;
        let path = directory.join("lock");
        let fault = |verb, source: io::Error| PinError::Io { verb, path: path.clone(), source };
        let open = || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW);
            options.open(&path).map_err(|error| fault("open", error))
        };
        let mut file = open()?;
        for _ in 0..ATTEMPTS {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // `detach` has removed the file that we had opened; somebody else may have the next one.
                Ok(removed) if !is_at(&removed, &path) => file = open()?,
                Ok(mut locked) => {
                    locked.set_len(0).map_err(|error| fault("write to", error))?;
                    locked.rewind().map_err(|error| fault("write to", error))?;
                    writeln!(locked, "{}", std::process::id()).map_err(|error| fault("write to", error))?;
                    return Ok(Self { path, _file: locked });
                }
                Err((busy, Errno::EWOULDBLOCK)) => file = busy,
                Err((_, error)) => return Err(fault("lock", error.into())),
            }
            thread::sleep(ATTEMPT_PAUSE);
        }
        Err(PinError::Locked { instance: instance.to_owned(), holder: process_in(&mut file) })
    }

    /// Releases the lock, and removes it with its directory if nothing else is in there.
    ///
    /// # Errors
    ///
    /// The file cannot be removed.
    pub fn remove(self) -> Result<(), PinError> {
        let Self { path, _file } = self;
        fs::remove_file(&path).map_err(|source| PinError::Io {
            verb: "remove",
            path: path.clone(),
            source,
        })?;
        // Not empty if somebody has just taken the instance; they keep it.
        let _ = path.parent().map(fs::remove_dir);
        Ok(())
    }

    /// Id of the process that has the lock; 0 if it has not said yet. `None` if nobody has it.
    ///
    /// # Errors
    ///
    /// The lock file is there but cannot be tried.
    pub fn holder(instance: &str) -> Result<Option<u32>, PinError> {
        let path = run_directory(instance).join("lock");
        let fault = |verb, source: io::Error| PinError::Io { verb, path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fault("open", error)),
        };
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => Ok(None),
            Err((mut file, Errno::EWOULDBLOCK)) => Ok(Some(process_in(&mut file).unwrap_or(0))),
            Err((_, error)) => Err(fault("try the lock", error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn directories_are_nobody_elses() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        make_directory(&at("own")).unwrap();
        make_directory(&at("own")).unwrap();
        assert!(matches!(make_directory(&at("absent/own")), Err(PinError::Io { .. })));

        fs::create_dir(at("open")).unwrap();
        fs::set_permissions(at("open"), fs::Permissions::from_mode(0o775)).unwrap();
        fs::write(at("file"), "").unwrap();
        symlink(at("own"), at("link")).unwrap();
        for (name, flaw, remedy) in [
            ("open", "may be written by others (mode 775)", "chmod 755"),
            ("file", "is no directory", "rm "),
            ("link", "is no directory", "rm "),
        ] {
            let error = make_directory(&at(name)).unwrap_err().to_string();
            for part in [name, flaw, remedy] {
                assert!(error.contains(part), "{part} in: {error}");
            }
        }
    }
}
