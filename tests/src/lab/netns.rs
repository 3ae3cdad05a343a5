//! Named network namespaces, as `ip netns` keeps them.

use std::{
    fs::{self, File},
    io::ErrorKind,
    os::unix::fs::MetadataExt,
    panic,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Where named namespaces are mounted; iproute2 looks here too.
pub const DIRECTORY: &str = "/run/netns";

/// A network namespace that has a name.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// Makes a new namespace and keeps it under `name`; [`prepare`] comes first.
    ///
    /// # Errors
    /// When the name is taken, or this process may not make namespaces (it needs `CAP_SYS_ADMIN`).
    pub fn create(name: &str) -> Result<Self> {
        let path = path_of(name);
        File::options()
            .write(true)
            .create_new(true)
            .open(&path)
            .with_context(|| format!("cannot create {}: is another lab using the name?", path.display()))?;
        // Only a thread can change its namespace without taking the process along.
        let made = thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                mount(Some("/proc/thread-self/ns/net"), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            });
            thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
        });
        if let Err(errno) = made {
            // The empty file would look like a namespace to `ip netns`.
            let _ = fs::remove_file(&path);
            bail!("cannot make network namespace {name}: {errno}; run as root");
        }
        Self::open(name)
    }

    /// Opens the namespace that `name` stands for.
    pub fn open(name: &str) -> Result<Self> {
        let path = path_of(name);
        let file = File::open(&path).with_context(|| format!("no network namespace {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file })
    }

    /// Its name below [`DIRECTORY`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The open file that stands for it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Runs `work` in a thread inside the namespace. Sockets and processes made there stay there; the mount
    /// namespace is the caller's, so `/sys/fs/bpf` is the host's.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter network namespace {}", self.name))?;
                work()
            });
            thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
        })
    }
}

/// Makes [`DIRECTORY`] what iproute2 wants it to be: a shared mount of its own. Otherwise the first `ip netns add` of
/// anybody mounts it over itself with all that is mounted in it, and the mounts below can no longer be removed.
///
/// To be called by one process at a time.
pub fn prepare() -> Result<()> {
    fs::create_dir_all(DIRECTORY).with_context(|| format!("cannot create {DIRECTORY}: run as root"))?;
    let none = None::<&str>;
    let share = || mount(none, DIRECTORY, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    match share() {
        Ok(()) => Ok(()),
        // No mount yet.
        Err(Errno::EINVAL) => {
            mount(Some(DIRECTORY), DIRECTORY, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
                .and_then(|()| share())
        }
        Err(errno) => Err(errno),
    }
    .with_context(|| format!("cannot mount {DIRECTORY} over itself: run as root"))
}

/// Names of all namespaces that begin with `prefix`.
pub fn list(prefix: &str) -> Result<Vec<String>> {
    let entries = match fs::read_dir(DIRECTORY) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot list {DIRECTORY}")),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Ends the processes inside the namespaces, then removes the names; with the last user the kernel removes devices,
/// addresses and routes. Namespaces that are gone already are no error.
pub fn remove(names: &[String]) -> Result<()> {
    let inodes: Vec<u64> =
        names.iter().filter_map(|name| fs::metadata(path_of(name)).ok()).map(|meta| meta.ino()).collect();
    end_processes(&inodes)?;
    for name in names {
        let path = path_of(name);
        match umount2(&path, MntFlags::MNT_DETACH) {
            // EINVAL: the file is no mount point, because its maker died in between.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => bail!("cannot unmount {}: {errno}", path.display()),
        }
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot remove {}", path.display())),
        }
    }
    Ok(())
}

fn end_processes(namespaces: &[u64]) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(3);
    let mut signal = Signal::SIGTERM;
    loop {
        let alive = processes_in(namespaces)?;
        if alive.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("processes {alive:?} do not leave the lab's namespaces");
        }
        for pid in alive {
            // A process that ended meanwhile is what we want.
            let _ = kill(pid, signal);
        }
        thread::sleep(Duration::from_millis(if signal == Signal::SIGTERM { 150 } else { 20 }));
        signal = Signal::SIGKILL;
    }
}

/// Processes, ourselves excepted, whose main thread is in one of the namespaces. Zombies have left theirs.
fn processes_in(namespaces: &[u64]) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list processes")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let inside =
            fs::metadata(entry.path().join("ns/net")).is_ok_and(|meta| namespaces.contains(&meta.ino()));
        if inside && Pid::from_raw(pid) != Pid::this() {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

fn path_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}
