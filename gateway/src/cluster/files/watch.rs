//! Keeps an eye on a directory of manifests.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use tokio::{
    sync::mpsc,
    task,
    time::{Instant, sleep},
};

use super::Directory;
use crate::cluster::{model::Event, problem::ProblemList};

/// A file is read when nobody has written to it for so long: writers rarely finish in one step.
const QUIET: Duration = Duration::from_millis(50);
/// Between a change and the look at it; other changes often follow.
const PAUSE: Duration = Duration::from_millis(5);
/// The next look waits so many times as long as the last one took, so that a directory that changes all the time takes
/// a part of one CPU only.
const REST: u32 = 3;
/// Changes that inotify does not tell, as on network file systems or behind symbolic links, are seen after this.
const POLL: Duration = Duration::from_secs(2);

/// Sends what the directory says, and then what changes in it, until the receiver is dropped. A directory that does
/// not exist yet is waited for. What is wrong is kept in `problems`.
pub async fn watch(path: PathBuf, events: mpsc::Sender<Event>, problems: ProblemList) {
    let (nudge, mut nudges) = mpsc::channel(1);
    let mut directory = Directory::new(&path, problems, QUIET);
    let mut watcher = None;
    let (mut listing, mut listed, mut synced) = (false, false, false);
    loop {
        if !watcher.as_ref().is_some_and(|watcher: &DirectoryWatcher| watcher.is_current(&path)) {
            // Without a watcher (no directory yet, no inotify instances left) polling does the work.
            watcher = DirectoryWatcher::new(&path, nudge.clone()).ok();
        }
        let scan = task::spawn_blocking(move || {
            let begin = Instant::now();
            let found = directory.rescan();
            (directory, found, begin.elapsed())
        });
        let Ok((returned, found, took)) = scan.await else { return };
        directory = returned;
        let mut unsettled = false;
        if let Some(found) = found {
            unsettled = found.unsettled;
            let begin = (!listing).then_some(Event::Listing);
            listing = true;
            // What is still being written belongs to the listing.
            let end = match (unsettled, found.partial) {
                (false, false) if !synced => Some(Event::Synced),
                (false, true) if !synced && !listed => Some(Event::Listed { pods: true }),
                _ => None,
            };
            listed |= end.is_some();
            synced |= matches!(end, Some(Event::Synced));
            for event in begin.into_iter().chain(found.events).chain(end) {
                if events.send(event).await.is_err() {
                    return;
                }
            }
        }
        tokio::select! {
            () = events.closed() => return,
            () = sleep(if unsettled { QUIET } else { POLL }) => {}
            _ = nudges.recv() => {}
        }
        sleep(PAUSE.max(took * REST)).await;
        // Whatever happened until now is seen by the look that follows.
        let _ = nudges.try_recv();
    }
}

/// A watch on one directory; the path may lead to another one later.
struct DirectoryWatcher {
    identity: (u64, u64),
    _watcher: RecommendedWatcher,
}

impl DirectoryWatcher {
    fn new(path: &Path, nudge: mpsc::Sender<()>) -> notify::Result<Self> {
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let ours = event.is_ok_and(|event| match event.kind {
                // Our own reading opens and closes files.
                EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
                _ => true,
            });
            if ours {
                // A full channel means that a nudge is on its way already.
                let _ = nudge.try_send(());
            }
        })?;
        let identity = identity(path)?;
        watcher.watch(path, RecursiveMode::NonRecursive)?;
        Ok(Self { identity, _watcher: watcher })
    }

    fn is_current(&self, path: &Path) -> bool {
        identity(path).is_ok_and(|identity| identity == self.identity)
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}
