//! Which labs exist, whose they are, and how they end: on drop, on a signal, and at the next start after a crash.
//!
//! A lab is known by its id. Its namespaces are called `gwlab-<id>-<host>`, and its owner holds a lock on
//! `/run/gateway-lab/<id>.lock` while it lives. A lock that nobody holds marks a lab whose owner died.
//! The standing lab of `cargo xtask lab up` has the id [`STANDING`] and no lock: it outlives its maker on purpose.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::ErrorKind,
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, anyhow};
use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{SignalKind, signal};

use super::netns;

/// Id of the lab that is kept standing for people.
pub const STANDING: &str = "up";

const DIRECTORY: &str = "/run/gateway-lab";
/// Where gateways pin tables, and where they keep locks and status; one directory for each instance.
const BPFFS: &str = "/sys/fs/bpf/gateway";
const RUN: &str = "/run/gateway";

static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static COUNT: AtomicU32 = AtomicU32::new(0);

/// A lab's id, and the duty to take the lab away.
#[derive(Debug)]
pub struct Claim {
    id: String,
    lock: Option<Flock<File>>,
}

impl Claim {
    /// A new id for a lab that ends with this process. Labs whose owners died are removed first.
    pub fn transient() -> Result<Self> {
        let _guard = exclusive()?;
        netns::prepare()?;
        sweep()?;
        let id = format!("{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = lock_path(&id);
        let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| anyhow!("cannot lock {}: {errno}", path.display()))?;
        end_on_signals();
        live().insert(id.clone());
        Ok(Self { id, lock: Some(lock) })
    }

    /// The id of the standing lab; until [`Self::keep`] it ends like any other.
    pub fn standing() -> Result<Self> {
        let _guard = exclusive()?;
        netns::prepare()?;
        sweep()?;
        end_on_signals();
        live().insert(STANDING.to_owned());
        Ok(Self { id: STANDING.to_owned(), lock: None })
    }

    /// The id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Leaves the lab standing when this process ends.
    pub fn keep(self) {
        live().remove(&self.id);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // `keep` took the id out of the set.
        if live().remove(&self.id)
            && let Err(error) = remove(&self.id)
        {
            eprintln!("lab {}: {error:#}", self.id);
        }
        if self.lock.take().is_some() {
            let _ = fs::remove_file(lock_path(&self.id));
        }
    }
}

/// Name of a host's namespace.
pub fn namespace_of(id: &str, host: &str) -> String {
    format!("{}{host}", prefix(id))
}

/// Whether the lab has namespaces.
pub fn exists(id: &str) -> Result<bool> {
    Ok(!netns::list(&prefix(id))?.is_empty())
}

/// Removes all that belongs to the lab: processes, namespaces, what its gateway pinned and noted.
pub fn remove(id: &str) -> Result<()> {
    netns::remove(&netns::list(&prefix(id))?)?;
    for directory in [BPFFS, RUN] {
        let directory = Path::new(directory).join(instance(id));
        match fs::remove_dir_all(&directory) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot remove {}", directory.display()));
            }
        }
    }
    Ok(())
}

/// Name of the gateway instance in the lab.
pub fn instance(id: &str) -> String {
    format!("lab-{id}")
}

/// The file in which the standing lab describes itself.
pub fn state_path() -> PathBuf {
    Path::new(DIRECTORY).join("standing.json")
}

fn prefix(id: &str) -> String {
    format!("gwlab-{id}-")
}

fn lock_path(id: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{id}.lock"))
}

/// Only one process at a time claims or sweeps: a lock file is never seen between its making and its locking.
fn exclusive() -> Result<Flock<File>> {
    fs::create_dir_all(DIRECTORY)
        .with_context(|| format!("cannot create {DIRECTORY}: the lab needs root"))?;
    let path = Path::new(DIRECTORY).join("claims");
    let file = File::create(&path)
        .with_context(|| format!("cannot create {}: the lab needs root", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| anyhow!("cannot lock {}: {errno}", path.display()))
}

/// Removes labs whose lock nobody holds.
fn sweep() -> Result<()> {
    for entry in fs::read_dir(DIRECTORY).with_context(|| format!("cannot list {DIRECTORY}"))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        let Some(id) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        // A lab that ends right now takes its file away by itself.
        let Ok(file) = File::open(&path) else { continue };
        if Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok() {
            remove(id).with_context(|| format!("cannot remove lab {id}, whose owner died"))?;
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

fn live() -> std::sync::MutexGuard<'static, BTreeSet<String>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes Ctrl-C, SIGTERM and SIGHUP remove this process' labs before they end it.
fn end_on_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        thread::spawn(|| {
            let number = match wait_for_signal() {
                Ok(number) => number,
                // Without handlers signals end the process as usual; the next start sweeps.
                Err(error) => return eprintln!("lab: cannot wait for signals: {error}"),
            };
            // Held until exit, so that no lab is made meanwhile.
            let live = live();
            for id in live.iter() {
                if let Err(error) = remove(id) {
                    eprintln!("lab {id}: {error:#}");
                }
                let _ = fs::remove_file(lock_path(id));
            }
            process::exit(128 + number);
        });
    });
}

fn wait_for_signal() -> std::io::Result<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        Ok(tokio::select! {
            _ = interrupt.recv() => SignalKind::interrupt().as_raw_value(),
            _ = terminate.recv() => SignalKind::terminate().as_raw_value(),
            _ = hangup.recv() => SignalKind::hangup().as_raw_value(),
        })
    })
}
